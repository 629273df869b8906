"""Weights and inputs for the tests of `lstm_ext.convert`, and what our LSTM makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

import lstm_ext
from lstm_ext import convert
from lstm_ext.convert import Weights
from lstm_ext.reference import Array, split_gates
from lstm_ext.testing import assert_close

torch = pytest.importorskip("torch")

T, B, I, H, P = 5, 3, 3, 4, 2  # noqa: E741
FORGET_BIASES = (0.0, 1.0, 0.7)

Stack = list[tuple[Weights, ...]]


def draw(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> Array:
    return rng.uniform(-0.7, 0.7, shape).astype(dtype)


def draw_weights(
    rng: np.random.Generator,
    inputs: int = I,
    *,
    forget_bias: float = 0.0,
    biases: int = 1,
    projected: bool = False,
    dtype: str = "float32",
) -> Weights:
    """With no bias, with one beside zeros, or with two; the forget bias in b_ih."""
    width = P if projected else H
    w_ih, w_hh = draw(rng, 4 * H, inputs, dtype=dtype), draw(rng, 4 * H, width, dtype=dtype)
    w_hr = draw(rng, P, H, dtype=dtype) if projected else None
    if not biases:
        return Weights(w_ih, w_hh, None, None, w_hr)
    b_ih = draw(rng, 4 * H, dtype=dtype)
    split_gates(b_ih)[1][:] += forget_bias
    return Weights(w_ih, w_hh, b_ih, draw(rng, 4 * H, dtype=dtype) if biases == 2 else np.zeros_like(b_ih), w_hr)


def draw_stack(
    rng: np.random.Generator, num_layers: int, num_directions: int, *, biases: int = 2, projected: bool = False
) -> Stack:
    width = num_directions * (P if projected else H)
    return [
        tuple(
            draw_weights(rng, I if n == 0 else width, forget_bias=0.7, biases=biases, projected=projected)
            for _ in range(num_directions)
        )
        for n in range(num_layers)
    ]


def draw_inputs(
    rng: np.random.Generator, stack: Sequence[Sequence[Weights]], dtype: str = "float32"
) -> tuple[Array, Array, Array]:
    """x [T, B, I], h0 and c0 [L * D, B, ...]."""
    LD, first = len(stack) * len(stack[0]), stack[0][0]
    h0, c0 = draw(rng, LD, B, first.w_hh.shape[1], dtype=dtype), draw(rng, LD, B, len(first.w_hh) // 4, dtype=dtype)
    return draw(rng, T, B, first.w_ih.shape[1], dtype=dtype), h0, c0


def run_ours(stack: Sequence[Sequence[Weights]], x: Array, h0: Array, c0: Array) -> tuple[Array, Array, Array]:
    """(y, h_n, c_n) of our LSTM in float64, its weights loaded by `to_state_dict`."""
    first = stack[0][0]
    lstm = lstm_ext.LSTM(
        first.w_ih.shape[1],
        len(first.w_hh) // 4,
        len(stack),
        bias=first.b_ih is not None,
        bidirectional=len(stack[0]) == 2,
        proj_size=0 if first.w_hr is None else len(first.w_hr),
        dtype=torch.float64,
    )
    lstm.load_state_dict(convert.to_state_dict(stack))
    with torch.no_grad():
        x, h0, c0 = (torch.from_numpy(a.astype("float64")) for a in (x, h0, c0))
        y, (h_n, c_n) = lstm(x, (h0, c0))
    return y.numpy(), h_n.numpy(), c_n.numpy()


def assert_outputs(
    actual: Sequence[Any], stack: Sequence[Sequence[Weights]], inputs: Sequence[Array], dtype: str
) -> None:
    """(y, h_n, c_n) of a framework are those of our LSTM with the converted weights."""
    first = stack[0][0]
    terms = max(w.w_ih.shape[1] for layer in stack for w in layer) + first.w_hh.shape[1]
    for name, a, b in zip(("y", "h_n", "c_n"), actual, run_ours(stack, *inputs), strict=True):
        assert_close(np.asarray(a), b, dtype, terms=terms, name=name)


def leaves(tree: Any) -> dict[str, Any]:
    """The arrays of nested mappings and sequences by path."""
    if isinstance(tree, Mapping):
        return {f"{key}/{path}": a for key, each in tree.items() for path, a in leaves(each).items()}
    if isinstance(tree, (list, tuple)):
        return leaves(dict(enumerate(tree)))
    return {"": tree}


def assert_same(actual: Any, expected: Any) -> None:
    """The same structure, dtypes and values, bit for bit but for the sign of zeros."""
    actual, expected = leaves(actual), leaves(expected)
    assert set(actual) == set(expected)
    for path, a in actual.items():
        if a is None or expected[path] is None:
            assert a is expected[path], path
        else:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(expected[path]), err_msg=path, strict=True)
