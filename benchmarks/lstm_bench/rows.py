"""The rows of a result, and the JSON file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import exp, log
from pathlib import Path
from typing import Any

from .cases import Case, case_from

OURS, BASE, FROZEN = "lstm_ext", "torch", "lstm_ext-frozen"
LOOPS = ("torch-loop", "torch-loop-compiled")
UNSTEADY = 0.2  # quartiles further apart than this share of the median


@dataclass
class Row:
    """The times of a case: median and interquartile range [µs] by arm, of the arms that ran and were right."""

    case: Case
    us: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    floor_us: float | None = None
    errors: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, dict[str, int]] = field(default_factory=dict)  # on a GPU: launches of each in one call, by arm
    deviations: dict[str, dict[str, float]] = field(default_factory=dict)  # `oracle.deviations`, by arm
    plans: dict[str, dict[str, Any]] = field(default_factory=dict)  # `Arm.plan`, of those that have one
    latency: dict[str, dict[str, float]] = field(default_factory=dict)  # `timing.time_each`, by arm
    active: float = 1.0  # the share of all B * T steps that the case takes

    def unsteady(self, arm: str) -> bool:
        """Whether the arm's times differ so much that their median says little."""
        return self.spread[arm] > UNSTEADY * self.us[arm]

    @property
    def ratio(self) -> float | None:
        """How many times as long as ours torch takes."""
        return self.us[BASE] / self.us[OURS] if {OURS, BASE} <= self.us.keys() else None

    @property
    def floor_share(self) -> float | None:
        """The floor as a share of our time."""
        return self.floor_us / self.us[OURS] if self.floor_us is not None and OURS in self.us else None

    @property
    def error(self) -> str | None:
        """What went wrong, arm by arm."""
        return "; ".join(f"{arm}: {text}" for arm, text in self.errors.items()) or None

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self.case),
            "us": self.us,
            "spread": self.spread,
            "ratio": self.ratio,
            "floor_us": self.floor_us,
            "error": self.error,
            "errors": self.errors,
            "skipped": self.skipped,
            "kernels": self.kernels,
            "deviations": self.deviations,
            "plans": self.plans,
            "latency": self.latency,
        }


def is_peer(arm: str) -> bool:
    """Whether it is another implementation that computes with the weights as they are."""
    return not arm.startswith(OURS) and not arm.endswith("-int8")


def save(path: Path, meta: dict[str, Any], rows: Iterable[Row]) -> None:
    """One line a row, so that two files can be compared by eye; the file is there whole, or as it was."""
    lines = ",\n".join("  " + json.dumps(row.to_json()) for row in rows)
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(f'{{\n"meta": {json.dumps(meta, indent=2)},\n"rows": [\n{lines}\n]\n}}\n')
    unfinished.replace(path)


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """(meta, rows) of a file that `save` wrote.

    Raises:
        ValueError: it cannot be read, or something else has written it.
    """
    names = ("us", "spread", "floor_us", "errors", "skipped", "kernels", "deviations", "plans", "latency")
    try:
        content = json.loads(path.read_text())
        return content["meta"], [
            Row(case_from(row), **{name: row[name] for name in names if name in row}) for row in content["rows"]
        ]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a result of benchmarks/run.py --json") from error


def geomean(values: Iterable[float]) -> float:
    logs = [log(value) for value in values]
    return exp(sum(logs) / len(logs))
