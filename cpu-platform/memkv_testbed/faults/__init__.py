"""Fault injection: a small cluster under traffic, its faults, and what its clients see."""
