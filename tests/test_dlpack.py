"""`lstm` and `lstm_cell` on arrays of other libraries: JAX's, and any that speak DLPack."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import lstm_ext
from lstm_ext.call import REVERSE
from lstm_ext.testing import CASES, Case, Inputs, assert_close, make_inputs

PLAIN = [c for c in CASES if not (c.packed or c.batch_first) and c.num_directions == 1]


class ForeignArray:
    """An array that shows nothing but the protocol, dtype and shape; a tensor holds its memory."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.shape = tuple(tensor.shape)

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


class StandardArray(ForeignArray):
    """One that follows the array API standard."""

    def __array_namespace__(self) -> Any:
        return standard


foreign = types.ModuleType("foreign")
foreign.from_dlpack = lambda a: ForeignArray(torch.from_dlpack(a))  # type: ignore[attr-defined]
standard = types.SimpleNamespace(__name__="standard", from_dlpack=lambda a: StandardArray(torch.from_dlpack(a)))


@pytest.fixture(autouse=True)
def _foreign_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "foreign", foreign)
    monkeypatch.setattr(ForeignArray, "__module__", "foreign.arrays")


def call(inputs: Inputs, kind: Callable[[Any], Any] = lambda a: a) -> list[Any]:
    """y, h_n, c_n, cells of `lstm` on the inputs, each made an array of the kind."""
    case = inputs.case
    w_ih, w_hh, *others = map(kind, inputs.weights)
    b_ih, b_hh = others[:2] if case.bias else (None, None)
    y, state, cells = lstm_ext.lstm(
        *(kind(inputs.x), (kind(inputs.h0[0]), kind(inputs.c0[0])) if case.state else None, w_ih, w_hh, b_ih, b_hh),
        w_hr=others[-1] if case.P else None,
        reverse=case.directions == REVERSE,
        lengths=None if inputs.lengths is None else kind(inputs.lengths),
        resets=None if inputs.resets is None else kind(inputs.resets),
        return_cells=True,
    )
    return [y, *state, cells]


@pytest.mark.parametrize("kind", [ForeignArray, StandardArray])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_any_library_gets_its_own_arrays_back(kind: type, dtype: str, device: str) -> None:
    case = Case(5, 3, 7, 13, lengths="with_zero", resets=True)
    tensors = make_inputs(case, dtype).to_torch(dtype)
    tensors = tensors.map(lambda a: a.to(device)).map_masks(lambda a: a.to(device))
    results = call(tensors, kind)
    assert {type(a) for a in results} == {kind}
    for a, expected in zip(results, call(tensors), strict=True):
        assert (a.tensor.dtype, a.tensor.device) == (expected.dtype, expected.device)
        torch.testing.assert_close(a.tensor, expected, rtol=0, atol=0)
    x, w_ih, w_hh = (kind(a) for a in (tensors.x[0], *tensors.weights[:2]))
    h, c = lstm_ext.lstm_cell(x, None, w_ih, w_hh, b_hh=kind(tensors.weights[3]))
    assert type(h) is type(c) is kind
    expected = lstm_ext.lstm_cell(tensors.x[0], None, *tensors.weights[:2], b_hh=tensors.weights[3])
    torch.testing.assert_close((h.tensor, c.tensor), expected, rtol=0, atol=0, equal_nan=True)


def test_memory_is_borrowed_and_not_changed() -> None:
    x, w_ih, w_hh = (torch.randn(shape) for shape in [(3, 2, 4), (20, 4), (20, 5)])
    before = [a.clone() for a in (x, w_ih, w_hh)]
    y, _ = lstm_ext.lstm(*(ForeignArray(x), None, ForeignArray(w_ih), ForeignArray(w_hh)))
    y.tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, w_ih, w_hh), strict=True))


class Homeless(ForeignArray):
    """Of a library that makes no arrays from DLPack."""


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no from_dlpack": ((Homeless, Homeless), TypeError, "x: .*got Homeless, whose library has no from_dlpack"),
    "two libraries": (
        (ForeignArray, StandardArray),
        TypeError,
        "w_ih: expected a foreign array as x is, got standard array",
    ),
    "tensor": ((ForeignArray, lambda a: a), TypeError, r"w_ih: expected a foreign array as x is, got torch\.Tensor"),
    "array for a tensor": ((lambda a: a, ForeignArray), TypeError, r"w_ih: expected a torch\.Tensor as x is, got fore"),
    "array for NumPy": ((np.asarray, ForeignArray), TypeError, r"w_ih: expected a numpy\.ndarray as x is, got foreign"),
    "list": ((ForeignArray, lambda a: a.tolist()), TypeError, "w_ih: expected a foreign array as x is, got list"),
    "requires grad": (
        (ForeignArray, lambda a: ForeignArray(a.requires_grad_())),
        RuntimeError,
        "w_ih: the memory cannot be read through DLPack: .*require",
    ),
    "mixed dtypes": (
        (ForeignArray, lambda a: ForeignArray(a.double())),
        RuntimeError,
        "w_ih: expected dtype float32 as x has, got float64",
    ),
    "half and bfloat16": (
        (lambda a: ForeignArray(a.half()), lambda a: ForeignArray(a.bfloat16())),
        RuntimeError,
        "w_ih: expected dtype float16 as x has, got bfloat16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exchanged_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Homeless, "__module__", "nowhere")
    (of_x, of_w), error, message = REFUSED[name]
    x, w_ih, w_hh = of_x(torch.randn(3, 2, 4)), of_w(torch.randn(20, 4)), of_x(torch.randn(20, 5))
    with pytest.raises(error, match=message):
        lstm_ext.lstm(x, None, w_ih, w_hh)
    with pytest.raises(error, match=message):
        lstm_ext.lstm_cell(of_x(torch.randn(2, 4)), None, w_ih, w_hh)


def test_state_and_masks_are_of_the_same_library() -> None:
    x, w_ih, w_hh, h = (ForeignArray(torch.randn(s)) for s in [(3, 2, 4), (20, 4), (20, 5), (2, 5)])
    with pytest.raises(TypeError, match=r"c0: expected a foreign array as x is, got numpy\.ndarray"):
        lstm_ext.lstm(x, (h, np.zeros((2, 5), np.float32)), w_ih, w_hh)
    with pytest.raises(TypeError, match=r"lengths: expected a foreign array as x is, got list$"):
        lstm_ext.lstm(x, None, w_ih, w_hh, lengths=[3, 2])
    with pytest.raises(
        TypeError, match=r"state: expected None or a pair \(h, c\), got one foreign array of shape \[2, 5\]"
    ):
        lstm_ext.lstm(x, h, w_ih, w_hh)


# JAX -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def jax() -> Any:
    return pytest.importorskip("jax", reason="needs jax (extra `ecosystem`)")


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_jax_arrays(case: Case, jax: Any) -> None:
    inputs = make_inputs(case, "float32")
    for a, expected in zip(call(inputs, jax.numpy.asarray), call(inputs), strict=True):
        assert isinstance(a, jax.Array)
        np.testing.assert_array_equal(np.asarray(a), expected, strict=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_jax_half_types(dtype: str, jax: Any) -> None:
    case = Case(6, 5, 7, 17, lengths="ragged")
    inputs = make_inputs(case, dtype)
    exact = inputs.map(lambda a: a.astype(np.float64))

    def half(a: Any) -> Any:
        return jax.numpy.asarray(a, dtype if np.issubdtype(a.dtype, np.floating) else None)

    for a, e in zip(call(inputs, half), call(exact), strict=True):
        assert isinstance(a, jax.Array)
        assert a.dtype == dtype
        assert_close(np.asarray(a, np.float32), e, dtype, terms=case.output_terms)


def test_jax_results_go_on_in_jax(jax: Any) -> None:
    """A result is computed with, differentiated through what follows, and given back in."""
    jnp = jax.numpy
    x, w_ih, w_hh = (jax.random.normal(jax.random.key(n), s) for n, s in enumerate([(3, 2, 4), (20, 4), (20, 5)]))
    y, state = lstm_ext.lstm(x, None, w_ih, w_hh)
    assert float(jax.jit(jax.grad(lambda a: (a * y).sum()))(y).sum()) == pytest.approx(float(y.sum()))
    again, _ = lstm_ext.lstm(x, state, w_ih, w_hh)
    assert not np.array_equal(again, y)
    lengths = jnp.array([3, 0])
    assert lengths.dtype == "int32"  # JAX's own default
    np.testing.assert_array_equal(lstm_ext.lstm(x, None, w_ih, w_hh, lengths=lengths)[0][:, 0], y[:, 0])


def test_tracers_are_refused_with_the_way_out(jax: Any) -> None:
    jnp = jax.numpy
    x, w_ih, w_hh = jnp.ones((3, 2, 4)), jnp.ones((20, 4)), jnp.ones((20, 5))

    def loss(x: Any, w_ih: Any) -> Any:
        return lstm_ext.lstm(x, None, w_ih, w_hh)[0].sum()

    way_out = r"Tracer: jax\.jit, grad and vmap do not see into lstm_ext; .*jax\.pure_callback"
    for name, transformed in (
        ("x", jax.jit(loss)),
        ("x", jax.grad(loss)),
        ("w_ih", jax.grad(loss, 1)),
        ("x", lambda x, w_ih: jax.jit(lambda x: lstm_ext.lstm_cell(x, None, w_ih, w_hh))(x[0])),
    ):
        with pytest.raises(TypeError, match=rf"{name}: expected a .*{way_out}"):
            transformed(x, w_ih)
    with pytest.raises(TypeError, match=way_out):
        jax.vmap(lambda x: loss(x, w_ih))(x[None])

    def callback(*arrays: Any) -> Any:
        x, *weights = map(np.asarray, arrays)
        return lstm_ext.lstm(x, None, *weights)[0]

    shape = jax.ShapeDtypeStruct((3, 2, 5), "float32")
    y = jax.jit(lambda *arrays: jax.pure_callback(callback, shape, *arrays))(x, w_ih, w_hh)
    np.testing.assert_array_equal(y, lstm_ext.lstm(x, None, w_ih, w_hh)[0])


JAX_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import jax, jax.numpy as jnp, numpy as np, lstm_ext
jax.config.update("jax_num_cpu_devices", 2)
arrays = jnp.ones((3, 2, 4)), None, jnp.ones((20, 4)), jnp.ones((20, 5))
y, _ = lstm_ext.lstm(*arrays)
np.testing.assert_array_equal(y, lstm_ext.lstm(*(None if a is None else np.asarray(a) for a in arrays))[0])
second = jax.devices()[1]
y, (h, c) = lstm_ext.lstm(*jax.device_put(arrays, second))
assert {a.device for a in (y, h, c)} == {second}
with jax.enable_x64(True):
    assert lstm_ext.lstm(*(None if a is None else a.astype("float64") for a in arrays))[0].dtype == "float64"
try:
    lstm_ext.lstm(*(None if a is None else a.astype(jnp.bfloat16) for a in arrays))
except RuntimeError as error:
    assert "needs torch for bfloat16" in str(error), error
else:
    raise AssertionError
"""


def test_jax_without_torch(jax: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", JAX_WITHOUT_TORCH],
        capture_output=True,
        text=True,
        cwd=tempfile.gettempdir(),
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
