"""Measure one agent that serves as many clients as a node has GPUs."""
