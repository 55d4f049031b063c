"""What server and client say to one another: bodies, headers, framing and faults. Pure: no I/O, and nothing installed
beyond what Millpond always needs."""
