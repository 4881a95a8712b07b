"""Worked examples; each folder is one, run as ``python -m examples.<name>``."""
