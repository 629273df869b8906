"""Step 1: the formulas in NumPy, one time step after the other."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]


def sigmoid(v: Array) -> Array:
    return 1 / (1 + np.exp(-v))


def lstm(x: Array, w_ih: Array, w_hh: Array, bias: Array) -> Array:
    """x [T, B, I], w_ih [4H, I], w_hh [4H, H], bias [4H], the gates in the order i, f, g, o → y [T, B, H]."""
    T, B, _ = x.shape
    H = w_hh.shape[1]
    y = np.empty((T, B, H), np.float32)
    h, c = np.zeros((2, B, H), np.float32)
    for t in range(T):
        gates = x[t] @ w_ih.T + h @ w_hh.T + bias  # two small products at each step
        i, f, g, o = np.split(gates, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        y[t] = h = sigmoid(o) * np.tanh(c)
    return y
