"""Stage one: read a data set in its official layout once, write grey PNGs and one index (see ``DATA.md``)."""
