"""The error by which a stage says that it cannot go on."""

from __future__ import annotations


class CommandError(Exception):
    """Something that the user can put right; its message says what. The command line prints it and exits with 1."""
