"""Passes from the runtime's layers to those of vLLM."""
