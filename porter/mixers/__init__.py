"""Layers that keep a state for each sequence: set apart before conversion, and put back for the runtime's states."""
