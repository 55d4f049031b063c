"""Frozen data and pure functions: what a message is, how it is named, dated and encoded. No I/O in this package."""
