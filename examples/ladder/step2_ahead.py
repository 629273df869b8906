"""Step 2: only W_hh h has to wait for the step before; x W_ih' of all steps is one large product, made ahead."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]


def sigmoid_(v: Array) -> Array:
    """In place, as each new array costs a pass through memory."""
    np.negative(v, out=v)
    np.exp(v, out=v)
    v += 1
    return np.reciprocal(v, out=v)


def lstm(x: Array, w_ih: Array, w_hh: Array, bias: Array) -> Array:
    """x [T, B, I], w_ih [4H, I], w_hh [4H, H], bias [4H], the gates in the order i, f, g, o → y [T, B, H]."""
    T, B, inputs = x.shape
    H = w_hh.shape[1]
    gates = (x.reshape(T * B, inputs) @ w_ih.T).reshape(T, B, 4 * H)
    gates += bias
    y = np.empty((T, B, H), np.float32)
    h, c = np.zeros((2, B, H), np.float32)
    for t in range(T):
        gates[t] += h @ w_hh.T
        i_and_f, g, o = sigmoid_(gates[t, :, : 2 * H]), gates[t, :, 2 * H : 3 * H], gates[t, :, 3 * H :]
        c *= i_and_f[:, H:]
        c += i_and_f[:, :H] * np.tanh(g, out=g)
        h = np.multiply(sigmoid_(o), np.tanh(c), out=y[t])
    return y
