"""Storage: conditional writes on opaque records, behind one protocol (`base`)."""
