"""Measure how full loads and spills keep a link of limited rate."""
