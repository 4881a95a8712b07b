"""The commands above the single stages: those that run several in a row, and ``reckon``."""
