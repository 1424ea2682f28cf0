"""Cost beside peers: ``python -m benchmarks``."""
