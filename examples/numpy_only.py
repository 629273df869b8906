"""Forecasts a chaotic series with NumPy alone: no torch, no training loop.

An LSTM with random weights keeps an echo of what it has read; a readout from h to the next value is found by least
squares, in one step (an echo state network, with LSTM cells). Then the series runs by itself, a cell at a time.

    python examples/numpy_only.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import lstm_ext

Array = np.ndarray[Any, np.dtype[Any]]


def mackey_glass(steps: int) -> Array:
    """A series that never repeats: its growth depends on what it was 17 steps ago. [T]"""
    values = [1.2] * 18
    for _ in range(steps + 1000):  # the first thousand find the way from the constant start
        delayed = values[-18]
        values.append(0.9 * values[-1] + 0.2 * delayed / (1 + delayed**10))
    return np.asarray(values[1018:], np.float32) - 0.9


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--units", type=int, default=256, help="default: 256")
    parser.add_argument("--steps", type=int, default=4000, help="of the series to learn from; default: 4000")
    arguments = parser.parse_args(argv)
    H, T = arguments.units, arguments.steps
    rng = np.random.default_rng(0)
    w_ih = rng.normal(0, 1.0, (4 * H, 1)).astype(np.float32)
    w_hh = rng.normal(0, 1.5 / np.sqrt(H), (4 * H, H)).astype(np.float32)

    series = mackey_glass(T + 60)
    seen = series[:T] + 1e-3 * rng.standard_normal(T, dtype=np.float32)  # noise teaches to come back to the series
    h, (h_n, c_n) = lstm_ext.lstm(seen[:, None, None], None, w_ih, w_hh)  # h [T, 1, H]

    def features(h: Array, value: Array) -> Array:
        return np.hstack([h, value, np.ones_like(value)], dtype=np.float64)

    known = features(h[200:-1, 0], seen[200:-1, None])  # the first steps know too little of the past
    readout = np.linalg.solve(known.T @ known + 1e-5 * np.eye(H + 2), known.T @ series[201:T])

    value, state, forecast = series[T - 1 : T, None], (h_n, c_n), []
    for _ in range(60):
        value = (features(state[0], value) @ readout).astype(np.float32)[:, None]
        forecast.append(value.item())
        state = lstm_ext.lstm_cell(value, state, w_ih, w_hh)

    errors = np.abs(np.asarray(forecast) - series[T:]) / series.std()
    print("steps ahead   forecast     truth   error / deviation")
    for n in (0, 4, 9, 19, 39, 59):
        print(f"{n + 1:11} {forecast[n]:10.3f} {series[T + n]:9.3f} {errors[n]:19.3f}")
    assert "torch" not in sys.modules
    return float(errors[:10].max())


if __name__ == "__main__":
    main()
