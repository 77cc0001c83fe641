"""Signed requests for objects: one at a time, pipelined, and in bulk."""
