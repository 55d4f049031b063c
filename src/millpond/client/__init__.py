"""A pond behind HTTP: the operations of a store's service, asked of a server."""
