"""Random inputs for a case, the right answers in float64, and the check of an arm's answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lstm_ext import reference
from lstm_ext.call import LayerCall, Needs, OutputGrads, Outputs, Save, Saved
from lstm_ext.testing import assert_close, round_to, to_float64

from .cases import Case

Array = npt.NDArray[Any]
Named = dict[str, Any]

# What the tests allow ours, times this for the others: they approximate tanh more roughly, or round gates and cells to
# the half types. A wrong gate order or state is still orders of magnitude off.
SLACK = 8

SEED = 0  # of torch's generator before a call whose results are checked


def judged_as(case: Case) -> str:
    """Whose numbers the inputs are, and whose tolerance counts: TF32 has as many bits as float16."""
    return "float16" if case.dtype == "tf32" else case.dtype


@dataclass(frozen=True)
class Inputs:
    """The arrays of one call, each number one that the case's dtype can hold.

    x [T, B, I]; h0 [L*D, B, P], c0 [L*D, B, H]; weights as `torch.nn.LSTM` orders its parameters;
    lengths [B], descending from T, if packed, else None; dy [T, B, D*P], the gradient of y in training; seed [1], of
    the masks of a cell that draws some, else None: what a layer draws first after torch.manual_seed(SEED).
    """

    x: Array
    h0: Array
    c0: Array
    weights: list[Array]
    lengths: Array | None
    dy: Array
    seed: Array | None

    @property
    def batch_sizes(self) -> Array | None:
        """How many rows are active at each step [T], or None."""
        return None if self.lengths is None else (np.arange(len(self.x))[:, None] < self.lengths).sum(axis=1)

    @property
    def valid(self) -> Array:
        """Whether a row is active at a step [T, B]."""
        T, B, _ = self.x.shape
        return np.arange(T)[:, None] < (np.full(B, T) if self.lengths is None else self.lengths)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random inputs: x, states and dy normal, weights in the range of torch's initial ones, lengths from T/4 to T."""
    rng = np.random.default_rng(seed)
    bound, states = case.H**-0.5, case.layers * case.directions

    def normal(*shape: int) -> Array:
        return round_to(rng.standard_normal(shape), judged_as(case))

    shapes = [shape for layer in case.by_layer for shape in layer.weight_shapes]
    weights = [round_to(rng.uniform(-bound, bound, shape), judged_as(case)) for shape in shapes]
    lengths = None
    if case.mode == "packed":
        drawn = rng.integers((case.T + 3) // 4, case.T + 1, case.B - 1)
        lengths = np.sort(np.append(drawn, case.T))[::-1].copy()
    return Inputs(
        normal(case.T, case.B, case.I),
        normal(states, case.B, case.width),
        normal(states, case.B, case.H),
        weights,
        lengths,
        normal(case.T, case.B, case.directions * case.width),
        draw_seed(case),
    )


def draw_seed(case: Case) -> Array | None:
    """By a generator that is as torch's own on the CPU after torch.manual_seed(SEED)."""
    if case.cell is None or not case.cell.draws:
        return None
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(2**63 - 1, (1,), generator=generator).numpy()


def by_layer(weights: list[Array], layers: int) -> list[list[Array]]:
    """The flat list in one part for each layer."""
    size = len(weights) // layers
    return [weights[n * size : (n + 1) * size] for n in range(layers)]


def answers(case: Case, inputs: Inputs) -> Named:
    """Outputs by name, and in training the gradients of x and the weights, all from the float64 reference."""
    L, training = case.layers, case.trains
    weights = by_layer([w.astype(np.float64) for w in inputs.weights], L)
    h0, c0 = (np.split(a.astype(np.float64), L) for a in (inputs.h0, inputs.c0))
    y = (inputs.x if inputs.lengths is None else inputs.x[inputs.valid]).astype(np.float64)

    runs = []
    for n, layer in enumerate(case.by_layer):
        masks, how = (None, None, inputs.batch_sizes), (layer.directions, False, layer.cell, inputs.seed)
        call = LayerCall(y, h0[n], c0[n], weights[n], *masks, *how)
        runs.append((call, reference.layer_forward(call, Save.ALL if training else Save.NOTHING)))
        y = runs[-1][1].y
    named = {
        "y": y,
        "h_n": np.concatenate([outputs.h_n for _, outputs in runs]),
        "c_n": np.concatenate([outputs.c_n for _, outputs in runs]),
    }
    if not training:
        return named
    gradient: Array | None = inputs.dy.astype(np.float64)
    dweights: list[Array] = []
    for call, outputs in reversed(runs):
        saved, grads = Saved.of(Outputs(*outputs), call.cell), OutputGrads(gradient, None, None, None)
        gradient, _, _, own = reference.layer_backward(call, saved, grads, Needs.X | Needs.WEIGHTS)
        dweights = [*(own or []), *dweights]
    return named | {"dx": gradient} | {f"dweights[{n}]": dw for n, dw in enumerate(dweights)}


@lru_cache(maxsize=1)
def _problem(case: Case) -> tuple[Inputs, Named]:
    inputs = make_inputs(case)
    return inputs, answers(case, inputs)


def problem(case: Case) -> tuple[Inputs, Named]:
    """Inputs and right answers; those of the last case are kept, for the same work on another number of threads."""
    return _problem(replace(case, threads=1, busy=0, device="cpu"))


def check(case: Case, actual: Named, expected: Named, slack: float) -> None:
    """AssertionError where an array is further off than `slack` times what the tests allow, or is missing."""
    output_terms = max(layer.output_terms for layer in case.by_layer)
    gradient_terms = max(layer.gradient_terms for layer in case.by_layer)
    for name, array in expected.items():
        assert name in actual, f"{name}: missing"
        terms = case.layers * (gradient_terms if name.startswith("d") else output_terms)
        magnitude = slack * max(1.0, float(np.abs(array).max(initial=0)))
        assert_close(actual[name], array, judged_as(case), terms=terms, magnitude=magnitude, name=name)


def deviations(actual: Named, expected: Named) -> dict[str, float]:
    """‖actual - expected‖ / ‖expected‖ of the outputs and, in training, the gradients; the largest of their arrays."""
    largest: dict[str, float] = {}
    for name, array in expected.items():
        exact, kind = array.astype(np.float64), "gradients" if name.startswith("d") else "outputs"
        norm = float(np.linalg.norm(exact))
        error = float(np.linalg.norm(to_float64(actual[name]) - exact)) / norm if norm else 0.0
        largest[kind] = max(largest.get(kind, 0.0), error)
    return largest
