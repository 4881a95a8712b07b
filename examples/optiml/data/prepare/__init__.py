"""Conversion of a data set in its official layout, once: grey PNGs and one index (see ``DATA.md``)."""
