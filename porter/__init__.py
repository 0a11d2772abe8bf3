"""porter rewrites Hugging Face modeling files for a paged-attention runtime, and proves the result."""

__version__ = "0.1.0"
