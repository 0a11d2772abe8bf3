"""Understand a modeling file without running it: symbolic execution, layouts, attention, weights."""
