"""Cases: a call of the package that is valid, or was until something was done to its arguments."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import torch
from frozen import frozen, stream
from mutations import ODD, bytes_of, relaid, spoilt
from target import DOCUMENTED, Named, Target, within

import lstm_ext.ops  # from now on the core takes tensors
from lstm_ext import _native
from lstm_ext.call import BOTH, FORWARD, REVERSE, LayerCall, Needs, Save, Saved
from lstm_ext.testing import Case, Inputs, make_inputs, run_oracle

C: Any = _native.C

# Of modules, as torch's own, a wrong call may raise also what Python says of a state that is no pair of tensors.
AS_TORCH = (*DOCUMENTED, AttributeError, IndexError, KeyError)


# Cases that are valid ------------------------------------------------------------------------------------------------


def draw_case(rng: Random, **fixed: Any) -> Case:
    sizes = {"T": rng.randint(1, 7), "B": rng.randint(0, 9), "I": rng.choice((0, 1, 2, 3, 7, 16, 17))}
    sizes["H"] = rng.choice((1, 2, 3, 5, 8, 13, 16, 17, 33))
    options: Named = {
        "P": rng.choice((0, 0, 1, 3, 9)),
        "bias": rng.random() < 0.7,
        "directions": rng.choice((FORWARD, REVERSE, BOTH)),
        "batch_first": rng.random() < 0.3,
        "lengths": rng.choice((None, None, "ragged", "with_zero", "full")),
        "resets": rng.random() < 0.3,
        "packed": rng.random() < 0.2,
        "state": rng.random() < 0.7,
    }
    options["P"] = min(options["P"], sizes["H"])  # wider, rounding grows as no tolerance has it
    options |= fixed
    if options["packed"]:
        options |= {"lengths": None, "resets": False, "batch_first": False}
        sizes["B"] = max(sizes["B"], 1)
    return Case(**sizes | options)


def draw_inputs(rng: Random, case: Case, tensors: bool, dtypes: str = "") -> tuple[str, Inputs, Inputs]:
    """A dtype, NumPy inputs of its numbers, and the same as they are given, laid out in whichever way."""
    names = dtypes or ("float32 float32 float64 float16 bfloat16" if tensors else "float32 float32 float64 float16")
    if case.H < 8:  # few units average too little of the gates' rounding to a half type out, once in 10,000 cases
        names = "float32 float64"
    dtype = rng.choice(names.split())
    drawn = make_inputs(case, dtype, rng.randrange(2**32))
    given = drawn.to_torch(dtype) if tensors else drawn

    def laid(a: Any) -> Any:
        return relaid(rng, a) if rng.random() < 0.1 else a

    return dtype, drawn, given.map(laid).map_masks(laid)


def differentiate(outputs: Named, inputs: Inputs, given: Named) -> Named:
    """The gradients of tensors, by the names of the oracle."""
    grads = {"y": inputs.dy, "h_n": inputs.dh_n, "c_n": inputs.dc_n}
    pairs = [(a, grads[name].reshape(a.shape)) for name, a in outputs.items() if name in grads and a.requires_grad]
    wanted = {name: a for name, a in given.items() if a is not None}
    if not pairs:
        return {}
    found = torch.autograd.grad(*map(list, (next(zip(*pairs, strict=True)), wanted.values())), [g for _, g in pairs])
    return dict(zip(wanted, found, strict=True))


# Entry points --------------------------------------------------------------------------------------------------------


def weights_of(named: Named) -> list[Any]:
    return [a for name, a in named.items() if name.startswith("weights[")]


def numbered(weights: list[Any]) -> Named:
    return {f"weights[{n}]": w for n, w in enumerate(weights)}


def core(rng: Random, tensors: bool) -> Target:
    """The compiled module, forward and backward."""
    case = draw_case(rng)
    dtype, drawn, given = draw_inputs(rng, case, tensors)
    fields = given.call._asdict()
    saved = C.layer_forward(given.call, Save.ALL)
    named = {name: a for name, a in fields.items() if name != "weights"} | numbered(fields["weights"])
    named |= given.grads._asdict() | dict(zip(Saved._fields, (*saved[3:], None), strict=True))
    named |= {"save": Save.ALL, "needs": Needs.ALL, "num_threads": rng.choice((0, 1, 2, 3))}

    def call(named: Named) -> tuple[Named, Named]:
        asked = LayerCall(**{f: weights_of(named) if f == "weights" else named[f] for f in LayerCall._fields})
        threads = named["num_threads"]
        outputs = C.layer_forward(named.get("call", tuple(asked)), named["save"], threads)
        kept, grads = tuple(named[n] for n in Saved._fields), tuple(named[n] for n in given.grads._fields)
        gradients = C.layer_backward(named.get("call", asked), kept, grads, named["needs"], threads)
        if outputs is NotImplemented or gradients is NotImplemented:
            return {}, {}
        names = ("y", "h_n", "c_n", "cells", "gates")
        found = dict(zip(("dx", "dh0", "dc0"), gradients, strict=False))
        found |= {f"d{name}": a for name, a in numbered(gradients[3] or []).items()}
        return dict(zip(names, outputs, strict=True)), found

    return Target(named, call, lambda: run_oracle(drawn), within(case, dtype), whole="call")


def lstm(rng: Random, tensors: bool) -> Target:
    case = draw_case(rng, packed=False, batch_first=False, directions=rng.choice((FORWARD, REVERSE)))
    dtype, drawn, given = draw_inputs(rng, case, tensors)
    learn = tensors and rng.random() < 0.5
    if learn:
        given = given.map(lambda a: a.detach().requires_grad_())
    w = given.call.split()[0]
    named = {"x": given.x, "h0": None if given.h0 is None else given.h0[0], "c0": None, **w._asdict()}
    named |= {"c0": None if given.c0 is None else given.c0[0], "reverse": case.directions == REVERSE}
    named |= {"lengths": given.lengths, "resets": given.resets, "return_cells": rng.random() < 0.3}

    def call(named: Named) -> tuple[Named, Named]:
        named = dict(named)
        h0, c0 = named.pop("h0"), named.pop("c0")
        state = named.pop("state", None if h0 is None and c0 is None else (h0, c0))
        x, w_ih, w_hh = (named.pop(name) for name in ("x", "w_ih", "w_hh"))
        y, (h_n, c_n), *_ = lstm_ext.lstm(x, state, w_ih, w_hh, **named)
        outputs = {"y": y, "h_n": h_n[None], "c_n": c_n[None]}
        leaves = {"dx": given.x, "dh0": given.h0, "dc0": given.c0} | {
            f"d{name}": a for name, a in numbered(given.weights).items()
        }
        return outputs, differentiate(outputs, given, leaves) if learn and x is given.x else {}

    return Target(named, call, lambda: run_oracle(replace(drawn, dcells=None)), within(case, dtype))


def cell(rng: Random, tensors: bool) -> Target:
    """`lstm_cell`, and the modules of one step."""
    case = draw_case(rng, T=1, P=0, packed=False, batch_first=False, directions=FORWARD, lengths=None, resets=False)
    which = rng.choice(("lstm_cell", "LSTMCell", "BasicLSTMCell")) if tensors else "lstm_cell"
    basic = which == "BasicLSTMCell"
    if basic or (which == "LSTMCell" and case.I == 0):
        case = replace(case, bias=True, I=max(case.I, 1))
    dtype, drawn, given = draw_inputs(rng, case, tensors, "float32 float64" if basic else "")
    if basic:  # has one bias
        drawn, given = (replace(a, weights=[*a.weights[:3], 0 * a.weights[3]]) for a in (drawn, given))
    step, expected = given.without_time(), drawn.without_time()
    named = {"x": step.x, "h0": step.h0, "c0": step.c0} | numbered(step.weights)

    def state_of(named: Named) -> Any:
        h, c = named["h0"], named["c0"]
        return named.get("state", None if h is None and c is None else (c, h) if basic else (h, c))

    def call(named: Named) -> tuple[Named, Named]:
        x, weights = named["x"], weights_of(named)
        if which == "lstm_cell":
            h, c = lstm_ext.lstm_cell(x, state_of(named), *weights)
        elif which == "LSTMCell":
            module = lstm_ext.LSTMCell(case.I, case.H, case.bias, dtype=getattr(torch, dtype))
            assign(module, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights)
            h, c = module(x, state_of(named))
        else:
            module = lstm_ext.BasicLSTMCell(case.H, forget_bias=0.0, input_size=case.I, dtype=getattr(torch, dtype))
            own = torch.tensor([0, 2, 1, 3])  # i j f o
            kernel = torch.cat(weights[:2], 1).reshape(4, case.H, -1)[own].flatten(0, 1).T
            assign(module, ("kernel", "bias"), [kernel, weights[2].reshape(4, case.H)[own].flatten()])
            h, (c, _) = module(x, state_of(named))
        return {"y": h, "c_n": c}, {}

    errors = DOCUMENTED if which == "lstm_cell" else AS_TORCH
    return Target(named, call, lambda: run_oracle(expected), within(case, dtype), errors)


def assign(module: torch.nn.Module, names: Any, weights: list[Any]) -> None:
    for name, weight in zip(names, weights, strict=False):
        weight = weight.detach().resolve_neg()  # of a Parameter nobody asks: see SECURITY.md
        setattr(module, name, torch.nn.Parameter(weight, requires_grad=weight.dtype.is_floating_point))


def module(rng: Random, tensors: bool) -> Target:
    case = draw_case(rng, directions=rng.choice((FORWARD, BOTH)))
    case = replace(case, I=max(case.I, 1), P=case.P if case.P < case.H else 0)
    dtype, drawn, given = draw_inputs(rng, case, True)
    layer = lstm_ext.LSTM(
        *(case.I, case.H, 1, case.bias, case.batch_first, 0.0, case.directions == BOTH, case.P),
        dtype=getattr(torch, dtype),
    )
    names = layer._flat_weights_names
    named = {"x": given.x, "h0": given.h0, "c0": given.c0, "batch_sizes": given.batch_sizes}
    named |= {"lengths": given.lengths, "resets": given.resets, "return_cells": rng.random() < 0.3}
    named |= numbered(given.weights)
    watched = rng.random() < 0.5

    def call(named: Named) -> tuple[Named, Named]:
        assign(layer, names, weights_of(named))
        x, h0, c0 = (named[name] for name in ("x", "h0", "c0"))
        if named["batch_sizes"] is not None:
            x = torch.nn.utils.rnn.PackedSequence(x, named["batch_sizes"])
        hx = named.get("state", None if h0 is None and c0 is None else (h0, c0))
        options = {name: named[name] for name in ("lengths", "resets", "return_cells")}
        with torch.set_grad_enabled(watched):
            y, (h_n, c_n), *_ = layer(x, hx, **options)
        outputs = {"y": y.data if named["batch_sizes"] is not None else y, "h_n": h_n, "c_n": c_n}
        grads = {f"dweights[{n}]": getattr(layer, name) for n, name in enumerate(names)}
        return outputs, differentiate(outputs, given, grads) if watched else {}

    return Target(named, call, lambda: run_oracle(replace(drawn, dcells=None)), within(case, dtype), AS_TORCH)


TARGETS = (*(core, core, lstm, lstm, cell, module) * 4, frozen, stream)  # frozen modules take thrice as long


def lie(rng: Random) -> None:
    """Tells the functions of the core that only the package calls whatever comes to mind."""

    def odd() -> Any:
        return rng.choice((*ODD, 2**62, -(2**62), 2**40, 2**20, "float32", "tiles", (True, None), (torch.Tensor,)))

    def sizes() -> list[int]:
        return [rng.choice((-1, 0, 1, 2, 7, 2**20, 2**31, 2**40, 2**62, 2**63 - 1)) for _ in range(5)]

    lies: tuple[Callable[[], Any], ...] = (
        lambda: C.take_tensor_types(odd(), odd()),
        lambda: C.share_openmp_threads(odd()),
        lambda: C.force_cpu_plan(**{name: odd() for name in rng.sample(PLAN, 2)}),
        lambda: C.cpu_plan(*sizes(), bool(rng.getrandbits(1)), "float32", rng.randint(0, 3), True, rng.randint(-1, 99)),
        lambda: C.cpu_plan(*(odd() for _ in range(10))),
        lambda: lstm_ext.plan(*sizes()[:3], device=rng.choice(("cpu", 0, "cuda")), backward=odd(), num_threads=3),
        lambda: C.layer_forward(tuple(odd() for _ in range(9)), rng.choice(tuple(Save)), odd()),
        lambda: C.layer_backward(*(odd() for _ in range(5))),
        lambda: C.Frozen(odd(), odd(), odd(), odd()),
        lambda: C.Frozen([(odd(), odd(), odd())], FORWARD, rng.choice(("float32", "x")), rng.choice(("int8", "plain"))),
        lambda: FROZEN.stream(odd()),
        lambda: PACKED.run(rng.choice((odd(), tuple(odd() for _ in range(11)))), odd()),
        lambda: PACKED.plans(*sizes()[:2], rng.randint(-1, 99)),
        lambda: C.Stream(rng.choice((PACKED, odd())), rng.choice((odd(), tuple(odd() for _ in range(4))))),
        lambda: C.Stream(PACKED, STATES).step(*(odd() for _ in range(6))),
    )
    try:
        rng.choice(lies)()
    finally:
        C.force_cpu_plan()
        C.take_tensor_types((torch.Tensor, torch.nn.Parameter), torch.get_num_threads)


FROZEN: Any = lstm_ext.freeze(lstm_ext.LSTM(2, 3), "int8")
PACKED = FROZEN._stack.native
STATES = tuple(np.zeros((1, 1, 3), np.float32) for _ in range(4))
PLAN = ("engine", "in_place", "one_sum", "chunk_steps", "depth", "threads", "by_rows")


# One case ------------------------------------------------------------------------------------------------------------


def contents(a: Any) -> bytes | None:
    """What an array holds, if that is little."""
    if isinstance(a, np.ndarray) and a.size < 10**5:
        return a.tobytes()
    if isinstance(a, torch.Tensor) and a.layout is torch.strided and a.numel() < 10**5 and not a.is_meta:
        return bytes_of(a.detach().resolve_conj().resolve_neg()).tobytes()
    return None


def run(seed: int, n: int) -> str:
    """Case n: "right", "refused" or "accepted"; raises what it should not have."""
    rng = Random(f"{seed} {n}")
    if rng.random() < 0.05:
        try:
            lie(rng)
        except (*DOCUMENTED, AttributeError):
            return "refused"
        return "accepted"
    target = rng.choice(TARGETS)(rng, rng.random() < 0.6)
    valid = rng.random() < 0.25
    with ExitStack() as stack:
        if valid and rng.random() < 0.05:
            stack.enter_context(lstm_ext.use_backend("numpy"))
        if valid:
            return judge_valid(target)
        named = dict(target.named)
        for name in rng.sample([*named, target.whole], rng.choice((1, 1, 1, 2, 3))):
            named[name] = spoilt(rng, named.get(name))
        before = {name: contents(a) for name, a in named.items()}
        try:
            target.call(named)
            outcome = "accepted"
        except target.errors:
            outcome = "refused"
        assert_kept(target, named, before)
        return outcome


def judge_valid(target: Target) -> str:
    before = {name: contents(a) for name, a in target.named.items()}
    outputs, gradients = target.call(target.named)
    assert_kept(target, target.named, before)
    target.compare((present(outputs), present(gradients)), target.oracle())
    return "right"


def assert_kept(target: Target, named: Named, before: Named) -> None:
    for name, a in named.items():
        assert name in target.written or contents(a) == before[name], f"{name} was written to"


def present(arrays: Named) -> Named:
    return {name: a for name, a in arrays.items() if a is not None}
