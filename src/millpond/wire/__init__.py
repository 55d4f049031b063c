"""What goes over the wire, for server and client alike: bodies, frames and names of errors. No I/O."""
