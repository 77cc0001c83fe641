"""Alternatives that a user could pick: one module per peer, with one contract."""
