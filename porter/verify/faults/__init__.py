"""Seeded faults: ports that are wrong in one known place, to measure what the verifier notices and names."""
