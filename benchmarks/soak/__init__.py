"""The soak test: random problems over the whole API, on the cpu backend against the reference in float64."""
