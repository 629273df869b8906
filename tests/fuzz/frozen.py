"""Frozen modules and their streams, against the modules that they were made from."""

from __future__ import annotations

import copy
from math import hypot, sqrt
from random import Random
from typing import Any

import numpy as np
import torch
from mutations import relaid
from target import Named, Results, Target

import lstm_ext
from lstm_ext.frozen_stack import dequantized
from lstm_ext.testing import TOLERANCES, to_float64

OPTIONS: tuple[Named, ...] = (
    *[{}] * 6,
    {"forget_bias": 1.0, "cell_clip": 0.5},
    {"peephole": True, "coupled": True},
    {"layer_norm": True},
    {"activation": "relu"},
    {"recurrent_activation": "hard_sigmoid", "activation": "softsign"},
    {"zoneout": (0.2, 0.3), "proj_clip": 0.05},
)
STORED = (  # the module's dtype, and how its weights are
    *[("float32", None)] * 4,
    *[("float32", "bfloat16")] * 3,
    *[("float32", "int8")] * 4,
    *[("float64", None), ("float64", "int8"), ("float16", None), ("bfloat16", None)],
)
PLANS: tuple[Named, ...] = (
    *[{}] * 6,
    *[{"chunk_steps": 1}, {"in_place": True}, {"threads": 2, "by_rows": True}],
    {"threads": 3, "by_rows": False, "chunk_steps": 2},
    {"threads": 1},  # then layers may work at the same time
)


def draw_module(rng: Random, dtype: torch.dtype, forward: bool) -> Any:
    """An `LSTM` or a cell; `forward`: of one direction."""
    torch.default_generator.manual_seed(rng.randrange(2**32))
    I, H = rng.choice((1, 2, 3, 7, 16, 17, 131)), rng.choice((1, 2, 5, 8, 13, 16, 17, 33, 70))  # noqa: E741
    options, kind = {"dtype": dtype, **rng.choice(OPTIONS)}, rng.random()
    if kind < 0.1:
        activation = rng.choice((None, "relu", "sigmoid"))
        return lstm_ext.BasicLSTMCell(H, input_size=I, activation=activation, dtype=dtype)
    options["bias"] = rng.random() < 0.7
    # Of few numbers a norm makes large ones, and rounding grows as no tolerance has it.
    P = 0 if kind < 0.25 or "layer_norm" in options else rng.choice((0, 0, 1, 3, 9))
    if P == 0 or P >= H:
        P, _ = 0, options.pop("proj_clip", None)
    if kind < 0.25:
        return lstm_ext.LSTMCell(I, H, **options)
    options |= {"num_layers": rng.choice((1, 1, 2, 3)), "batch_first": rng.random() < 0.3, "proj_size": P}
    return lstm_ext.LSTM(I, H, **options, bidirectional=not forward and rng.random() < 0.4)


def native(a: Any) -> Any:
    """A tensor of the same numbers, laid out as usual."""
    if a is None:
        return None
    return a.resolve_neg() if isinstance(a, torch.Tensor) else torch.from_numpy(a.astype(a.dtype.newbyteorder("=")))


class Subject:
    """A module, the same frozen, and a call of both."""

    def __init__(self, rng: Random, tensors: bool, forward: bool = False):
        dtype, weights = rng.choice(STORED)
        self.module = draw_module(rng, getattr(torch, dtype), forward).eval()
        for name, weight in list(self.module.named_parameters()):
            if rng.random() < 0.05:
                setattr(self.module, name, torch.nn.Parameter(relaid(rng, weight.detach()).resolve_neg()))
        self.frozen: Any = lstm_ext.freeze(self.module, weights)
        self.spec = self.frozen._spec
        self.is_cell, self.plan = self.spec.kind != "LSTM", rng.choice(PLANS)
        self.named = self.draw(rng, tensors or self.spec.dtype == "bfloat16", 1 if forward else 0)

    def draw(self, rng: Random, tensors: bool, fewest: int) -> Named:
        """The arguments of a call, each laid out in whichever way."""
        spec, T, B = self.spec, rng.randint(1, 7), max(rng.choice((0, 1, 1, 2, 3, 5, 9)), fewest)
        own = np.random.default_rng(rng.randrange(2**32))
        rows = (B,) if self.is_cell else (B, T) if spec.batch_first else (T, B)
        states = (B,) if self.is_cell else (spec.num_layers * spec.num_directions, B)

        def given(a: Any) -> Any:
            if a is None:
                return None
            a = torch.from_numpy(a)
            a = a.to(getattr(torch, spec.dtype)) if a.is_floating_point() else a
            a = a if tensors else a.numpy()
            return relaid(rng, a) if rng.random() < 0.1 else a

        x, lengths = own.standard_normal((*rows, spec.input_size)), None
        if not self.is_cell and rng.random() < 0.3:
            lengths = own.integers(0, T + 1, B)
            past = np.arange(T)[:, None] >= lengths
            x[past.T if spec.batch_first else past] = np.nan
        resets = own.random(rows) < 0.3 if spec.kind != "TensorFlowCell" and rng.random() < 0.3 else None
        h0 = c0 = None
        if rng.random() < 0.6:
            h0, c0 = (own.standard_normal((*states, width)) for width in (spec.width, spec.hidden_size))
        batch_sizes = None
        if tensors and not self.is_cell and not fewest and B and rng.random() < 0.2:
            lengths = resets = None
            batch_sizes = (np.arange(T)[:, None] < np.append(own.integers(1, T + 1, B - 1), T)).sum(1)
            x = own.standard_normal((batch_sizes.sum(), spec.input_size))
        arrays = {"x": x, "h0": h0, "c0": c0, "lengths": lengths, "resets": resets, "batch_sizes": batch_sizes}
        return {name: given(a) for name, a in arrays.items()}

    def run(self, module: Any, named: Named) -> Named:
        """What a module gives, by name."""
        h0, c0, first_c = named["h0"], named["c0"], self.spec.kind == "TensorFlowCell"
        pair = None if h0 is None and c0 is None else (c0, h0) if first_c else (h0, c0)
        masks = {name: named[name] for name in ("lengths", "resets") if named[name] is not None}
        x, batch_sizes = named["x"], named["batch_sizes"]
        if batch_sizes is not None:
            if not isinstance(batch_sizes, torch.Tensor):
                raise TypeError("torch makes no PackedSequence of it")
            x = torch.nn.utils.rnn.PackedSequence(x, batch_sizes)
        with torch.no_grad(), lstm_ext.engines.cpu.use_plan(**self.plan):
            output, state = module(x, named.get("state", pair), **masks)
        if not self.is_cell:
            return {"y": output if batch_sizes is None else output.data, "h_n": state[0], "c_n": state[1]}
        return {"y": output, "c_n": state[0] if first_c else state}

    def oracle(self) -> Named:
        """What the module gives in float64, with the matrices that the frozen one has stored."""
        names = [name for name in self.spec.names() if "_scale" not in name]
        wide = dequantized(self.frozen._tensors, self.spec)
        stored = {name: a for name, a in zip(names, wide, strict=True) if name.startswith("weight")}
        if self.spec.kind == "TensorFlowCell":
            both = torch.cat([stored["weight_ih"], stored["weight_hh"]], 1).reshape(4, self.spec.hidden_size, -1)
            stored = {"kernel": both[[0, 2, 1, 3]].flatten(0, 1).T}  # i j f o
        exact = copy.deepcopy(self.module).double()
        exact.load_state_dict({**exact.state_dict(), **stored})
        named = {name: native(a) for name, a in self.named.items()}
        for name in ("x", "h0", "c0"):
            named[name] = None if named[name] is None else named[name].double()
        return self.run(exact, named)

    def compare(self, actual: Results, expected: Results) -> None:
        for name, a in actual[0].items():
            given, exact = to_float64(a), to_float64(expected[0][name])
            assert given.shape == exact.shape, f"{name}: shape {given.shape}, expected {exact.shape}"
            error, allowed = np.abs(given - exact).max(initial=0), self.allowed() * max(1, np.abs(exact).max(initial=0))
            assert error <= allowed, f"{name}: off by {error:.3g}, allowed are {allowed:.3g}, of {self.frozen}"

    def allowed(self) -> float:
        """The largest error of numbers up to 1. A norm divides by the deviation of sums; seen were 24 times as much.

        Weights that are stored as bfloat16 are multiplied exactly, as float32. Of int8 ones the numbers that they are
        multiplied with are rounded to integers, of a scale s that the largest of a row of K sets: a sum of K products
        with w is then off by ||w|| s / sqrt(12) on average (`noise`); steps damp that and layers add it up. Seen were
        1.8 times as much, and 6 are allowed.
        """
        spec = self.spec
        terms = max(spec.input_size, spec.num_directions * spec.width) + spec.width
        terms += spec.hidden_size if spec.proj_size else 0
        error = TOLERANCES[spec.dtype](terms) + (6 * self.noise() if spec.weights == "int8" else 0)
        return error * spec.num_layers * (30 if "gamma" in spec.extra else 1)

    def noise(self) -> float:
        """How far the sums of the worst gate and of the worst h are off, on average."""
        names = [name for name in self.spec.names() if "_scale" not in name]
        wide = dict(zip(names, dequantized(self.frozen._tensors, self.spec), strict=True))
        bound = max([w.abs().sum(1).max().item() for name, w in wide.items() if "_hr" in name], default=1.0)
        x, h0 = (largest(self.named[name]) for name in ("x", "h0"))
        factors = {"weight_ih": max(x, bound), "weight_hh": max(h0, bound), "weight_hr": 1.0}
        worst = dict.fromkeys(factors, 0.0)
        for name, w in wide.items():
            if kind := name[:9] if name.startswith("weight") else "":
                K = w.shape[1]
                narrow = kind == "weight_ih" and K >= 128 and "gamma" not in self.spec.extra
                scale = factors[kind] / min(127 if narrow else 32766, (2**31 - 1) // (127 * K))
                worst[kind] = max(worst[kind], w.norm(dim=1).max().item() * scale / sqrt(12))
        return hypot(worst["weight_ih"], worst["weight_hh"]) + worst["weight_hr"]


def largest(a: Any) -> float:
    return 0.0 if a is None or 0 in a.shape else native(a).double().abs().nan_to_num(0).max().item()


def frozen(rng: Random, tensors: bool) -> Target:
    """A frozen module."""
    subject = Subject(rng, tensors)

    def call(named: Named) -> Results:
        return subject.run(subject.frozen, named), {}

    return Target(subject.named, call, lambda: (subject.oracle(), {}), subject.compare)


def stream(rng: Random, tensors: bool) -> Target:
    """A stream, in one or two pieces, with an array for its output or without."""
    if rng.random() < 0.1:
        return overlapping(rng, tensors)
    subject = Subject(rng, tensors, forward=True)
    frozen, spec, named = subject.frozen, subject.spec, dict(subject.named)
    del named["batch_sizes"]
    axis = 1 if spec.batch_first else 0
    batch_size = named["x"].shape[0 if subject.is_cell else 1 - axis]
    named["out"] = None
    if rng.random() < 0.5:
        shape, like = (*named["x"].shape[:-1], spec.width), native(named["x"])
        named["out"] = like.new_full(shape, float("nan"))
        if not isinstance(named["x"], torch.Tensor):
            named["out"] = named["out"].numpy()
    whole = subject.is_cell or named["out"] is not None or rng.random() < 0.5

    def call(changed: Named) -> Results:
        used = frozen.stream(batch_size)
        if changed["h0"] is not None or changed["c0"] is not None:
            h0, c0 = (a[None] if subject.is_cell and hasattr(a, "shape") else a for a in (changed["h0"], changed["c0"]))
            used.state = h0, c0
        if "state" in changed:
            used.state = changed["state"]
        before = used.state
        x, masks = changed["x"], {name: changed[name] for name in ("lengths", "resets")}
        try:
            if whole or changed is not named or named["lengths"] is not None or x.shape[axis] < 2:
                y = used(x, out=changed["out"], **masks)
                assert changed["out"] is None or y is changed["out"]
            else:
                y = in_pieces(used, x, masks["resets"], axis)
        except Exception:
            same = [
                torch.allclose(*pair, rtol=0, atol=0, equal_nan=True) for pair in zip(used.state, before, strict=True)
            ]
            assert all(same), "a call that was refused has changed the state"
            raise
        h, c = used.state
        return ({"y": y, "c_n": c[0]} if subject.is_cell else {"y": y, "h_n": h, "c_n": c}), {}

    return Target(named, call, lambda: (subject.oracle(), {}), subject.compare, written=("out",))


def in_pieces(used: Any, x: Any, resets: Any, axis: int) -> Any:
    """The outputs of two calls that follow each other."""
    first, second = ((slice(None),) * axis + (part,) for part in (slice(1), slice(1, None)))
    pieces = [used(x[part], resets=None if resets is None else resets[part]) for part in (first, second)]
    return (torch.cat if isinstance(x, torch.Tensor) else np.concatenate)(pieces, axis)


def overlapping(rng: Random, tensors: bool) -> Target:
    """A stream whose input and output share their last and first number, or lie side by side."""
    subject = Subject(rng, tensors, forward=True)
    spec, x = subject.spec, native(subject.named["x"])
    width, shared = (*x.shape[:-1], spec.width), rng.random() < 0.5
    count = x[..., :1].numel() * spec.width
    memory = x.new_zeros(x.numel() + count - shared)
    begin = memory[: x.numel()].view(x.shape).copy_(x.nan_to_num())
    arrays = [begin, memory[x.numel() - shared :].view(width)]
    if not isinstance(subject.named["x"], torch.Tensor):
        arrays = [a.numpy() for a in arrays]
    named = {"x": arrays[0], "out": arrays[1]}
    used = subject.frozen.stream(x.shape[0 if subject.is_cell or spec.batch_first else 1])

    def call(changed: Named) -> Results:
        taken = True
        try:
            used(changed["x"], out=changed["out"])
        except ValueError:
            taken = False
        assert changed is not named or taken != shared, f"out= was {'taken' if taken else 'refused'}"
        return {}, {}

    return Target(named, call, lambda: ({}, {}), subject.compare, written=("out",))
