"""What porter does with vLLM itself: read its source, and run ports inside an installed one."""
