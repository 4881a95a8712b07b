"""Benchmarks of otloss beside its peers: ``python -m benchmarks --help``."""
