"""`python tests/numpy_threads.py`: many Python threads on NumPy arrays at once, which share the pool of the core.

Without torch, whose threads ThreadSanitizer would not see into: CI runs it under that as well.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np

import lstm_ext
from lstm_ext import _native
from lstm_ext.call import BOTH
from lstm_ext.engines import cpu
from lstm_ext.testing import Case, assert_identical, make_inputs, run_layer

CASES = (
    Case(20, 12, 33, 65),  # large enough for the pool
    Case(9, 7, 5, 33, lengths="with_zero", resets=True, directions=BOTH),
    Case(6, 9, 17, 33, P=7, packed=True, directions=BOTH),
    Case(1, 1, 8, 8),
)
NUM_THREADS, TURNS = 16, 12


def run(case: Case, num_threads: int) -> dict[str, Any]:
    outputs, gradients = run_layer(_native.C, make_inputs(case, "float32"), num_threads)
    return outputs | gradients


def main() -> None:
    expected, errors = [run(case, 1) for case in CASES], []
    start = threading.Barrier(NUM_THREADS)

    def work(n: int) -> None:
        try:
            start.wait()
            for turn in range(TURNS):
                which = (n + turn) % len(CASES)
                assert_identical(run(CASES[which], 1 + (n + turn) % 5), expected[which])
                lstm_ext.plan(3 + turn, 2, 8, device="cpu")
                with cpu.use_plan(by_rows=True) if n == 0 else lstm_ext.use_backend("cpu"):
                    x, w = np.ones((2, 1, 1), np.float32), np.ones((4, 1), np.float32)
                    lstm_ext.lstm(x, None, w, w)
        except BaseException as error:
            errors.append(error)

    # Twice, as threads of the second round are new ones
    for _ in range(2):
        threads = [threading.Thread(target=work, args=(n,)) for n in range(NUM_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "torch" not in sys.modules
    if errors:
        raise errors[0]


if __name__ == "__main__":
    main()
