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
from lstm_ext.call import BOTH, FORWARD, LayerCall
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


def frozen_stack() -> Any:
    """A call, with so many threads, of layers that work at the same time on different steps where there are several."""
    rng = np.random.default_rng(0)
    shapes = [((160, width), (160, 40), (160,), (160,)) for width in (7, 40, 40)]
    layers = [([rng.normal(0, 0.2, shape).astype(np.float32) for shape in each], [], None) for each in shapes]
    stack = _native.C.Frozen(layers, FORWARD, "float32", "plain")
    x, state = rng.normal(size=(120, 2, 7)).astype(np.float32), np.ones((3, 2, 40), np.float32)
    call = LayerCall(x, state, state, (), None, None, None, FORWARD, False)
    assert "beside other layers" in stack.plans(120, 2, 2)[0]["why"]["threads"]
    return lambda num_threads: dict(zip(("y", "h_n", "c_n"), stack.run(call, num_threads), strict=True))


def main() -> None:
    expected, errors = [run(case, 1) for case in CASES], []
    stack = frozen_stack()
    expected_of_stack = stack(1)
    start = threading.Barrier(NUM_THREADS)

    def work(n: int) -> None:
        try:
            start.wait()
            for turn in range(TURNS):
                which = (n + turn) % len(CASES)
                assert_identical(run(CASES[which], 1 + (n + turn) % 5), expected[which])
                assert_identical(stack(2 + (n + turn) % 3), expected_of_stack)
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
