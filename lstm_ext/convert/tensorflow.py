"""TensorFlow 1 and Keras."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..call import CellWeights, Weights
from ..walk import Array, split_gates
from .arrays import AnyWeights, Layers, both_biases, copy_layer, copy_one, from_kernels, read, to_kernels, transpose

# TensorFlow 1 --------------------------------------------------------------------------------------------------------

_PEEPHOLES = ("w_i_diag", "w_f_diag", "w_o_diag")  # TensorFlow's, in the order of `peephole`


def from_tensorflow(params: Mapping[str, Any], *, forget_bias: float) -> AnyWeights:
    """From the variables of TensorFlow 1's `BasicLSTMCell` or `LSTMCell`, which our `BasicLSTMCell` has as well.

    Gates in the order i, j, f, o (j is torch's g); the kernel's first I rows are for x, the others for h. The state is
    (c, h), c first. `LSTMBlockCell` and haste's LSTM for TensorFlow (with forget_bias=0) keep the same.

    Args:
        params: kernel [I + P, 4U], bias [4U] and, of an LSTMCell with `num_proj`, "projection/kernel" [U, P]: the
            names of the variables without their scope; with `use_peepholes` w_i_diag, w_f_diag and w_o_diag [U], which
            the result has as `peephole`.
        forget_bias: what the cell adds to f at run time, 1 unless it was made with another. It becomes b_hh, beside
            the cell's bias in b_ih.

    Source: tf_keras/src/layers/rnn/legacy_cells.py, which was tensorflow/python/ops/rnn_cell_impl.py.

    Example:
        >>> variables = {"kernel": np.ones((3 + 4, 16)), "bias": np.zeros(16)}  # input width 3, num_units 4
        >>> weights = convert.from_tensorflow(variables, forget_bias=1.0)
        >>> {name: a.shape for name, a in convert.to_tensorflow(weights, forget_bias=1.0).items()}
        {'kernel': (7, 16), 'bias': (16,)}
    """
    peepholes = dict.fromkeys(_PEEPHOLES, "U") if isinstance(params, Mapping) and _PEEPHOLES[0] in params else {}
    shapes = {"bias": "4U", "projection/kernel": "U P", "kernel": "I+P 4U", **peepholes}
    arrays = read(params, shapes, optional={"projection/kernel"})
    kernel, bias, projection = arrays["kernel"], arrays["bias"], arrays.get("projection/kernel")
    width = len(bias) // 4 if projection is None else projection.shape[1]
    rows = len(kernel) - width
    if rows < 0:
        raise ValueError(f"kernel: expected shape [I+P, 4U] with P = {width}, got {list(kernel.shape)}")
    weights = from_kernels(kernel[:rows], kernel[rows:], bias, "igfo")
    b_hh = np.zeros_like(bias)
    split_gates(b_hh)[1][:] = forget_bias
    weights = weights._replace(b_hh=b_hh, w_hr=None if projection is None else transpose(projection))
    return CellWeights(*weights, np.stack([arrays[name] for name in peepholes])) if peepholes else weights


def to_tensorflow(weights: Layers, *, forget_bias: float) -> dict[str, Array]:
    """To the variables of TensorFlow 1's `LSTMCell` and, without a projection, `BasicLSTMCell`; see `from_tensorflow`.

    Args:
        weights: one direction.
        forget_bias: what that cell will add to f at run time; it is taken off the bias.
    """
    own = copy_one(weights, projections=True, keeps={"peephole"})
    b_ih, b_hh = both_biases(own)
    split_gates(b_hh)[1][:] -= b_hh.dtype.type(forget_bias)  # before the sum: what from_tensorflow wrote leaves a zero
    kernel, recurrent_kernel, bias = to_kernels(own._replace(b_ih=b_ih, b_hh=b_hh), "igfo")
    params = {"kernel": np.concatenate([kernel, recurrent_kernel]), "bias": bias}
    if (peephole := getattr(own, "peephole", None)) is not None:
        params |= {name: a.copy() for name, a in zip(_PEEPHOLES, peephole, strict=True)}
    return params if own.w_hr is None else params | {"projection/kernel": transpose(own.w_hr)}


# Of LayerNormBasicLSTMCell: which variables our parameter is, one after the other.
_NORMS = {
    "gamma": ["input/gamma", "forget/gamma", "transform/gamma", "output/gamma"],
    "beta": ["input/beta", "forget/beta", "transform/beta", "output/beta"],
    "gamma_h": ["state/gamma"],
    "beta_h": ["state/beta"],
}


def _read_layer_norm(params: Mapping[str, Any], norms: Mapping[str, str]) -> dict[str, Array]:
    """The kernel, and the bias or arrays of these shapes."""
    shapes = {"bias": "4U"} if isinstance(params, Mapping) and "bias" in params else norms
    arrays = read(params, {**shapes, "kernel": "I+U 4U"})
    kernel = arrays.pop("kernel")
    if len(kernel) < (width := kernel.shape[1] // 4):
        raise ValueError(f"kernel: expected shape [I+U, 4U] with U = {width}, got {list(kernel.shape)}")
    return {"kernel": kernel, **arrays}


def from_tensorflow_layer_norm(params: Mapping[str, Any]) -> dict[str, Array]:
    """From the variables of TensorFlow 1's `LayerNormBasicLSTMCell` to the parameters of ours, as NumPy arrays.

    It normalises each gate's whole sum, as no other format does: `Weights` has no place for that.

    Args:
        params: kernel [I + U, 4U] and, from "input/gamma" to "state/beta", gamma and beta [U] of input, forget,
            transform, output and state: the names of the variables without their scope. Of a cell without `layer_norm`
            kernel and bias [4U].

    Source: tensorflow/contrib/rnn/python/ops/rnn_cell.py of TensorFlow 1.15.

    Example:
        >>> variables = convert.to_tensorflow_layer_norm(lstm_ext.LayerNormBasicLSTMCell(4, input_size=3).state_dict())
        >>> {name: a.shape for name, a in convert.from_tensorflow_layer_norm(variables).items()}
        {'kernel': (7, 16), 'gamma': (16,), 'beta': (16,), 'gamma_h': (4,), 'beta_h': (4,)}
    """
    arrays = _read_layer_norm(params, {part: "U" for parts in _NORMS.values() for part in parts})
    if "bias" in arrays:
        return arrays
    norms = {name: np.concatenate([arrays[part] for part in parts]) for name, parts in _NORMS.items()}
    return {"kernel": arrays["kernel"], **norms}


def to_tensorflow_layer_norm(params: Mapping[str, Any]) -> dict[str, Array]:
    """To the variables of TensorFlow 1's `LayerNormBasicLSTMCell`; see `from_tensorflow_layer_norm`.

    Args:
        params: the `state_dict` of our `LayerNormBasicLSTMCell`.
    """
    arrays = _read_layer_norm(params, {name: "4U" if len(parts) == 4 else "U" for name, parts in _NORMS.items()})
    if "bias" in arrays:
        return arrays
    split = {name: np.split(arrays[name], len(parts)) for name, parts in _NORMS.items()}
    variables = {part: a.copy() for name, parts in _NORMS.items() for part, a in zip(parts, split[name], strict=True)}
    return {"kernel": arrays["kernel"], **variables}


# Keras ---------------------------------------------------------------------------------------------------------------


def from_keras(weights: Sequence[Any]) -> tuple[Weights, ...]:
    """From `get_weights()` of Keras's `LSTM`, `LSTMCell` or `Bidirectional(LSTM)`.

    Gates in the order i, f, c, o (c is torch's g). The forget bias is part of the bias: `unit_forget_bias` lets it
    start at 1. The state is [h, c].

    Args:
        weights: kernel [I, 4U], recurrent_kernel [U, 4U] and, with `use_bias`, bias [4U]; of a Bidirectional, then the
            same of the backward layer.

    Returns:
        (forward,) or (forward, backward).

    Source: keras/src/layers/rnn/lstm.py and bidirectional.py.

    Example:
        >>> (forward,) = convert.from_keras([np.ones((3, 16)), np.ones((4, 16)), np.zeros(16)])  # layer.get_weights()
        >>> [a.shape for a in convert.to_keras(forward)]
        [(3, 16), (4, 16), (16,)]
    """
    if not isinstance(weights, Sequence) or len(weights) not in (2, 3, 4, 6):
        got = f"{len(weights)}" if isinstance(weights, Sequence) else type(weights).__name__
        raise ValueError(
            "weights: expected a list of 2 or 3 arrays (kernel, recurrent_kernel, perhaps bias), or of 4 or 6 for a "
            f"Bidirectional, got {got}"
        )
    shapes = {"recurrent_kernel": "U 4U", "kernel": "I 4U", "bias": "4U"}
    per_direction = 2 if len(weights) in (2, 4) else 3
    names = ["kernel", "recurrent_kernel", "bias"][:per_direction]
    prefixes = ["", "backward_"][: len(weights) // per_direction]
    arrays = read(
        dict(zip([prefix + name for prefix in prefixes for name in names], weights, strict=True)),
        {prefix + name: shapes[name] for prefix in prefixes for name in shapes if name in names},
    )
    return tuple(
        from_kernels(arrays[prefix + "kernel"], arrays[prefix + "recurrent_kernel"], arrays.get(prefix + "bias"))
        for prefix in prefixes
    )


def to_keras(layer: Layers) -> list[Array]:
    """To what `set_weights` of Keras's `LSTM`, `LSTMCell` or `Bidirectional(LSTM)` takes; see `from_keras`.

    Args:
        layer: one direction or (forward, backward); without biases for a Keras layer with `use_bias=False`.
    """
    arrays: list[Array] = []
    for weights in copy_layer(layer):
        kernel, recurrent_kernel, bias = to_kernels(weights)
        arrays += [kernel, recurrent_kernel, *([] if weights.b_ih is None else [bias])]
    return arrays
