"""Times that were measured on a GPU, in the place of the cost model: `tuning.py` writes them, the core plans by them.

Those of a device are handed to the core once: from the file that LSTM_EXT_TIMES names, else from what `tune` has kept
for this GPU, driver and build, else from those for this model of GPU that come with the package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from . import _native, gpu_files
from ._version import __version__
from ._warnings import warn_once

VARIABLE = "LSTM_EXT_TIMES"
SHIPPED = Path(__file__).with_name("gpu_times")


class Times(NamedTuple):
    """What one pass over one shape takes.

    Attributes:
        dtype: of the layer.
        tf32: whether float32 is multiplied as TF32.
        num_directions: 1 or 2.
        backward: the backward pass, or the forward one.
        T: steps.
        B: sequences.
        H: units.
        P: width of a projection, 0 for none.
        date: when it was measured.
        microseconds: of one step of the whole batch, by strategy.
    """

    dtype: str
    tf32: bool
    num_directions: int
    backward: bool
    T: int
    B: int
    H: int
    P: int
    date: str
    microseconds: dict[str, float]


def content_of(table: Iterable[Times], device: int) -> dict[str, Any]:
    """A file of them."""
    return {"about": gpu_files.identity(device), "times": [row._asdict() for row in table]}


def path_of(device: int) -> Path:
    """Where `tune` keeps those of a device."""
    return gpu_files.path_of("times", gpu_files.identity(device))


def read(path: Path) -> tuple[dict[str, Any], list[Times]]:
    """What a file is about, and what it says. Raises OSError or ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        table = [Times(**row) for row in content["times"]]
        for row in table:
            _check(row)
        return dict(content["about"]), table
    except (TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _check(row: Times) -> None:
    kinds = (str, bool, int, bool, int, int, int, int, str, dict)
    right = all(type(value) is kind for value, kind in zip(row, kinds, strict=True))
    sizes = (row.num_directions, row.T, row.B, row.H) if right else (0,)
    right = right and min(sizes) > 0 and row.P >= 0 and max(*sizes, row.P) < 2**31
    if not right or not all(isinstance(us, float) and 0 < us < 1e12 for us in row.microseconds.values()):
        raise ValueError(f"a row that no table has: {row}")


def _is_about(about: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(about.get(name) == value for name, value in wanted.items())


def _from(path: Path, wanted: dict[str, Any]) -> list[Times] | None:
    """The table of a file that is about what is wanted; None, and a warning that names it, for another."""
    try:
        about, table = read(path)
        if _is_about(about, wanted):
            return table
        why = f"it is about {about}, not {wanted}"
    except (OSError, ValueError) as error:
        why = str(error)
    warn_once(f"lstm_ext does not use the measured times in {path}: {why}")
    return None


def table_of(device: int) -> list[Times]:
    """The times that count on a device."""
    about = gpu_files.identity(device)
    if named := os.environ.get(VARIABLE):
        return _from(Path(named), about) or []
    if (path := path_of(device)).exists() and (table := _from(path, about)) is not None:
        return table
    model = {name: about[name] for name in ("name", "compute_capability", "sms")} | {"lstm_ext": __version__}
    for path in sorted(SHIPPED.glob("*.json")):
        try:
            shipped, table = read(path)
        except (OSError, ValueError) as error:
            warn_once(f"lstm_ext does not use the measured times in {path}: {error}")
            continue
        if _is_about(shipped, model):
            return table
    return []


@cache
def hand_over(device: int) -> None:
    """Lets the core plan by them, from the first call for a device on."""
    if table := table_of(device):
        take(device, table)


def take(device: int, table: Iterable[Times]) -> None:
    """Lets the core plan by these. Strategies that this version does not know are left out."""
    known = ("block", "cluster", "grid", "step")
    rows = [row._replace(microseconds={s: us for s, us in row.microseconds.items() if s in known}) for row in table]
    _native.C.cuda_set_measured(device, rows)
