"""Rewriting passes: one file each, discovered by `base.discover`."""
