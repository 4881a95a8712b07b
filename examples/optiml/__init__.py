"""A reproduction of OPTiML (arXiv 2404.11868) on chest X-rays, built on otloss."""
