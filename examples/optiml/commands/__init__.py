"""The commands that run several stages in a row: a thin layer above all rooms."""
