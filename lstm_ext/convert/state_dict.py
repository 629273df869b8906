"""torch's `state_dict`, and that of our modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..call import Weights
from .arrays import EXTRA, Layers, copy_one, copy_stack, named_arrays, read_layers

if TYPE_CHECKING:
    from torch import Tensor


def _parameter(field: str, n: int, d: int) -> str:
    """weight_hh_l0_reverse for w_hh of the first layer, backward."""
    return field.replace("w_", "weight_").replace("b_", "bias_") + f"_l{n}" + ("_reverse" if d else "")


def _cell_parameter(field: str, *_: int) -> str:
    return _parameter(field, 0, 0).removesuffix("_l0")


def from_state_dict(state_dict: Mapping[str, Any]) -> list[tuple[Weights, ...]]:
    """From the `state_dict` of an `LSTM` or an `LSTMCell`, torch's or ours.

    Args:
        state_dict: weight_ih_l0 [4H, I], weight_hh_l0 [4H, P], bias_ih_l0 and bias_hh_l0 [4H] or neither, weight_hr_l0
            [P, H] with a projection; then _l1 …, each followed by its _reverse if bidirectional. The names of a cell
            have no _l0. Gates in the order i, f, g, o.

    Returns:
        From the input up, (forward,) or (forward, backward) for each layer.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html

    Example:
        >>> ((layer,), _) = convert.from_state_dict(torch.nn.LSTM(3, 4, num_layers=2).state_dict())
        >>> layer.w_ih.shape
        (16, 3)
        >>> sorted(convert.to_state_dict(layer))
        ['bias_hh_l0', 'bias_ih_l0', 'weight_hh_l0', 'weight_ih_l0']
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping from names to arrays, got {type(state_dict).__name__}")
    names = list(map(str, state_dict))
    biased = any(name.startswith("bias_") for name in names)
    if "weight_hh" in names:
        extra = EXTRA.keys() & set(names)
        return read_layers(state_dict, _cell_parameter, 1, 1, biased=biased, projected=False, extra=extra)
    num_layers = 1
    while f"weight_hh_l{num_layers}" in names:
        num_layers += 1
    num_directions = 2 if any(name.endswith("_reverse") for name in names) else 1
    projected = any(name.startswith("weight_hr_") for name in names)
    extra = {field for field in EXTRA if any(name.startswith(f"{field}_l") for name in names)}
    sizes = num_layers, num_directions
    return read_layers(state_dict, _parameter, *sizes, biased=biased, projected=projected, extra=extra)


def to_state_dict(layers: Layers, *, cell: bool = False) -> dict[str, Tensor]:
    """To what `load_state_dict` of an `LSTM` takes, or with `cell` that of an `LSTMCell`; see `from_state_dict`.

    Args:
        layers: from the input up, all of them with or without biases, projections and a backward direction.
        cell: for an `LSTMCell`, which has one layer of one direction and no projection.

    Returns:
        Tensors on the CPU by name.

    Raises:
        ImportError: there is no torch.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError("convert.to_state_dict makes tensors, for which it needs PyTorch (torch>=2.11)") from error
    stack = [(copy_one(layers, keeps=EXTRA),)] if cell else copy_stack(layers, projections=True, keeps=EXTRA)
    return {name: torch.from_numpy(a) for name, a in named_arrays(stack, _cell_parameter if cell else _parameter)}
