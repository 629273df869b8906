"""Seven steps from NumPy to tiles: each is checked against float64, then timed.

    python examples/ladder/run.py                     # needs NumPy and a C++20 compiler; CXX names it
    python examples/ladder/run.py --shape 50 1 64 128

GFLOP/s count the two products alone, 2 T B 4H (I + H), so that they can be held against what a core can multiply.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import runpy
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lstm_ext
from lstm_ext import testing

Lstm = Callable[..., Any]
STEPS = sorted(Path(__file__).parent.glob("step*"))


def load(step: Path, folder: Path) -> Lstm:
    """The function `lstm` of a file, compiled into `folder` if it is C++."""
    if step.suffix == ".py":
        return runpy.run_path(str(step))["lstm"]
    library = folder / f"{step.stem}.so"
    flags = ["-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, str(step), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).lstm

    def lstm(x: Any, w_ih: Any, w_hh: Any, bias: Any) -> Any:
        T, B, inputs = x.shape
        y = np.empty((T, B, w_hh.shape[1]), np.float32)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, w_ih, w_hh, bias, y)]
        function(*map(ctypes.c_long, (T, B, inputs, w_hh.shape[1])), *pointers)
        return y

    return lstm


def draw(T: int, B: int, inputs: int, H: int) -> list[Any]:
    """x, w_ih, w_hh, bias."""
    rng = np.random.default_rng(0)
    shapes = [(T, B, inputs), (4 * H, inputs), (4 * H, H), (4 * H,)]
    return [rng.uniform(-1, 1, shape).astype(np.float32) / (1 if len(shape) == 3 else H**0.5) for shape in shapes]


def check(lstm: Lstm, arrays: Sequence[Any]) -> None:
    """Holds y against the float64 reference, at the tolerance of our own kernels."""
    x, w_ih, w_hh, bias = (a.astype(np.float64) for a in arrays)
    with lstm_ext.use_backend("numpy"):
        expected = lstm_ext.lstm(x, None, w_ih, w_hh, bias, np.zeros_like(bias))[0]
    testing.assert_close(lstm(*arrays), expected, "float32", terms=x.shape[2] + w_hh.shape[1], name="y")


def ours(x: Any, w_ih: Any, w_hh: Any, bias: Any) -> Any:
    return lstm_ext.lstm(x, None, w_ih, w_hh, bias, np.zeros_like(bias))[0]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=4, default=[20, 24, 128, 256], metavar=("T", "B", "I", "H"))
    parser.add_argument("--rounds", type=int, default=10, help="each step runs so often, in turns; default: 10")
    arguments = parser.parse_args(argv)
    T, B, inputs, H = arguments.shape
    arrays = draw(T, B, inputs, H)
    with tempfile.TemporaryDirectory() as folder:
        steps = {step.name: load(step, Path(folder)) for step in STEPS} | {"lstm_ext.lstm": ours}
        for lstm in steps.values():
            check(lstm, arrays)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(arguments.rounds):
            for name, lstm in steps.items():
                start = time.perf_counter()
                lstm(*arrays)
                seconds[name].append(time.perf_counter() - start)
    print(f"T = {T}, B = {B}, I = {inputs}, H = {H}; the least of {arguments.rounds} times")
    print("step                      ms   GFLOP/s")
    rates = {name: 2 * T * B * 4 * H * (inputs + H) / min(times) / 1e9 for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:20} {1e3 * min(seconds[name]):7.2f} {rate:9.1f}")
    return rates


if __name__ == "__main__":
    main()
