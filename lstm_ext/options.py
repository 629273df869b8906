"""The options of `LSTM` and `LSTMCell` beyond torch's: what they are, and the weights that they add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.parameter import Parameter

from .cell import Cell, make_cell, read_probability

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack


class CellOptions(TypedDict, total=False):
    """docs/options.md tells what they mean, and where they come from."""

    activation: str | tuple[Any, ...]
    recurrent_activation: str | tuple[Any, ...]
    forget_bias: float
    unit_forget_bias: bool
    peephole: bool
    cell_clip: float | None
    layer_norm: bool
    zoneout: float | Sequence[float]
    recurrent_dropout: float
    candidate_dropout: float
    weight_drop: float
    coupled: bool


class LayerOptions(CellOptions, total=False):
    """Those of a layer, which may have a projection."""

    proj_clip: float | None


class Options(NamedTuple):
    """Those of a module."""

    cells: tuple[Cell | None, Cell | None]  # in eval, in training; None is the plain one
    weight_drop: float
    unit_forget_bias: bool
    given: tuple[tuple[str, Any], ...]  # by name, for repr

    @property
    def extra_weights(self) -> tuple[str, ...]:
        """The names of the weights that a direction has besides."""
        return () if self.cells[1] is None else self.cells[1].extra_weights

    @property
    def changing(self) -> list[str]:
        """Those that change what is computed."""
        return [name for name, _ in self.given if name != "unit_forget_bias"]

    def make_extra(self, hidden_size: int, like: Any) -> dict[str, Parameter]:
        """The additional weights of a direction, uninitialised, by name."""
        H = hidden_size
        shapes = {"peephole": (3, H), "gamma": (2, 4 * H), "gamma_h": (H,), "beta_h": (H,)}
        return {name: Parameter(like.new_empty(shapes[name])) for name in self.extra_weights}

    def reset(self, parameters: dict[str, Any]) -> None:
        """What of a module's parameters does not start as torch's do, all of which are uniform."""
        for name, weight in parameters.items():
            if name.startswith("gamma"):
                torch.nn.init.ones_(weight)
            elif name.startswith("beta"):
                torch.nn.init.zeros_(weight)
            elif self.unit_forget_bias and name.startswith("bias"):
                H = len(weight) // 4
                with torch.no_grad():
                    weight[H : 2 * H] = 1.0 if name.startswith("bias_ih") else 0.0

    def drop(self, weights: list[Any], num_directions: int) -> list[Any]:
        """The weights of a layer in training: some elements of each w_hh are zero, the others larger by that."""
        if not self.weight_drop:
            return weights
        each = len(weights) // num_directions
        return [F.dropout(w, self.weight_drop) if n % each == 1 else w for n, w in enumerate(weights)]

    def __str__(self) -> str:
        return "".join(f", {name}={value!r}" for name, value in self.given)


_DEFAULTS: dict[str, Any] = {
    "activation": "tanh",
    "recurrent_activation": "sigmoid",
    "forget_bias": 0.0,
    "unit_forget_bias": False,
    "peephole": False,
    "cell_clip": None,
    "proj_clip": None,
    "layer_norm": False,
    "zoneout": 0.0,
    "recurrent_dropout": 0.0,
    "candidate_dropout": 0.0,
    "weight_drop": 0.0,
    "coupled": False,
}


def read_options(given: dict[str, Any], who: str, bias: bool, projected: bool) -> Options | None:
    """None if all are as torch's LSTM has it.

    Raises:
        TypeError: an option that there is not.
        ValueError: a value, or options that have no meaning together.
    """
    if unknown := [name for name in given if name not in _DEFAULTS]:
        known = ", ".join(_DEFAULTS)
        raise TypeError(f"{who}: expected the arguments of torch.nn.{who} or of {known}, got {', '.join(unknown)}")
    of_numpy = (np.ndarray, np.generic)
    given = {name: value.tolist() if isinstance(value, of_numpy) else value for name, value in given.items()}
    for name in ("peephole", "layer_norm", "coupled", "unit_forget_bias"):
        if not isinstance(given.get(name, False), bool):
            raise ValueError(f"{name}: expected a bool, got {given[name]!r}")
    chosen = {name: value for name, value in given.items() if value != _DEFAULTS[name]}
    options = dict(chosen)
    unit_forget_bias = options.pop("unit_forget_bias", False)
    weight_drop = read_probability("weight_drop", options.pop("weight_drop", 0.0))
    cell = make_cell(**options, projected=projected)
    if unit_forget_bias and not bias:
        raise ValueError("unit_forget_bias, bias: expected biases to start at 1, got bias=False")
    cells = cell._replace(training=False).simplified(), cell.simplified()
    return Options(cells, weight_drop, unit_forget_bias, tuple(chosen.items())) if chosen else None
