"""Worked examples: a folder is a whole method, a file a recipe; each is run as ``python -m examples.<name>``."""
