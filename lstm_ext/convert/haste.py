"""haste."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..call import CellWeights, Weights
from ..walk import Array
from .arrays import EXTRA, AnyWeights, Layers, copy_one, from_kernels, read, reorder, to_kernels, transpose


def from_haste(params: Mapping[str, Any]) -> AnyWeights:
    """From the `state_dict` of haste's `LSTM` or `LayerNormLSTM` for PyTorch.

    For the variables of its LSTM for TensorFlow take `from_tensorflow`. Gates in the order i, g, f, o, and one bias.
    The forget bias, 1 at the start, is part of it. The state is (h, c).

    Args:
        params: kernel [I, 4H], recurrent_kernel [H, 4H], bias [4H]; of a LayerNormLSTM also gamma [2, 4H], gamma_h and
            beta_h [H], which the result then has too: the module is `LSTM(…, layer_norm=True)`.

    Source: haste 0.5.0rc0, haste_pytorch/lstm.py and layer_norm_lstm.py (frameworks/pytorch/lstm.py in its repository).

    Example:
        >>> params = convert.to_haste(convert.Weights(np.ones((16, 3)), np.ones((16, 4))))
        >>> params["kernel"].shape, convert.from_haste(params).w_ih.shape
        ((3, 16), (16, 3))
    """
    norms = {field: shape for field, shape in EXTRA.items() if field != "peephole"}
    norms = norms if isinstance(params, Mapping) and "gamma" in params else {}
    arrays = read(params, {"recurrent_kernel": "H 4H", "kernel": "I 4H", "bias": "4H", **norms})
    weights = from_kernels(arrays["kernel"], arrays["recurrent_kernel"], arrays["bias"], "igfo")
    if not norms:
        return weights
    gamma = transpose(reorder(transpose(arrays["gamma"]), "igfo"))
    return CellWeights(*weights, gamma=gamma, gamma_h=arrays["gamma_h"], beta_h=arrays["beta_h"])


def to_haste(weights: Layers) -> dict[str, Array]:
    """To the parameters of haste's `LSTM`, or `LayerNormLSTM`, for PyTorch; see `from_haste`.

    Args:
        weights: one direction.
    """
    own = copy_one(weights, keeps=EXTRA.keys() - {"peephole"})
    params = dict(zip(("kernel", "recurrent_kernel", "bias"), to_kernels(own, "igfo"), strict=True))
    if len(own) > len(Weights._fields):
        gamma = transpose(reorder(transpose(own.gamma), "ifgo", "igfo"))
        params |= {"gamma": gamma, "gamma_h": own.gamma_h, "beta_h": own.beta_h}
    return params
