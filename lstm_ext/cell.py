"""What a cell computes, as one value: all numbers, the same on every engine. None is the plain LSTM.

One step of a row, from its h and c before; ⊙ is by element, masks m are 0 or 1 / (1 - p), each element by itself:

    h_in  = h ⊙ m_recurrent                        one mask for all steps
    i, f, g, o = x W_ih' + h_in W_hh' + b_ih + b_hh
    f     = gate(f + p_f ⊙ c + forget_bias)        p_i, p_f, p_o: the peephole's rows
    i     = gate(i + p_i ⊙ c), or 1 - f if coupled
    g     = act(g)
    c_new = f ⊙ c + i ⊙ g ⊙ m_candidate            cut to ±cell_clip
    o     = gate(o + p_o ⊙ c_new)
    h_new = o ⊙ act(c_new), or w_hr times that     the latter cut to ±proj_clip
    c'    = c_new, or c where zoneout_c holds it; without training zoneout_c c + (1 - zoneout_c) c_new
    h'    = the same of h_new, h and zoneout_h

With a norm, LN(v) = (v - mean) / sqrt(variance + norm_epsilon):

    ROWS:  i, f, g, o = gamma[0] ⊙ LN(x W_ih') + gamma[1] ⊙ LN(h_in W_hh') + b_ih + b_hh, each LN over a row's 4H,
           and h_new = o ⊙ act(gamma_h ⊙ LN(c_new) + beta_h)
    GATES: each of i, f, g, o = gamma ⊙ LN(its whole sum) + beta, each LN over its H,
           and c_new becomes gamma_h ⊙ LN(c_new) + beta_h once o is known

A clip passes no gradient where it cut, as TensorFlow's clip_by_value does.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from math import inf
from operator import index
from typing import Any, NamedTuple

import numpy as np


class Activation(IntEnum):
    """The functions of a gate or a candidate; csrc/params.h has the same numbers."""

    TANH = 0
    SIGMOID = 1
    HARD_SIGMOID = 2  # max(0, min(1, alpha x + beta))
    RELU = 3
    LEAKY_RELU = 4  # alpha x below 0
    ELU = 5  # alpha (exp(x) - 1) below 0
    SOFTSIGN = 6
    SOFTPLUS = 7
    LINEAR = 8


class Norm(IntEnum):
    """Which layer normalisation there is; csrc/params.h has the same numbers."""

    NONE = 0
    ROWS = 1  # Ba et al. (2016), as haste: of x W_ih' and of h W_hh', each over all four gates
    GATES = 2  # TensorFlow's LayerNormBasicLSTMCell: of each gate's whole sum


class Cell(NamedTuple):
    """See the module. A clip of 0 is none; probabilities are those of a unit to be dropped, or to stay as it was."""

    activation: Activation = Activation.TANH
    activation_alpha: float = 0.0
    activation_beta: float = 0.0
    recurrent_activation: Activation = Activation.SIGMOID
    recurrent_alpha: float = 0.0
    recurrent_beta: float = 0.0
    forget_bias: float = 0.0
    coupled: bool = False
    cell_clip: float = 0.0
    proj_clip: float = 0.0
    peephole: bool = False  # whether the weights have one
    norm: Norm = Norm.NONE
    norm_epsilon: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    recurrent_dropout: float = 0.0
    candidate_dropout: float = 0.0
    training: bool = False  # whether masks are drawn
    tensorflow: bool = False  # weights are kernel [I + H, 4H], gates in the order i, j (g), f, o, and bias [4H]

    @property
    def draws(self) -> bool:
        """Whether there are masks to draw, for which a call has a seed."""
        return self.training and any(self[13:17])

    @property
    def extra_weights(self) -> tuple[str, ...]:
        """The weights of a direction beyond those of a plain cell."""
        norms = {Norm.ROWS: ("gamma", "gamma_h", "beta_h"), Norm.GATES: ("gamma", "beta", "gamma_h", "beta_h")}
        return ("peephole",) * self.peephole + norms.get(self.norm, ())

    @property
    def refused_on_gpu(self) -> str:
        """Why no CUDA kernel computes it; "" if one does."""
        if self.zoneout_h and not self.training and self.proj_clip:
            return "the mean of zoneout of h with proj_clip"  # a mixed h does not tell whether it was cut
        return ""

    def simplified(self) -> Cell | None:
        """The same, where nothing is trained without what then does nothing; None if that is the plain cell."""
        cell = self
        if not self.training:
            cell = self._replace(recurrent_dropout=0.0, candidate_dropout=0.0)
        elif not self.draws:
            cell = self._replace(training=False)
        return None if cell == PLAIN else cell


PLAIN = Cell()
PROBABILITIES = Cell._fields[13:17]


@lru_cache
def cell_of(numbers: tuple[float, ...]) -> Cell:
    """The cell of the numbers of its fields."""
    if len(numbers) != len(Cell._fields):
        raise ValueError(f"cell: expected {len(Cell._fields)} numbers, got {len(numbers)}")
    a, r, n = (Cell._fields.index(name) for name in ("activation", "recurrent_activation", "norm"))
    kinds = {a: Activation, r: Activation, n: Norm}
    bools = {
        name: bool(numbers[Cell._fields.index(name)]) for name in ("coupled", "peephole", "training", "tensorflow")
    }
    values = [kinds[k](int(number)) if k in kinds else float(number) for k, number in enumerate(numbers)]
    return Cell(*values)._replace(**bools)  # type: ignore[arg-type]


# What users write ----------------------------------------------------------------------------------------------------


# By name, with alpha and beta where they are not given. torch's hardsigmoid and Keras 3 have the slope 1/6; that of
# ONNX, TensorFlow and Keras 2 is 0.2: ("hard_sigmoid", 0.2). leaky_relu as torch and ONNX; Keras 3 has 0.2.
ACTIVATIONS: dict[str, tuple[Activation, float, float]] = {
    "tanh": (Activation.TANH, 0.0, 0.0),
    "sigmoid": (Activation.SIGMOID, 0.0, 0.0),
    "hard_sigmoid": (Activation.HARD_SIGMOID, 1 / 6, 0.5),
    "relu": (Activation.RELU, 0.0, 0.0),
    "leaky_relu": (Activation.LEAKY_RELU, 0.01, 0.0),
    "elu": (Activation.ELU, 1.0, 0.0),
    "softsign": (Activation.SOFTSIGN, 0.0, 0.0),
    "softplus": (Activation.SOFTPLUS, 0.0, 0.0),
    "linear": (Activation.LINEAR, 0.0, 0.0),
}
_NUM_PARAMETERS = {"hard_sigmoid": 2, "leaky_relu": 1, "elu": 1}
LAYER_NORM_EPSILON = 1e-5  # haste's, and that of torch.nn.LayerNorm


def read_activation(name: str, given: Any) -> tuple[Activation, float, float]:
    """The function that an argument `name` asks for: by its name, or (its name, alpha[, beta]).

    Raises:
        ValueError: none has this name, or it has no such parameters.
    """
    kind, *parameters = given if isinstance(given, (tuple, list)) and given else (given,)
    if not isinstance(kind, str) or kind not in ACTIVATIONS:
        raise ValueError(
            f"{name}: expected one of {', '.join(ACTIVATIONS)}, or a tuple (name, alpha, beta), got {given!r}"
        )
    activation, alpha, beta = ACTIVATIONS[kind]
    if len(parameters) > _NUM_PARAMETERS.get(kind, 0):
        most = _NUM_PARAMETERS.get(kind, 0)
        raise ValueError(f"{name}: expected at most {most} parameters of {kind}, got {given!r}")
    alpha, beta = (read_number(name, a) for a in (*parameters, *(alpha, beta)[len(parameters) :]))
    return activation, alpha, beta


_NUMBERS = (int, float, np.integer, np.floating)


def read_number(name: str, value: Any) -> float:
    """`value` as a float."""
    # compilers have no isfinite of a number that varies from call to call
    if isinstance(value, bool) or not isinstance(value, _NUMBERS) or not -inf < value < inf:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def read_integer(name: str, value: Any) -> int:
    """`value` as an int."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    return index(value)


def read_probability(name: str, value: Any) -> float:
    """`value`, if it is from 0 to 1."""
    if not 0 <= (number := read_number(name, value)) <= 1:
        raise ValueError(f"{name}: expected a probability from 0 to 1, got {value!r}")
    return number


def read_zoneout(value: Any) -> tuple[float, float]:
    """The probabilities of h and of c: a pair, or one number for both."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"zoneout: expected a probability or a pair of them, of h and of c, got {value!r}")
    return read_probability("zoneout", pair[0]), read_probability("zoneout", pair[1])


def _read_clip(name: str, value: Any) -> float:
    """0 for None."""
    if value is None:
        return 0.0
    if not (number := read_number(name, value)) > 0:
        raise ValueError(f"{name}: expected None or a number above 0, got {value!r}")
    return number


def make_cell(
    *,
    activation: Any = "tanh",
    recurrent_activation: Any = "sigmoid",
    forget_bias: float = 0.0,
    peephole: bool = False,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
    layer_norm: bool = False,
    zoneout: float | Sequence[float] = 0.0,
    recurrent_dropout: float = 0.0,
    candidate_dropout: float = 0.0,
    coupled: bool = False,
    projected: bool = True,
) -> Cell:
    """The cell of the options as `LSTM` and `lstm` take them; one that trains.

    Raises:
        ValueError: an option's value, or options that have no meaning together.
    """
    if proj_clip is not None and not projected:
        raise ValueError("proj_clip: expected None without a projection (proj_size, w_hr), got " + repr(proj_clip))
    zoneout_h, zoneout_c = read_zoneout(zoneout)
    return check_cell(
        Cell(
            *read_activation("activation", activation),
            *read_activation("recurrent_activation", recurrent_activation),
            forget_bias=read_number("forget_bias", forget_bias),
            coupled=bool(coupled),
            cell_clip=_read_clip("cell_clip", cell_clip),
            proj_clip=_read_clip("proj_clip", proj_clip),
            peephole=bool(peephole),
            norm=Norm.ROWS if layer_norm else Norm.NONE,
            norm_epsilon=LAYER_NORM_EPSILON if layer_norm else 0.0,
            zoneout_h=zoneout_h,
            zoneout_c=zoneout_c,
            recurrent_dropout=read_probability("recurrent_dropout", recurrent_dropout),
            candidate_dropout=read_probability("candidate_dropout", candidate_dropout),
            training=True,
        )
    )


def show_options(function: Any, options: Any, **defaults: Any) -> None:
    """Lists options in the signature of a function that takes them as **options, without which a call is as quick."""
    signature, kind = inspect.signature(function), inspect.Parameter.KEYWORD_ONLY
    named = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
    known = {**(make_cell.__kwdefaults__ or {}), **defaults}
    for name, annotation in options.__annotations__.items():
        text = getattr(annotation, "__forward_arg__", annotation)
        named.append(inspect.Parameter(name, kind, default=known[name], annotation=text))
    function.__signature__ = signature.replace(parameters=named)


def check_cell(cell: Cell) -> Cell:
    """The cell, if each of its numbers has a meaning.

    Raises:
        ValueError: one has none.
    """
    for name in PROBABILITIES:
        read_probability(name, getattr(cell, name))
    for name in ("cell_clip", "proj_clip"):
        if getattr(cell, name) < 0:
            raise ValueError(f"{name}: expected 0 (none) or a number above it, got {getattr(cell, name)}")
    for name, alpha in (("activation", cell.activation_alpha), ("recurrent_activation", cell.recurrent_alpha)):
        if alpha < 0:  # the derivative is read from the result, which then would not tell on which side it is
            raise ValueError(f"{name}: expected alpha of 0 or more, got {alpha}")
    if cell.norm and not cell.norm_epsilon > 0:
        raise ValueError(f"norm_epsilon: expected a number above 0, got {cell.norm_epsilon}")
    if cell.tensorflow and cell.proj_clip:
        raise ValueError("proj_clip: expected 0 with TensorFlow's layout of the weights, which has no projection")
    return cell
