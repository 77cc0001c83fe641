"""Fault injection: a small cluster under traffic, the faults, and what the clients see."""
