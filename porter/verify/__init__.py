"""Proof of a port: numbers that could have failed, from the original run beside it."""
