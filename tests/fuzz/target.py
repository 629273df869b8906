"""What a case is: an entry point, its arguments, and what it should give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lstm_ext.testing import Case, assert_all_close

Named = dict[str, Any]
Results = tuple[Named, Named]  # outputs and gradients, by the names of the oracle

# What a wrong call may raise.
DOCUMENTED = (TypeError, ValueError, RuntimeError, MemoryError)


@dataclass
class Target:
    """One entry point: its arguments by name, how it is called with them, and what it should give."""

    named: Named
    call: Callable[[Named], Results]
    oracle: Callable[[], Results]
    compare: Callable[[Results, Results], None]  # raises AssertionError
    errors: tuple[type[Exception], ...] = DOCUMENTED
    whole: str = "state"  # an argument that stands for several of those, if it is given
    written: tuple[str, ...] = ()  # arguments that the call may write to


def within(case: Case, dtype: str) -> Callable[[Results, Results], None]:
    """As far from the oracle as TOLERANCES allow."""

    def compare(actual: Results, expected: Results) -> None:
        # shapes drawn at random: see TOLERANCES
        assert_all_close(actual, expected, case, dtype, gradient_magnitude=3.0)

    return compare
