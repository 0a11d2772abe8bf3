"""Measuring the engine, alone and against others on the same machine."""
