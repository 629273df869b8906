"""What the compiled core refuses: in the words of `checks.check`, or by leaving it to its caller."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import lstm_ext.torch_op  # noqa: F401 (makes the native module take tensors)
from lstm_ext import _native
from lstm_ext.call import BOTH, FORWARD, LayerCall, Needs, OutputGrads, Save, Saved
from lstm_ext.checks import check
from lstm_ext.engines import cpu
from lstm_ext.engines import numpy as numpy_engine

from .conftest import needs_native
from .test_bad_input import KINDS, WRONG, B, H, I, T, arguments, half, integers

pytestmark = [needs_native, pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")]


# Errors --------------------------------------------------------------------------------------------------------------


def layer_call(a: dict[str, Any]) -> LayerCall:
    """The arguments as a call of a layer."""
    weights = [a[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    return LayerCall(a["x"], a["h0"][None], a["c0"][None], weights, a["lengths"], a["resets"], None, FORWARD, False)


def masked_call(kind: str) -> LayerCall:
    return layer_call(arguments(kind))


def plain_call(kind: str) -> LayerCall:
    return masked_call(kind)._replace(lengths=None, resets=None)


def both_call(kind: str) -> LayerCall:
    call = plain_call(kind)
    return call._replace(h0=None, c0=None, weights=call.weights * 2, directions=BOTH)


def projected_call(kind: str) -> LayerCall:
    """To 3 of the 7 units."""
    call = plain_call(kind)
    w_ih, w_hh, b_ih, b_hh = call.weights
    return call._replace(h0=call.h0[..., :3], weights=[w_ih, w_hh[:, :3], b_ih, b_hh, w_hh[:3]])


def batch_first_call(kind: str) -> LayerCall:
    call = plain_call(kind)
    return call._replace(x=call.x.swapaxes(0, 1), batch_first=True)


def step_call(kind: str) -> LayerCall:
    """Of one step, without a time axis."""
    call = plain_call(kind)
    return call._replace(x=call.x[0], h0=call.h0[0], c0=call.c0[0])


def packed_call(batch_sizes: Any) -> Callable[[str], LayerCall]:
    """Of T * B rows."""

    def make(kind: str) -> LayerCall:
        call, sizes = plain_call(kind), np.array(batch_sizes)
        sizes = torch.from_numpy(sizes) if kind == "torch" else sizes
        return call._replace(x=call.x.reshape(T * B, I), h0=None, c0=None, batch_sizes=sizes)

    return make


def refusal(run: Callable[..., Any], *arguments: Any) -> str:
    """Type and text of the error."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(*arguments)
    return f"{caught.type.__name__}: {caught.value}"


NO_ARRAY = {"NoneType", "list", "got None", "got list"}  # which the core leaves to its caller


def assert_refused_alike(call: LayerCall) -> None:
    said = refusal(_native.C.layer_forward, call, Save.NOTHING)
    assert refusal(check, call) == said
    assert refusal(numpy_engine.forward, call, Save.NOTHING) == said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name, change, _, words in WRONG if name != "state" and not NO_ARRAY.intersection(words)],
)
def test_the_core_refuses_in_the_words_of_check(kind: str, name: str, change: Callable[[Any], Any]) -> None:
    a = arguments(kind)
    a[name] = change(a[name])
    assert_refused_alike(layer_call(a))


Change = Callable[[LayerCall], LayerCall]


def changed(**fields: Callable[[LayerCall], Any]) -> Change:
    """Puts the values of these functions of a call for its fields."""
    return lambda call: call._replace(**{name: of(call) for name, of in fields.items()})


def weights(of: Callable[[list[Any]], list[Any]]) -> Change:
    return lambda call: call._replace(weights=of(call.weights))


# what a call is made of, and what is changed in it
WRONG_CALLS: dict[str, tuple[Callable[[str], LayerCall], Change]] = {
    "4-D": (plain_call, changed(x=lambda call: call.x[None])),
    "batch first": (plain_call, changed(batch_first=lambda _: True)),
    "complex": (plain_call, changed(x=lambda call: call.x + 0j)),
    "lengths: 2-D": (masked_call, changed(lengths=lambda call: call.lengths[None])),
    "lengths: bool": (masked_call, changed(lengths=lambda call: call.lengths > 0)),
    "weights: none": (plain_call, weights(lambda w: [])),
    "weights: one": (plain_call, weights(lambda w: w[:1])),
    "weights: six": (plain_call, weights(lambda w: [*w, *w[:2]])),
    "weights: w_hr": (plain_call, weights(lambda w: [*w, w[1][:3, :6]])),
    "weights: other dtype": (plain_call, weights(lambda w: [half(each) for each in w])),
    "weights: one of another dtype": (plain_call, weights(lambda w: [half(w[0]), *w[1:]])),
    "weights: integers": (plain_call, weights(lambda w: [integers(each) for each in w])),
    "weights: w_ih and w_hh transposed": (plain_call, weights(lambda w: [w[0].T, w[1].T, *w[2:]])),
    "weights: w_hh transposed": (plain_call, weights(lambda w: [w[0], w[1].T, *w[2:]])),
    "weights: w_hh transposed, projected": (projected_call, weights(lambda w: [w[0], w[1].T, *w[2:]])),
    "weights: w_hr transposed": (projected_call, weights(lambda w: [*w[:4], w[4].T])),
    "state: swapped": (projected_call, changed(h0=lambda call: call.c0, c0=lambda call: call.h0)),
    "state: both without directions": (
        both_call,
        changed(h0=lambda call: call.x[0, :, :1] @ call.weights[0].T[:1, :H]),
    ),
    "x: width, both": (both_call, changed(x=lambda call: call.x[..., 1:])),
    "x: width, batch first": (batch_first_call, changed(x=lambda call: call.x[..., 1:])),
    "batch first: lengths": (batch_first_call, changed(lengths=lambda call: call.x[0, :, 0].argsort())),
    "batch first: resets": (batch_first_call, changed(resets=lambda call: call.x[..., 0].T > 0)),
    "batch first: h0": (batch_first_call, changed(h0=lambda call: call.x[:1] @ call.weights[0].T[:, :H])),
    "weights: reverse": (both_call, weights(lambda w: [*w[:4], w[4], w[5][:, 1:], *w[6:]])),
    "step: rows of h": (step_call, changed(h0=lambda call: call.h0[1:])),
    "step: width of c": (step_call, changed(c0=lambda call: call.c0[:, 1:])),
    "step: 1-D h": (step_call, changed(h0=lambda call: call.h0[0])),
    "step: 3-D h": (step_call, changed(h0=lambda call: call.h0[None])),
    "step: no batch": (step_call, changed(x=lambda call: call.x[0])),
    "step: lengths": (step_call, changed(lengths=lambda call: call.x[:, 0].argsort())),
    "step: resets": (step_call, changed(resets=lambda call: call.x > 0)),
    "step: rows of resets": (step_call, changed(resets=lambda call: call.x[1:, 0] > 0)),
    "step: width of x": (step_call, changed(x=lambda call: call.x[:, 1:])),
    "step: width of x without a batch": (step_call, changed(x=lambda call: call.x[0, 1:])),
    "step: both": (step_call, changed(directions=lambda _: BOTH, weights=lambda call: call.weights * 2)),
    "packed: too few": (packed_call([3, 3, 3, 2]), changed()),
    "packed: width of x": (packed_call([3, 3, 3, 3]), changed(x=lambda call: call.x[:, 1:])),
    "packed: rising": (packed_call([2, 3, 3, 4]), changed()),
    "packed: a zero": (packed_call([3, 3, 3, 3, 0]), changed()),
    "packed: floats": (packed_call([3.0, 3.0, 3.0, 3.0]), changed()),
    "packed: 2-D sizes": (packed_call([[3, 3], [3, 3]]), changed()),
    "packed: 3-D x": (packed_call([3, 3, 3, 3]), changed(x=lambda call: call.x[None])),
    "packed: h0": (packed_call([4, 4, 4]), changed(h0=lambda call: call.x[None, :3] @ call.weights[0].T[:, :H])),
    "packed: batch first": (packed_call([3, 3, 3, 3]), changed(batch_first=lambda _: True)),
    "packed: lengths": (packed_call([3, 3, 3, 3]), changed(lengths=lambda call: call.batch_sizes[:3])),
    "packed: resets": (packed_call([3, 3, 3, 3]), changed(resets=lambda call: call.x[:, :1] > 0)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRONG_CALLS)
def test_the_core_refuses_calls_in_the_words_of_check(kind: str, name: str) -> None:
    make, change = WRONG_CALLS[name]
    assert_refused_alike(change(make(kind)))


@pytest.mark.parametrize("name", ["w_hh", "h0", "c0", "lengths", "resets"])
def test_the_core_refuses_another_device_in_the_words_of_check(name: str) -> None:
    a = arguments("torch")
    a[name] = a[name].to("meta")
    assert_refused_alike(layer_call(a))


@pytest.mark.parametrize("name", ["x", "w_ih"])
def test_the_core_refuses_a_sparse_tensor_in_the_words_of_check(name: str) -> None:
    a = arguments("torch")
    a[name] = a[name].to_sparse()
    assert_refused_alike(layer_call(a))


WRONG_GRADS: dict[str, Callable[[Any], Any]] = {
    "rows": lambda a: a[1:],
    "width": lambda a: a[..., 1:],
    "rank": lambda a: a[0],
    "dtype": half,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [*WRONG_GRADS, "missing"])
@pytest.mark.parametrize("name", [*OutputGrads._fields, "cells", "gates"])
def test_backward_passes_refuse_alike(name: str, wrong: str, kind: str) -> None:
    """The gradients of the outputs, and what the forward pass left."""
    if wrong == "missing" and name in OutputGrads._fields:
        return  # is zeros
    call = layer_call(arguments(kind))
    y, h_n, c_n, cells, gates = _native.C.layer_forward(call, Save.ALL)
    given = {"dy": y, "dh_n": h_n, "dc_n": c_n, "dcells": cells, "cells": cells, "gates": gates}
    given[name] = None if wrong == "missing" else WRONG_GRADS[wrong](given[name])
    saved, grads = Saved(given["cells"], given["gates"]), OutputGrads(*(given[name] for name in OutputGrads._fields))
    said = refusal(_native.C.layer_backward, call, saved, grads, Needs.ALL)
    assert said.startswith(("RuntimeError: " + name, "TypeError: cells, gates"))
    assert refusal(numpy_engine.backward, call, saved, grads, Needs.ALL) == said


# What is no plain array ----------------------------------------------------------------------------------------------


class OfNumpy(np.ndarray):
    """A subclass may mean more than its memory."""


class OfTorch(torch.Tensor):
    """The same."""


def memory_mapped(a: np.ndarray) -> np.ndarray:
    """The same numbers in a file that is mapped."""
    with tempfile.TemporaryFile() as file:
        file.write(a.tobytes())
        file.flush()
        return np.memmap(file, a.dtype, "r", shape=a.shape)


NOT_PLAIN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "subclass": ("numpy", lambda a: a.view(OfNumpy)),
    "memmap": ("numpy", memory_mapped),
    "matrix": ("numpy", lambda a: np.matrix(a.reshape(-1, a.shape[-1]))),
    "masked": ("numpy", lambda a: np.ma.masked_array(a)),
    "list": ("numpy", lambda a: a.tolist()),
    "scalar": ("numpy", lambda _: 1.0),
    "text": ("numpy", lambda _: "x"),
    "tensor among arrays": ("numpy", torch.from_numpy),
    "subclass of Tensor": ("torch", lambda a: a.as_subclass(OfTorch)),
    "array among tensors": ("torch", lambda a: a.numpy()),
    "list among tensors": ("torch", lambda a: a.tolist()),
}


ENGINES = [cpu, numpy_engine]


@pytest.mark.parametrize("name", ["x", "w_ih", "b_hh", "h0", "c0", "lengths", "resets", "batch_sizes"])
@pytest.mark.parametrize("odd", NOT_PLAIN)
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__.rpartition(".")[2])
def test_an_engine_leaves_what_is_no_plain_array_to_its_caller(engine: Any, odd: str, name: str) -> None:
    """It says NotImplemented, and no exception, whatever else may be wrong."""
    kind, change = NOT_PLAIN[odd]
    a = arguments(kind)
    call = packed_call([3, 3, 3, 3])(kind) if name == "batch_sizes" else layer_call(a)
    if name in ("w_ih", "b_hh"):
        n = ("w_ih", "w_hh", "b_ih", "b_hh").index(name)
        strange = call._replace(weights=[*call.weights[:n], change(call.weights[n]), *call.weights[n + 1 :]])
    else:
        strange = call._replace(**{name: change(getattr(call, name))})
    assert engine.forward(strange, Save.NOTHING) is NotImplemented
    y, h_n, c_n, cells, gates = engine.forward(call, Save.ALL)
    saved, grads = Saved(cells, gates), OutputGrads(y, h_n, c_n, cells)
    assert engine.backward(strange, saved, grads, Needs.ALL) is NotImplemented


@pytest.mark.parametrize("name", [*OutputGrads._fields, "cells", "gates"])
@pytest.mark.parametrize("odd", NOT_PLAIN)
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__.rpartition(".")[2])
def test_an_engine_leaves_gradients_that_are_no_plain_arrays_to_its_caller(engine: Any, odd: str, name: str) -> None:
    kind, change = NOT_PLAIN[odd]
    call = layer_call(arguments(kind))
    y, h_n, c_n, cells, gates = engine.forward(call, Save.ALL)
    given = {"dy": y, "dh_n": h_n, "dc_n": c_n, "dcells": cells, "cells": cells, "gates": gates}
    given[name] = change(given[name])
    saved, grads = Saved(given["cells"], given["gates"]), OutputGrads(*(given[name] for name in OutputGrads._fields))
    assert engine.backward(call, saved, grads, Needs.ALL) is NotImplemented
