"""Encryption of what a store keeps: root keys (`keyring`), sealed records (`envelope`), sealed streams (`stream`), and
the keys that outlive a root key (`vault`). No I/O here but reading a key file."""
