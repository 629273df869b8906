"""A layer on a GPU: what is one large product over all steps in torch, the steps themselves in the kernels.

All tensors are on one CUDA device, but for batch_sizes, which are on the CPU. Everything runs on the current stream;
nothing waits for the device. float32 multiplies as TF32 where torch allows it: in the steps as it does for recurrent
layers, in the products here as for any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .. import measured, self_check
from .._native import C
from .._torch_private import _get_fp32_precision_getter
from .._warnings import warn_once
from ..call import CallTuple, Grads, GradsTuple, LayerCall, Needs, OutputGrads, Outputs, OutputsTuple, Save, Saved
from ..cell import Norm
from ..checks import check
from . import cuda_norm, in_torch
from .composed import compute_dtype
from .cuda_norm import gates_of, multiply, norm_of

_strategy = ""
tell_refusal: Callable[[torch.dtype, str], None] | None = None  # who chooses engines wants to know

if hasattr(C, "cuda_take_hooks"):
    C.cuda_take_hooks(measured.hand_over, self_check.check)


@contextmanager
def use_strategy(name: str) -> Iterator[None]:
    """Runs the layers inside the `with` block by one strategy: "block", "cluster", "grid" or "step"; "" chooses.

    "grid/2" is one kernel, of so many tiles of the batch, which then runs whatever its self-check has found; with
    "step/2/32" 32 threads share a row that is normalised. For tests and benchmarks. It counts for the whole process:
    autograd runs backward passes on threads of its own.
    """
    global _strategy
    former, _strategy = _strategy, name
    try:
        yield
    finally:
        _strategy = former


def tf32_allowed() -> bool:
    """Whether torch lets float32 recurrent layers multiply as TF32."""
    return bool(_get_fp32_precision_getter("cuda", "rnn") == "tf32")


def _walk(call: LayerCall) -> LayerCall:
    """The call with the length of each row [B], or None; and batch_sizes as where the rows of each time start [T]."""
    if call.batch_sizes is None:
        lengths = call.lengths
        return call if lengths is None else call._replace(lengths=lengths.to(torch.int64).contiguous())
    sizes, device = call.batch_sizes, call.x.device
    lengths = (sizes[:, None] > torch.arange(int(sizes[0]))).sum(0)
    starts = sizes.cumsum(0) - sizes
    return call._replace(
        lengths=lengths.to(device, non_blocking=True), batch_sizes=starts.to(device, non_blocking=True)
    )


def steps_of(call: LayerCall) -> LayerCall:
    """What the kernels are asked: the call without the w_ih of each direction, whose products are made here."""
    return _walk(call)._replace(weights=[a.contiguous() for a in call.weights_of_steps()])


def _rows(x: Tensor, batch_first: bool) -> Tensor:
    """[T, B, ..], [B, T, ..] or packed rows [N, ..] as rows [T * B, ..] or [N, ..], in the order of the kept arrays."""
    x = x.transpose(0, 1) if batch_first else x
    return x if x.dim() == 2 else x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def _seems_right(call: LayerCall) -> bool:
    """Whether what the core does not see is right: x, each w_ih, and the dtype of lengths, which are cast."""
    x = call.x
    counted = call.lengths is None or "int" in str(call.lengths.dtype)
    return (
        counted
        and x.dim() == 3
        and call.num_steps() > 0
        and all(
            w.w_ih.shape == (w.w_hh.shape[0], x.shape[-1]) and w.w_ih.dtype == x.dtype and w.w_ih.device == x.device
            for w in call.split()
        )
    )


def input_products(call: LayerCall) -> Tensor:
    """x W_ih' of each direction: [D, T, B, 4H], or of packed rows [D, N, 4H]; float32 for half types.

    Normalised and scaled where a cell normalises it by itself.
    """
    x, split = call.x, call.split_as_laid_out()
    steps = x.shape[:1] if call.batch_sizes is not None else (call.num_steps(), call.batch_size())
    rows = _rows(x, call.batch_first)
    xw = x.new_empty(len(split), *steps, split[0].w_ih.shape[0], dtype=compute_dtype(x.dtype))
    for d, w in enumerate(split):
        multiply(rows, w.w_ih, xw[d].view(rows.shape[0], w.w_ih.shape[0]))
    return cuda_norm.normalise_inputs(call, xw)


def _explain(error: RuntimeError) -> None:
    """Says what torch cannot know, where an operation of its own is the first to hear that the GPU was lost before."""
    if why := C.cuda_timed_out():
        raise RuntimeError(f"{error}\nlstm_ext: {why}") from error


def forward(call: CallTuple, save: Save) -> OutputsTuple:
    """See `Engine`."""
    asked = LayerCall(*call)
    if asked.cell is not None and (asked.cell.refused_on_gpu or not isinstance(asked.seed, (Tensor, type(None)))):
        return NotImplemented
    if not all(isinstance(a, Tensor) for a in (*call[:3], *call[3], *call[4:7]) if a is not None):
        return NotImplemented
    if asked.is_step:
        # What that one launch does.
        if not (save or asked.resets is not None or asked.projected or _drops_h(asked) or norm_of(asked)):
            outputs = C.cuda_step_forward(asked, tf32_allowed())
            if not isinstance(outputs, str):
                return outputs
        outputs = forward(asked.with_time(), save)
        return outputs if outputs is NotImplemented else Outputs(*outputs).squeeze_time_(asked)
    if asked.batch_sizes is not None and (asked.masked or asked.batch_first):
        raise ValueError("lengths, resets, batch_first: expected none of them with batch_sizes, got one")
    if asked.batch_sizes is not None or asked.cell is not None or not _seems_right(asked):
        check(asked, values=asked.batch_sizes is not None)  # a kernel follows batch_sizes, and cannot check them
    try:
        steps = steps_of(asked)._replace(x=input_products(asked))
    except RuntimeError as error:
        _explain(error)
        raise
    outputs = C.cuda_layer_forward(steps, save, tf32_allowed(), _strategy)
    if not isinstance(outputs, str):
        return outputs
    if asked.cell is not None:
        return _refuse_cell(outputs)
    _refuse(asked, outputs)
    return in_torch.forward(asked, save)


def backward(call: LayerCall, saved: Saved, grads: OutputGrads, needs: Needs) -> GradsTuple:
    """See `Engine`."""
    if call.cell is not None and call.cell.refused_on_gpu:
        return NotImplemented
    if call.is_step:
        timed = backward(call.with_time(), saved.with_time(call), grads.with_time(call), needs)
        return timed if timed is NotImplemented else Grads(*timed).without_time(call)
    steps = steps_of(call)._replace(x=saved.gates)
    # One step of all rows, as a cell's: one launch, which multiplies nothing; the gradient of h0 is one more product.
    alone = call.num_steps() == 1 and not call.masked and call.batch_sizes is None and not _changes_dh(call)
    asked = (steps, saved, grads, needs & ~Needs.H0 if alone else needs, tf32_allowed())
    normed: tuple[Tensor, ...] = ()
    if norm_of(call):
        h_before = C.cuda_h_before(steps, saved)
        if h_before is NotImplemented:
            return h_before
        normed = cuda_norm.again(call, _rows(call.x, call.batch_first), h_before)
    results = C.cuda_layer_backward(*asked, _strategy or ("step" if alone else ""), *normed)
    if alone and isinstance(results, str) and not _strategy:  # that kernel is refused, others may do
        results = C.cuda_layer_backward(*asked, "", *normed)
    if results is NotImplemented:
        return results
    if isinstance(results, str):
        if call.cell is None:
            _refuse(call, results)
        else:
            _refuse_cell(results)
        return in_torch.backward(call, saved, grads, needs)
    d_gates, h_prev, d_h, hidden, hidden_prev, dh0, dc0, c_prev, c_new, *of_norm = results
    split = call.split_as_laid_out()
    for d, w in enumerate(split if needs & Needs.WEIGHTS else ()):
        if w.w_hr is not None and hidden_prev is not None:
            h_prev[d].flatten(0, -2).addmm_(hidden_prev[d].flatten(0, -2), w.w_hr.t())
    if alone and needs & Needs.H0:
        dh0 = torch.stack([d_gates[d].flatten(0, -2) @ w.w_hh for d, w in enumerate(split)])
    if not needs & (Needs.X | Needs.WEIGHTS):
        return None, dh0, dc0, None
    rows = _valid_rows(call, steps.lengths) if normed or needs & Needs.WEIGHTS else call.x  # else they are not read
    sums = list(map(SumGrads.of, d_gates))
    if normed:
        sums = [_through_norm(call, rows, d, SumGrads.of(d_gates[d]), normed[0], of_norm) for d in range(len(split))]
    of_c = (d_h, hidden, c_prev, c_new)
    return (
        _input_grad(call, [each.of_x for each in sums]) if needs & Needs.X else None,
        dh0,
        dc0,
        _weight_grads(call, rows, sums, h_prev, of_c) if needs & Needs.WEIGHTS else None,
    )


def _drops_h(call: LayerCall) -> bool:
    return call.cell is not None and call.cell.training and call.cell.recurrent_dropout > 0


def _changes_dh(call: LayerCall) -> bool:
    """Whether the gradient of h0 is more than a product."""
    return _drops_h(call) or (call.cell is not None and call.cell.zoneout_h > 0)


class SumGrads(NamedTuple):
    """Gradients of one direction's sums [rows, 4H], in the order of the weights.

    They differ where a cell normalises: what x and h bring each by itself, or their sum; and before or after that.
    """

    of_x: Tensor  # of x W_ih'
    of_h: Tensor  # of h W_hh'
    of_bias: Tensor
    d_pre: Tensor  # of the gates before their activation
    of_norm: tuple[Tensor, ...] = ()  # those of gamma and beta

    @classmethod
    def of(cls, d_gates: Tensor) -> SumGrads:
        """Where nothing is normalised."""
        rows = d_gates.flatten(0, -2)
        return cls(rows, rows, rows, rows)


def _through_norm(
    call: LayerCall, rows: Tensor, d: int, sums: SumGrads, products: Tensor, of_norm: list[Tensor | None]
) -> SumGrads:
    """Those of direction d of a cell that normalises, from what its steps leave; `sums` are of what they normalised."""
    d_pre, d_seen, d_gamma_h = (None if a is None else a[d].flatten(0, -2) for a in of_norm)
    assert d_pre is not None
    of_x, d_gamma_of_x, of_bias = sums.of_x, None, sums.of_h
    if norm_of(call) == Norm.ROWS:
        of_x, d_gamma_of_x = cuda_norm.input_grads(call, rows, call.split_as_laid_out()[d], d_pre)
        of_bias = d_pre
    found = cuda_norm.FromSteps(d_pre, products[d].flatten(0, -2), d_seen, d_gamma_h)
    of_weights = () if d_seen is None else tuple(cuda_norm.weight_grads(call, found, d_gamma_of_x))
    return SumGrads(of_x, sums.of_h, of_bias, d_pre, of_weights)


def _input_grad(call: LayerCall, of_x: list[Tensor]) -> Tensor:
    """dx, laid out as x."""
    x, split = call.x, call.split_as_laid_out()
    total = of_x[0] @ split[0].w_ih
    for g, w in zip(of_x[1:], split[1:], strict=True):
        total = total.addmm_(g, w.w_ih)
    if not call.batch_first:
        return total.view(x.shape)
    return total.view(x.shape[1], x.shape[0], -1).transpose(0, 1).contiguous()


def _weight_grads(
    call: LayerCall, rows: Tensor, sums: list[SumGrads], h_prev: Tensor, of_c: tuple[Tensor | None, ...]
) -> list[Tensor]:
    """In the order of the weights; each is one product over all steps. `rows` are those of x, zero past a length."""
    dweights: list[Tensor] = []
    for d, w in enumerate(call.split_as_laid_out()):
        g, h = sums[d], h_prev[d].flatten(0, -2)
        d_h, hidden, c_prev, c_new = (None if a is None else a[d].flatten(0, -2) for a in of_c)
        if call.cell is not None and call.cell.tensorflow:
            width = rows.shape[1]
            dkernel = g.of_h.new_empty(width + h.shape[1], g.of_h.shape[1])
            torch.mm(rows.t(), g.of_x, out=dkernel[:width])
            torch.mm(h.t(), g.of_h, out=dkernel[width:])
            dweights.append(dkernel)
        else:
            dweights += [g.of_x.t() @ rows, g.of_h.t() @ h]
        if w.b_ih is not None:
            db = g.of_bias.sum(0).to(rows.dtype)
            dweights += [db] if w.b_hh is None else [db, db.clone()]
        if d_h is not None and hidden is not None:
            dweights.append(d_h.t() @ hidden)
        if c_prev is not None and c_new is not None:
            d_i, d_f, _, d_o = gates_of(call.cell, g.d_pre)
            peephole = torch.stack([(d_i * c_prev).sum(0), (d_f * c_prev).sum(0), (d_o * c_new).sum(0)])
            dweights.append(peephole.to(rows.dtype))
        dweights += g.of_norm
    return dweights


def _valid_rows(call: LayerCall, lengths: Tensor | None) -> Tensor:
    """Those of x, zero past a length."""
    x = call.x if call.batch_sizes is not None else _masked(call.x, lengths, call.batch_first)
    return _rows(x, call.batch_first)


def _masked(x: Tensor, lengths: Tensor | None, batch_first: bool) -> Tensor:
    """x with zeros past each length, whatever stood there."""
    if lengths is None:
        return x
    steps = torch.arange(x.shape[1 if batch_first else 0], device=x.device)
    past = steps >= lengths[:, None] if batch_first else steps[:, None] >= lengths
    return x.masked_fill(past[..., None], 0)


def way(call: LayerCall, backward: bool) -> str:
    """How the steps of a pass run, and why so, in words."""
    T, B, _, H, P = call.sizes()
    dtype = str(call.x.dtype).removeprefix("torch.")
    layer = (T, B, H, P, call.projected, dtype, tf32_allowed(), call.num_directions, backward)
    plan = C.cuda_plan(*layer, _strategy, call.x.device.index or 0, call.cell)
    refused = "".join(f", not {name} ({why})" for name, why in plan["refused"].items())
    return f"strategy={plan['strategy']} ({plan['source']}), blocks={plan['blocks']}{refused}"


# Where self-checks leave no kernel: this call in torch's operations, later ones of the dtype as is chosen then.


def _refuse(call: LayerCall, why: str) -> None:
    """Says so to who chooses."""
    if _strategy:
        raise RuntimeError(why)
    if tell_refusal is not None:
        tell_refusal(call.x.dtype, why)


def _refuse_cell(why: str) -> OutputsTuple:
    """Of a cell with options, for which whoever asks takes torch's operations each time."""
    if _strategy:
        raise RuntimeError(why)
    warn_once(f"lstm_ext runs LSTMs with options in torch's operations: {why}")
    return NotImplemented
