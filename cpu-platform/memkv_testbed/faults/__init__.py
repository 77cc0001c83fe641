"""Faults on purpose: a small cluster under traffic, what can befall it, and what clients saw."""
