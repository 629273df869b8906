"""What every direction of a layer in NumPy is made of: the order of its steps, the gates of an array, products."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Walk:
    """The order in which one direction visits its rows.

    Step s of a row of length n stands at time s, or at time n - 1 - s in reverse; past its length a row rests.
    """

    def __init__(self, num_steps: int, lengths: Array | None, resets: Array | None, reverse: bool):
        self.lengths = lengths
        self.reverse = reverse
        self.active = None if lengths is None else (np.arange(num_steps)[:, None] < lengths)[..., None]  # [T, B, 1]
        self.resets = None if resets is None else self.mask(self.order(resets)[..., None])  # [T, B, 1]

    def order(self, a: Array) -> Array:
        """From time order to step order, and back: a [T, B, ...]."""
        if not self.reverse:
            return a
        if self.lengths is None:
            return a[::-1]
        step, row = np.ogrid[: a.shape[0], : a.shape[1]]
        return a[np.where(step < self.lengths, self.lengths - 1 - step, step), row]

    def times(self, num_steps: int, num_rows: int) -> Array:
        """The time at which each row takes each step: [T, B]."""
        return self.order(np.broadcast_to(np.arange(num_steps)[:, None], (num_steps, num_rows)))

    def mask(self, a: Array) -> Array:
        """The sequence a [T, B, ...] with zeros past each length, whatever stood there."""
        return a if self.active is None else np.where(self.active, a, a.dtype.type(0))

    def forget(self, s: int | slice, state: Array) -> Array:
        """The state before step s, with zeros where a reset stands at the step."""
        return state if self.resets is None else np.where(self.resets[s], state.dtype.type(0), state)

    def advance(self, s: int, after: Array, before: Array) -> Array:
        """`after` in the rows that take step s, `before` in those that rest."""
        return after if self.active is None else np.where(self.active[s], after, before)


def linear(x: Array, weight: Array) -> Array:
    """The product x [T, B, K] @ weight [N, K].T, taken at once."""
    T, B, K = x.shape
    product: Array = x.reshape(T * B, K) @ weight.T
    return product.reshape(T, B, weight.shape[0])


def outer_sum(a: Array, b: Array) -> Array:
    """The sum over time and batch of the outer products of a [T, B, M] and b [T, B, N]."""
    rows = a.shape[0] * a.shape[1]
    total: Array = a.reshape(rows, a.shape[2]).T @ b.reshape(rows, b.shape[2])
    return total


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), exact at both infinities."""
    result: Array = -x  # a new array: NumPy 2.4 negates a float32 column in place wrongly
    with np.errstate(over="ignore", under="ignore"):  # where exp(-x) is inf or 0, the sigmoid is 0 or 1
        np.exp(result, out=result)
    result += 1
    return np.divide(1, result, out=result)


def split_gates(gates: Array) -> tuple[Array, Array, Array, Array]:
    """The views i, f, g, o [..., H] of gates [..., 4H]."""
    H = gates.shape[-1] // 4
    return gates[..., :H], gates[..., H : 2 * H], gates[..., 2 * H : 3 * H], gates[..., 3 * H :]
