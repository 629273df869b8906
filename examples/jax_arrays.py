"""A layer on JAX arrays: eager, inside `jax.jit`, and with the weights of a Flax cell.

Our kernels are not seen by JAX's tracing. Eagerly arrays are passed as they lie, by DLPack; inside of a jitted function
`jax.pure_callback` calls us when it runs. For gradients in JAX use JAX's own operations.

    pip install jax
    python examples/jax_arrays.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lstm_ext


def scan_lstm(x: Any, w_ih: Any, w_hh: Any) -> Any:
    """The same layer in JAX's own operations: x [T, B, I] → y [T, B, H]."""

    def step(state: Any, x_t: Any) -> Any:
        h, c = state
        i, f, g, o = jnp.split(x_t @ w_ih.T + h @ w_hh.T, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((x.shape[1], w_hh.shape[1]), x.dtype)
    return jax.lax.scan(step, (zeros, zeros), x)[1]


@jax.jit
def jitted(x: Any, w_ih: Any, w_hh: Any) -> Any:
    """Scales, runs our layer in the middle, and sums: one jitted function."""
    shape = jax.ShapeDtypeStruct((*x.shape[:2], w_hh.shape[1]), x.dtype)
    y = jax.pure_callback(
        lambda *arrays: lstm_ext.lstm(np.asarray(arrays[0]), None, *map(np.asarray, arrays[1:]))[0],
        shape,
        0.5 * x,
        w_ih,
        w_hh,
    )
    return y.sum(0)


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--units", type=int, default=64, help="default: 64")
    H = parser.parse_args(argv).units
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (50, 16, 28))
    w_ih, w_hh = 0.1 * jax.random.normal(keys[1], (4 * H, 28)), 0.1 * jax.random.normal(keys[2], (4 * H, H))

    y, (h_n, _) = lstm_ext.lstm(x, None, w_ih, w_hh)
    rows = [
        ("lstm on jax arrays", type(y).__module__.split(".")[0], jnp.abs(y - scan_lstm(x, w_ih, w_hh)).max()),
        ("h_n", type(h_n).__module__.split(".")[0], jnp.abs(h_n - y[-1]).max()),
        ("inside jax.jit", "jaxlib", jnp.abs(jitted(x, w_ih, w_hh) - scan_lstm(0.5 * x, w_ih, w_hh).sum(0)).max()),
    ]
    print("what                  gives an array of   largest difference from jax.lax.scan")
    for what, library, difference in rows:
        print(f"{what:21} {library:19} {float(difference):.1e}")
    return max(float(difference) for *_, difference in rows)


if __name__ == "__main__":
    main()
