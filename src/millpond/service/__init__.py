"""What a message may do next: all policy, over any store."""
