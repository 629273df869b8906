"""The LSTM node of ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..call import CellWeights, Weights
from ..walk import Array
from .arrays import AnyWeights, Layers, copy_layer, read, reorder


def _text(value: Any) -> Any:
    """Strings come from protocol buffers as bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _check_onnx_attributes(attributes: Mapping[str, Any], hidden_size: int, num_directions: int) -> None:
    allowed: dict[str, list[Any]] = {
        "hidden_size": [hidden_size],
        "direction": ["bidirectional"] if num_directions == 2 else ["forward", "reverse"],
        "activations": [["Sigmoid", "Tanh", "Tanh"] * num_directions],
        "input_forget": [0],
        "layout": [0, 1],
    }
    if not isinstance(attributes, Mapping):
        raise TypeError(f"attributes: expected a mapping from names to values, got {type(attributes).__name__}")
    for name, value in attributes.items():
        got = [_text(each) for each in value] if isinstance(value, (list, tuple)) else _text(value)
        if name not in allowed:
            raise ValueError(f"attribute {name}: expected none, as it has no counterpart here, got {got}")
        if got not in allowed[name]:
            raise ValueError(f"attribute {name}: expected {' or '.join(map(str, allowed[name]))}, got {got}")


def from_onnx(inputs: Mapping[str, Any], attributes: Mapping[str, Any] | None = None) -> tuple[AnyWeights, ...]:
    """From the inputs of an ONNX `LSTM` node.

    Gates in the order i, o, f, c (c is torch's g), and both biases, one after the other; the forget bias is part of
    them. initial_h and initial_c [D, B, H] are torch's h_0 and c_0 (with layout=1 [B, D, H]), a state is (h, c).

    Args:
        inputs: W [D, 4H, I], R [D, 4H, H] and perhaps B [D, 8H], D directions; with peepholes P [D, 3H] of i, o and f,
            of which the results have `peephole`.
        attributes: those of the node by name, to refuse what has no counterpart here: clipping, other activations,
            a coupled input and forget gate. None if the node has no such.

    Returns:
        (forward,) or (forward, backward). The one of a node with direction="reverse" goes with `lstm(…, reverse=True)`.

    Source: https://onnx.ai/onnx/operators/onnx__LSTM.html

    Example:
        >>> inputs = convert.to_onnx(convert.Weights(np.ones((16, 3)), np.ones((16, 4))))
        >>> {name: a.shape for name, a in inputs.items()}, len(convert.from_onnx(inputs))
        ({'W': (1, 16, 3), 'R': (1, 16, 4)}, 1)
    """
    arrays = read(inputs, {"R": "D 4H H", "W": "D 4H I", "B": "D 8H", "P": "D 3H"}, optional={"B", "P"})
    D, _, H = arrays["R"].shape
    if D not in (1, 2):
        raise ValueError(f"R: expected shape [D, 4H, H] with D = 1 or 2, got {list(arrays['R'].shape)}")
    if attributes is not None:
        _check_onnx_attributes(attributes, H, D)
    layer: list[AnyWeights] = []
    for d in range(D):
        biases = np.split(arrays["B"][d], 2) if "B" in arrays else []
        w_ih, w_hh, *both = (reorder(a, "iofg") for a in (arrays["W"][d], arrays["R"][d], *biases))
        b_ih, b_hh = both or (None, None)
        weights = w_ih, w_hh, b_ih, b_hh
        if "P" in arrays:
            i, o, f = np.split(arrays["P"][d], 3)
            layer.append(CellWeights(*weights, peephole=np.stack([i, f, o])))
        else:
            layer.append(Weights(*weights))
    return tuple(layer)


def to_onnx(layer: Layers) -> dict[str, Array]:
    """To the inputs W, R and B, and with peepholes P, of an ONNX `LSTM` node; see `from_onnx`.

    The node's attribute hidden_size is `R.shape[2]`, its direction "bidirectional" for two.

    Args:
        layer: one direction or (forward, backward). Without biases there is no B, which is optional in ONNX.
    """
    own = copy_layer(layer, keeps={"peephole"})
    stacks = zip(*(w[:4] if w.b_ih is not None else w[:2] for w in own), strict=True)
    W, R, *biases = (np.stack([reorder(a, "ifgo", "iofg") for a in arrays]) for arrays in stacks)
    peepholes = [w.peephole[[0, 2, 1]].ravel() for w in own if len(w) > len(Weights._fields)]
    inputs = {"W": W, "R": R} | ({"B": np.concatenate(biases, axis=1)} if biases else {})
    return inputs | ({"P": np.stack(peepholes)} if peepholes else {})
