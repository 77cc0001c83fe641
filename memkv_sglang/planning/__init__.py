"""Simulate clusters of any size, and estimate the size that a workload needs.

See docs/scale.md and docs/planning.md.

Start with `scenario.py` (all inputs) and `cluster.py` (what happens to a request).
"""
