"""Warnings about what somebody's program does, at the place in that program."""

from __future__ import annotations

import sys
import warnings
from functools import cache

__all__ = ["warn", "warn_once"]


def warn(message: str) -> None:
    """Warns, of the line outside of this package and torch that led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("lstm_ext", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


@cache
def warn_once(message: str) -> None:
    """The same at the first call with this message."""
    warn(message)
