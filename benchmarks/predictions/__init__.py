"""Predict measurements of this machine with the simulator, from numbers that were frozen before."""
