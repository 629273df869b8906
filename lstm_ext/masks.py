"""Which units a cell drops or holds: random numbers by counter, so that nothing is stored, the same on every engine.

Each is a function of the seed, the kind of mask, the direction, the time (in the caller's order), the row of the batch
and the unit. splitmix64 (Steele et al. 2014) of all but the last makes a key of 64 bits for each row and time; its two
halves are mixed with the unit by Wellons' lowbias32. Integers are int64 here, whose products wrap around as those of
uint64 do; arrays are NumPy's or torch's.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

Array = Any


class Mask(IntEnum):
    """The kinds."""

    RECURRENT_DROPOUT = 0  # the same at all times: as of time 0
    CANDIDATE_DROPOUT = 1
    ZONEOUT_H = 2
    ZONEOUT_C = 3


_WORD = 0xFFFFFFFF


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


_GOLDEN, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(z: Array, n: int) -> Array:
    """To the right, with zeros coming in."""
    return (z >> n) & (2 ** (64 - n) - 1)


def splitmix64(z: Array) -> Array:
    """One step of the generator of that name from the state z."""
    z = z + _GOLDEN
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def lowbias32(v: Array) -> Array:
    """32 bits mixed, of v from 0 to 2**32 - 1."""
    v = ((v ^ (v >> 16)) * 0x7FEB352D) & _WORD
    v = ((v ^ (v >> 15)) * 0x846CA68B) & _WORD
    return v ^ (v >> 16)


def happens(seed: Array, kind: Mask, direction: int, times: Array, rows: Array, units: Array, p: float) -> Array:
    """Whether the event of probability p happens to each unit: bool [..., B, H].

    Args:
        seed: int64 [1].
        kind: of which mask.
        direction: 0, or 1 for the second of two.
        times: int64 [..., B], or [1].
        rows: int64 [B].
        units: int64 [H].
        p: from 0 to 1.
    """
    key = splitmix64(splitmix64(splitmix64(seed + int(kind)) ^ (2 * times + direction)) ^ rows)[..., None]
    return lowbias32(lowbias32((units + (key & _WORD)) & _WORD) ^ _shifted(key, 32)) < int(p * 2**32)
