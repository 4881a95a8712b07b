"""A reproduction of OPTiML (arXiv 2404.11868) on chest X-rays, built on otloss.

Folders in the order in which data flows: ``data``, ``pretraining``, ``downstream``, ``reporting``, ``commands``. A
module imports from its own folder and from those before it, never from a later one. ``atomic``, ``metrics`` and
``provenance`` serve all of them.
"""
