"""Helpers for the tests of this project and of third-party tiers."""
