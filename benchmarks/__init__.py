"""What this package costs beside others, in one run: ``python -m benchmarks --help``."""
