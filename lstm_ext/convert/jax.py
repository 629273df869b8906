"""Flax and Equinox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..call import Weights
from ..walk import Array, split_gates
from .arrays import Layers, both_biases, copy_one, from_kernels, read, to_kernels

# Flax ----------------------------------------------------------------------------------------------------------------


_LINEN = ("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho")
_NNX = ("ii", "if_", "ig", "io"), ("hi", "hf", "hg", "ho")


def _flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """{"ii": {"kernel": a}} as {"ii/kernel": a}."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params: expected a mapping from names to mappings, got {type(params).__name__}")
    flat: dict[str, Any] = {}
    for module, own in params.items():
        flat |= {f"{module}/{name}": a for name, a in own.items()} if isinstance(own, Mapping) else {module: own}
    return flat


def _from_gates(flat: Mapping[str, Any], inputs: Sequence[str], hiddens: Sequence[str]) -> Weights:
    """From the dense modules of x, without a bias, and of h, one for each gate."""
    shapes = {f"{name}/kernel": "H H" for name in hiddens} | {f"{name}/bias": "H" for name in hiddens}
    arrays = read(flat, shapes | {f"{name}/kernel": "I H" for name in inputs})
    kernel, recurrent_kernel = (
        np.concatenate([arrays[f"{name}/kernel"] for name in names], axis=1) for names in (inputs, hiddens)
    )
    return from_kernels(kernel, recurrent_kernel, np.concatenate([arrays[f"{name}/bias"] for name in hiddens]))


def _to_gates(weights: Weights, inputs: Sequence[str], hiddens: Sequence[str]) -> dict[str, dict[str, Array]]:
    kernel, recurrent_kernel, bias = to_kernels(weights)
    tree = {name: {"kernel": a.copy()} for name, a in zip(inputs, split_gates(kernel), strict=True)}
    for name, a, b in zip(hiddens, split_gates(recurrent_kernel), split_gates(bias), strict=True):
        tree[name] = {"kernel": a.copy(), "bias": b.copy()}
    return tree


def from_linen(params: Mapping[str, Any]) -> Weights:
    """From the parameters of Flax linen's `OptimizedLSTMCell` or `LSTMCell`, which are the same.

    The one bias is that of h, zeros at the start, and the forget bias is part of it. The carry is (c, h), c first.

    Args:
        params: {"ii": {"kernel" [I, H]}, "if", "ig", "io", "hi": {"kernel" [H, H], "bias" [H]}, "hf", "hg", "ho"},
            a module for each gate, of x (i…) and of h (h…): `variables["params"]` of a cell.

    Source: flax/linen/recurrent.py.

    Example:
        >>> params = convert.to_linen(convert.Weights(np.ones((16, 3)), np.ones((16, 4))))
        >>> params["ii"]["kernel"].shape, params["hi"]["bias"].shape, convert.from_linen(params).w_ih.shape
        ((3, 4), (4,), (16, 3))
    """
    return _from_gates(_flatten(params), *_LINEN)


def to_linen(weights: Layers) -> dict[str, dict[str, Array]]:
    """To the parameters of Flax linen's `OptimizedLSTMCell` or `LSTMCell`; see `from_linen`.

    Args:
        weights: one direction; `cell.apply({"params": to_linen(weights)}, carry, x)` runs it.
    """
    return _to_gates(copy_one(weights), *_LINEN)


def from_nnx(params: Mapping[str, Any]) -> Weights:
    """From the parameters of Flax NNX's `OptimizedLSTMCell` or `LSTMCell`.

    The first keeps the gates of x, and of h, side by side in the order i, f, g, o, the second a module for each gate.
    The one bias is that of h, zeros at the start, and the forget bias is part of it. The carry is (c, h), c first.

    Args:
        params: {"dense_i": {"kernel" [I, 4H]}, "dense_h": {"kernel" [H, 4H], "bias" [4H]}}, or as `from_linen` has it
            with "if_" for "if": `nnx.state(cell, nnx.Param)` or `nnx.to_pure_dict` of it.

    Source: flax/nnx/nn/recurrent.py.

    Example:
        >>> params = convert.to_nnx(convert.Weights(np.ones((16, 3)), np.ones((16, 4))))
        >>> params["dense_i"]["kernel"].shape, convert.from_nnx(params).w_ih.shape
        ((3, 16), (16, 3))
    """
    flat = _flatten(params)
    if not any(name.startswith("dense_") for name in flat):
        return _from_gates(flat, *_NNX)
    arrays = read(flat, {"dense_h/kernel": "H 4H", "dense_h/bias": "4H", "dense_i/kernel": "I 4H"})
    return from_kernels(arrays["dense_i/kernel"], arrays["dense_h/kernel"], arrays["dense_h/bias"])


def to_nnx(weights: Layers, *, optimized: bool = True) -> dict[str, dict[str, Array]]:
    """To the parameters of Flax NNX's `OptimizedLSTMCell`, or of its `LSTMCell`; see `from_nnx`.

    Args:
        weights: one direction; `nnx.update(cell, to_nnx(weights))` loads it.
        optimized: whether for `OptimizedLSTMCell`.
    """
    own = copy_one(weights)
    if not optimized:
        return _to_gates(own, *_NNX)
    kernel, recurrent_kernel, bias = to_kernels(own)
    return {"dense_i": {"kernel": kernel}, "dense_h": {"kernel": recurrent_kernel, "bias": bias}}


# Equinox -------------------------------------------------------------------------------------------------------------


def from_equinox(params: Mapping[str, Any]) -> Weights:
    """From the arrays of Equinox's `nn.LSTMCell`.

    Gates in the order i, f, g, o, in torch's layout, with one bias; the forget bias is part of it. The state is (h, c).

    Args:
        params: weight_ih [4H, I], weight_hh [4H, H] and bias [4H] (None with `use_bias=False`): the attributes of the
            cell by name.

    Source: equinox/nn/_rnn.py.

    Example:
        >>> params = convert.to_equinox(convert.Weights(np.ones((16, 3)), np.ones((16, 4))))
        >>> params["weight_ih"].shape, params["bias"], convert.from_equinox(params).w_ih.shape
        ((16, 3), None, (16, 3))
    """
    arrays = read(params, {"weight_hh": "4H H", "weight_ih": "4H I", "bias": "4H"}, optional={"bias"})
    bias = arrays.get("bias")
    return Weights(arrays["weight_ih"], arrays["weight_hh"], bias, None if bias is None else np.zeros_like(bias))


def to_equinox(weights: Layers) -> dict[str, Array | None]:
    """To the attributes of Equinox's `nn.LSTMCell`, to be put in with `eqx.tree_at`; see `from_equinox`.

    Args:
        weights: one direction; without biases for a cell with `use_bias=False`, whose bias is None.
    """
    own = copy_one(weights)
    bias = None if own.b_ih is None else np.add(*both_biases(own))
    return {"weight_ih": own.w_ih, "weight_hh": own.w_hh, "bias": bias}
