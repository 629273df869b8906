"""Cells with options as people write them in torch: a loop over the steps, or the same with a compiled step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lstm_ext.cell import LAYER_NORM_EPSILON, Cell
from lstm_ext.masks import Mask, happens

from .arms import Arm, Call, Torch
from .cases import Case
from .oracle import Inputs
from .rows import LOOPS

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softsign": F.softsign,
    "hard_sigmoid": F.hardsigmoid,
}
State = tuple[Tensor, Tensor]


class TorchLoop(Torch):
    """x W_ih' of all steps at once, the rest step by step. Masks are there before the clock runs."""

    name = LOOPS[0]
    has_options = True

    def refusal(self, case: Case) -> str:
        if not case.options:
            return "torch.nn.LSTM is no loop"
        if case.mode not in ("inference", "training") or case.P or case.layers > 1 or case.directions > 1:
            return "one layer and direction, without a projection, in inference and training"
        return super().refusal(case)

    def compiled(self, step: Callable[..., State]) -> Callable[..., State]:
        return step

    def prepare(self, case: Case, inputs: Inputs) -> Call:
        def tensor(a: Any) -> Tensor:
            return torch.from_numpy(a).to(case.device, getattr(torch, case.stored)).requires_grad_(case.trains)

        x, h0, c0 = tensor(inputs.x), tensor(inputs.h0[0]).detach(), tensor(inputs.c0[0]).detach()
        w_ih, w_hh, b_ih, b_hh, *extra = weights = [tensor(w) for w in inputs.weights]
        step = self.compiled(partial(make_step(case, *extra), w_hh))
        recurrent, *masks = draw_masks(case, inputs.seed, x)
        norms = case.cell is not None and bool(case.cell.norm)

        def forward() -> tuple[Tensor, State]:
            products = F.linear(x, w_ih)
            if norms:
                products = F.layer_norm(products, products.shape[-1:], extra[0][0], None, LAYER_NORM_EPSILON)
            products = products + (b_ih + b_hh)
            h, c, outputs = h0, c0, []
            for t in range(case.T):
                h, c = step(products[t], h, c, recurrent, *(None if mask is None else mask[t] for mask in masks))
                outputs.append(h)
            return torch.stack(outputs), (h[None], c[None])

        if not case.trains:
            return forward
        leaves, dy = [x, *weights], tensor(inputs.dy).detach()

        def train() -> Any:
            y, state_n = forward()
            return y, state_n, torch.autograd.grad(y, leaves, dy)

        return train


class TorchLoopCompiled(TorchLoop):
    """The same with torch.compile of the step."""

    name = LOOPS[1]

    def compiled(self, step: Callable[..., State]) -> Callable[..., State]:
        return torch.compile(step)


def make_step(case: Case, *extra: Tensor) -> Callable[..., State]:
    """One step: (w_hh, products of x with the biases, h, c, the masks) to (h, c)."""
    cell: Any = case.cell or Cell()
    options = case.given_options
    act = ACTIVATIONS[options.get("activation", "tanh")]
    gate_act = ACTIVATIONS[options.get("recurrent_activation", "sigmoid")]
    peephole, norms = (extra[0] if cell.peephole else None), (extra if cell.norm else None)
    held_h, held_c = (cell.zoneout_h, cell.zoneout_c) if not cell.training else (0.0, 0.0)

    def step(w_hh: Tensor, products: Tensor, h: Tensor, c: Tensor, *masks: Tensor | None) -> State:
        recurrent, candidate, hold_h, hold_c = masks
        sums = F.linear(h if recurrent is None else h * recurrent, w_hh)
        if norms is not None:
            sums = F.layer_norm(sums, sums.shape[-1:], norms[0][1], None, LAYER_NORM_EPSILON)
        i, f, g, o = (products + sums).chunk(4, 1)
        if peephole is not None:
            i, f = i + peephole[0] * c, f + peephole[1] * c
        f = gate_act(f + cell.forget_bias)
        i = 1 - f if cell.coupled else gate_act(i)
        g = act(g)
        new_c = f * c + i * (g if candidate is None else g * candidate)
        if cell.cell_clip:
            new_c = new_c.clamp(-cell.cell_clip, cell.cell_clip)
        o = gate_act(o if peephole is None else o + peephole[2] * new_c)
        seen = new_c if norms is None else F.layer_norm(new_c, new_c.shape[-1:], norms[1], norms[2], LAYER_NORM_EPSILON)
        new_h = o * act(seen)
        if held_h or held_c:
            return torch.lerp(new_h, h, held_h), torch.lerp(new_c, c, held_c)
        if hold_h is not None:
            new_h = torch.where(hold_h, h, new_h)
        return new_h, new_c if hold_c is None else torch.where(hold_c, c, new_c)

    return step


def draw_masks(case: Case, seed: Any, x: Tensor) -> list[Tensor | None]:
    """Of h for all steps [B, H], of g [T, B, H], and where h and c are held [T, B, H]: those that the oracle has."""
    cell = case.cell
    if cell is None or not cell.draws:
        return [None] * 4
    rows, units = torch.arange(case.B), torch.arange(case.H)
    times = torch.arange(case.T)[:, None].expand(case.T, case.B)

    def draw(kind: Mask, p: float, times: Tensor = times) -> Tensor | None:
        return happens(torch.from_numpy(seed), kind, 0, times, rows, units, p) if p else None

    def scaled(dropped: Tensor | None, p: float) -> Tensor | None:
        return None if dropped is None else ~dropped / torch.tensor(1 - p, dtype=x.dtype)

    recurrent = draw(Mask.RECURRENT_DROPOUT, cell.recurrent_dropout, torch.zeros(1, dtype=torch.int64))
    return [
        scaled(recurrent, cell.recurrent_dropout),
        scaled(draw(Mask.CANDIDATE_DROPOUT, cell.candidate_dropout), cell.candidate_dropout),
        draw(Mask.ZONEOUT_H, cell.zoneout_h),
        draw(Mask.ZONEOUT_C, cell.zoneout_c),
    ]


LOOP_ARMS: dict[str, Arm] = {arm.name: arm for arm in (TorchLoop(), TorchLoopCompiled())}
