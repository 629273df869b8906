"""cuDNN's buffer of weights."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from ..call import Weights
from ..walk import Array
from .arrays import Layers, both_biases, copy_stack, to_array


def _cudnn_shapes(
    input_size: int, hidden_size: int, num_layers: int, num_directions: int
) -> dict[Any, tuple[int, ...]]:
    """(layer, direction, field) to shape, in the order of the buffer: all matrices, then all biases."""
    H = hidden_size
    shapes: dict[Any, tuple[int, ...]] = {}
    for fields in (("w_ih", "w_hh"), ("b_ih", "b_hh")):
        for n in range(num_layers):
            inputs = input_size if n == 0 else num_directions * H
            own = {"w_ih": (4 * H, inputs), "w_hh": (4 * H, H), "b_ih": (4 * H,), "b_hh": (4 * H,)}
            shapes |= {(n, d, field): own[field] for d in range(num_directions) for field in fields}
    return shapes


def from_cudnn(
    weights: Any, input_size: int, hidden_size: int, num_layers: int = 1, bidirectional: bool = False
) -> list[tuple[Weights, ...]]:
    """From cuDNN's flat buffer, as `jax.experimental.rnn` has it.

    The matrices of all layers come first, w_ih before w_hh, then the biases of all, b_ih before b_hh; within a layer
    the backward direction follows the forward one. Gates in the order i, f, g, o, in torch's layout, with both biases;
    the forget bias is part of them. States are h_0 and c_0 as torch's, [L * D, B, H].

    Args:
        weights: [N], N being `jax.experimental.rnn.get_num_params_in_lstm` of the other arguments.
        input_size, hidden_size, num_layers, bidirectional: as `LSTM` takes them.

    Returns:
        From the input up, (forward,) or (forward, backward) for each layer.

    Source: jax/experimental/rnn.py.

    Example:
        >>> flat = convert.to_cudnn(convert.Weights(np.ones((16, 3)), np.ones((16, 4))))
        >>> flat.shape, convert.from_cudnn(flat, 3, 4)[0][0].w_ih.shape
        ((144,), (16, 3))
    """
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name}: expected a positive integer, got {size!r}")
    num_directions = 2 if bidirectional else 1
    shapes = _cudnn_shapes(input_size, hidden_size, num_layers, num_directions)
    ends = np.cumsum([prod(shape) for shape in shapes.values()])
    flat = to_array("weights", weights)
    if flat.shape != (ends[-1],):
        given = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        raise ValueError(
            f"weights: expected shape [{ends[-1]}] with {given} and {num_directions} direction(s), "
            f"got {list(flat.shape)}"
        )
    pieces = zip(shapes.items(), np.split(flat, ends[:-1]), strict=True)
    arrays = {key: piece.reshape(shape).copy() for (key, shape), piece in pieces}
    return [
        tuple(Weights._make(arrays.get((n, d, field)) for field in Weights._fields) for d in range(num_directions))
        for n in range(num_layers)
    ]


def to_cudnn(layers: Layers) -> Array:
    """To cuDNN's flat buffer [N], as `jax.experimental.rnn` takes it (in float32); see `from_cudnn`.

    Args:
        layers: from the input up, all of them with or without a backward direction.
    """
    stack = copy_stack(layers)
    everything = [weights for layer in stack for weights in layer]
    matrices = [a for weights in everything for a in (weights.w_ih, weights.w_hh)]
    biases = [a for weights in everything for a in both_biases(weights)]
    return np.concatenate([a.ravel() for a in matrices + biases])
