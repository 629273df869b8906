"""`lstm` and `lstm_cell` on arguments that are wrong, and on arrays that are only unusual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import lstm_ext
from lstm_ext import reference
from lstm_ext.call import FORWARD, LayerCall, Save

T, B, I, H = 4, 3, 5, 7  # noqa: E741
KINDS = ["numpy", "torch"]


pytestmark = pytest.mark.usefixtures("backend")


def arguments(kind: str = "numpy", dtype: str = "float32") -> dict[str, Any]:
    """Good ones for `lstm`."""
    rng = np.random.default_rng(0)
    shapes = {"x": (T, B, I), "w_ih": (4 * H, I), "w_hh": (4 * H, H), "b_ih": (4 * H,), "b_hh": (4 * H,)}
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    arrays["h0"], arrays["c0"] = rng.standard_normal((2, B, H)).astype(dtype)
    arrays["lengths"], arrays["resets"] = np.array([4, 0, 2]), rng.random((T, B)) < 0.3
    return arrays if kind == "numpy" else {name: torch.from_numpy(a) for name, a in arrays.items()}


def call(a: dict[str, Any]) -> tuple[Any, ...]:
    options = {name: a[name] for name in ("w_hr", "lengths", "resets", "return_cells") if name in a}
    state = a.get("state", (a["h0"], a["c0"]))
    return lstm_ext.lstm(a["x"], state, a["w_ih"], a["w_hh"], a["b_ih"], a["b_hh"], **options)


def half(a: Any) -> Any:
    return a.half() if isinstance(a, torch.Tensor) else a.astype(np.float16)


def integers(a: Any) -> Any:
    return a.long() if isinstance(a, torch.Tensor) else a.astype(np.int64)


def floats(a: Any) -> Any:
    return a.float() if isinstance(a, torch.Tensor) else a.astype(np.float32)


# what is changed, how, the error's type, and what its text must hold: the argument, the expected, the actual
WRONG: list[tuple[str, Callable[[Any], Any], type[Exception], list[str]]] = [
    ("x", lambda _: None, TypeError, ["x", "expected a numpy.ndarray or torch.Tensor", "NoneType"]),
    ("x", lambda _: [[[1.0]]], TypeError, ["x", "expected a numpy.ndarray or torch.Tensor", "list"]),
    ("x", lambda a: a[0], RuntimeError, ["x", "expected 3 dimensions", "got 2", "lstm_cell"]),
    ("x", lambda a: a[:0], RuntimeError, ["x", "at least one time step", "got T = 0"]),
    ("x", lambda a: a[..., 1:], RuntimeError, ["x: ", "[T, B, I] = [4, 3, 5]", "got [4, 3, 4]: w_ih is [28, 5]"]),
    ("x", integers, RuntimeError, ["x", "float32", "got int64"]),
    ("x", half, RuntimeError, ["x: expected dtype float32 as the weights have", "got float16"]),
    ("w_ih", lambda _: None, TypeError, ["w_ih: expected a ", "got None"]),
    ("w_hh", lambda _: None, TypeError, ["w_hh: expected a ", "got None"]),
    ("w_ih", lambda a: a[0], RuntimeError, ["w_ih", "expected 2 dimensions", "got 1"]),
    ("w_ih", lambda a: a[1:], RuntimeError, ["w_ih", "[28, 5]", "got [27, 5]"]),
    ("w_ih", lambda a: a.T, RuntimeError, ["w_ih", "[28, 5]", "got [5, 28]: transposed?"]),
    ("w_ih", half, RuntimeError, ["w_ih: expected dtype float32 as x has", "got float16"]),
    ("w_hh", lambda a: a[:, 1:], RuntimeError, ["w_hh", "[28, 7]", "got [28, 6]"]),
    ("w_hh", lambda a: a[1:], RuntimeError, ["w_hh", "[28, 7]", "got [27, 7]"]),
    ("w_hh", lambda a: a.T, RuntimeError, ["w_hh", "[4*H, H] = [28, 7]", "got [7, 28]: transposed?"]),
    ("w_hh", half, RuntimeError, ["w_hh", "expected dtype float32", "got float16"]),
    ("b_ih", lambda a: a[1:], RuntimeError, ["b_ih", "[28]", "got [27]"]),
    ("b_hh", lambda a: a[:7], RuntimeError, ["b_hh", "[4*H] = [28]", "got [7]"]),
    ("h0", lambda a: a[1:], RuntimeError, ["h0", "[B, P] = [3, 7]", "got [2, 7]"]),
    ("h0", lambda a: a[None], RuntimeError, ["h0", "[B, P] = [3, 7]", "got [1, 3, 7]: lstm() takes [B, P]"]),
    ("c0", lambda a: a[:, 1:], RuntimeError, ["c0", "[B, H] = [3, 7]", "got [3, 6]"]),
    ("c0", lambda a: a[[0, 0, 1, 2]], RuntimeError, ["c0", "[3, 7]", "got [4, 7]: x is taken as [T, B, I]; is it [B"]),
    ("c0", lambda a: a[0], RuntimeError, ["c0", "[3, 7]", "got [7]"]),
    ("c0", half, RuntimeError, ["c0", "expected dtype float32", "got float16"]),
    ("state", lambda _: 3, TypeError, ["state", "a pair (h, c)", "int"]),
    ("state", lambda _: (1, 2, 3), TypeError, ["state", "a pair (h, c)", "3"]),
    (
        "state",
        lambda _: np.zeros((2, 3, 7)),
        TypeError,
        ["state", "a pair (h, c)", "one numpy.ndarray of shape [2, 3, 7]"],
    ),
    ("lengths", lambda a: a + 1, ValueError, ["lengths", "from 0 to T = 4", "got 1 to 5"]),
    ("lengths", lambda a: a - 1, ValueError, ["lengths", "from 0 to T = 4", "-1"]),
    ("lengths", lambda a: a * 0 + 5, ValueError, ["lengths", "from 0 to T = 4, got 5"]),
    ("lengths", lambda a: a[1:], RuntimeError, ["lengths", "[3]", "got [2]"]),
    (
        "lengths",
        lambda a: a[[0, 0, 1, 2]],
        RuntimeError,
        ["lengths", "got [4]: x is taken as [T, B, I]; is it [B, T, I]"],
    ),
    ("lengths", floats, TypeError, ["lengths", "integer", "float32", "use lengths."]),
    ("lengths", lambda a: a.tolist(), TypeError, ["lengths", "got list", "use ", "(lengths)"]),
    ("resets", lambda a: a[1:], RuntimeError, ["resets", "[4, 3]", "got [3, 3]"]),
    (
        "resets",
        lambda a: a.T,
        RuntimeError,
        ["resets", "[4, 3]", "got [3, 4]: x is taken as [T, B, I]; is it [B, T, I]"],
    ),
    ("resets", floats, TypeError, ["resets", "bool", "float32", "use resets."]),
    ("resets", integers, TypeError, ["resets", "bool", "int64", "use resets."]),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "change", "error", "words"), WRONG)
def test_wrong_arguments_are_named(
    kind: str, name: str, change: Callable[[Any], Any], error: type[Exception], words: list[str]
) -> None:
    a = arguments(kind)
    a[name] = change(a.get(name))
    with pytest.raises(error) as caught:
        call(a)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["w_ih", "b_hh", "h0", "lengths"])
def test_arrays_and_tensors_do_not_mix(name: str) -> None:
    a = arguments("torch")
    a[name] = a[name].numpy()
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor.*got numpy\.ndarray.*from_numpy"):
        call(a)
    a = arguments("torch")
    a["x"] = a["x"].numpy()
    with pytest.raises(TypeError, match=r"h0: expected a numpy\.ndarray as x is, got torch\.Tensor: .*from_numpy\(x\)"):
        call(a)


def test_another_device_is_named() -> None:
    a = arguments("torch")
    a["w_hh"] = a["w_hh"].to("meta")
    with pytest.raises(RuntimeError, match=r"w_hh: expected on device cpu.*got meta"):
        call(a)


def test_a_sparse_tensor_is_refused() -> None:
    a = arguments("torch")
    a["w_ih"] = a["w_ih"].to_sparse()
    with pytest.raises(RuntimeError, match=r"w_ih: expected a dense tensor"):
        call(a)


def test_a_masked_array_is_refused() -> None:
    a = arguments()
    a["x"] = np.ma.masked_array(a["x"], mask=a["x"] > 0)
    with pytest.raises(TypeError, match=r"x: expected a numpy\.ndarray or torch\.Tensor, got MaskedArray"):
        call(a)


@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_of_another_shape(kind: str) -> None:
    a = arguments(kind)
    a["w_hr"] = a["w_hh"][:3, :6]
    with pytest.raises(RuntimeError, match=r"w_hr: expected shape"):
        call(a)
    projected = a | {"w_hh": a["w_hh"][:, :3], "w_hr": a["w_hh"][:3], "h0": a["h0"][:, :3]}
    call(projected)
    for name in ("w_hh", "w_hr"):
        with pytest.raises(RuntimeError, match=rf"{name}: expected shape .* transposed\?"):
            call(projected | {name: projected[name].T})
    with pytest.raises(
        RuntimeError, match=r"h0: expected shape .* \[3, 3\], got \[3, 7\]: the pair is \(h, c\); swapped\?"
    ):
        call(projected | {"h0": projected["c0"], "c0": projected["h0"]})


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_cell_arguments_are_named(kind: str) -> None:
    a = arguments(kind)
    x, weights = a["x"][0], [a[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    with pytest.raises(RuntimeError, match=r"x: expected 2 dimensions.*lstm a sequence"):
        lstm_ext.lstm_cell(a["x"], None, *weights)
    with pytest.raises(RuntimeError, match=r"x: expected shape \[B, I\] = \[3, 5\], got \[3, 4\]: w_ih is"):
        lstm_ext.lstm_cell(x[:, 1:], None, *weights)
    with pytest.raises(RuntimeError, match=r"h0: expected shape \[B, P\] = \[3, 7\], got \[2, 7\]"):
        lstm_ext.lstm_cell(x, (a["h0"][1:], a["c0"]), *weights)
    with pytest.raises(RuntimeError, match=r"c0: expected 2 dimensions"):
        lstm_ext.lstm_cell(x, (a["h0"], a["c0"][None]), *weights)
    with pytest.raises(RuntimeError, match=r"resets: expected shape \[B\] = \[3\], got \[4, 3\]"):
        lstm_ext.lstm_cell(x, None, *weights, resets=a["resets"])
    with pytest.raises(TypeError, match=r"x: expected a numpy\.ndarray or torch\.Tensor, got str"):
        lstm_ext.lstm_cell("x", None, *weights)


# Unusual, but right --------------------------------------------------------------------------------------------------


def read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


def misaligned(a: np.ndarray) -> np.ndarray:
    memory = np.zeros(a.nbytes + 1, np.uint8)
    view = memory[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    assert a.dtype.itemsize == 1 or not view.flags.aligned
    return view


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "read-only": read_only,
    "negative-strides": lambda a: np.ascontiguousarray(a[::-1, ...])[::-1, ...],
    "negative-columns": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "fortran": np.asfortranarray,
    "every-other": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "misaligned": misaligned,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "broadcast": lambda a: np.broadcast_to(a, (2, *a.shape))[1],
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unusual_arrays_give_the_same_bits(layout: str, dtype: str) -> None:
    a = arguments("numpy", dtype)
    expected = call(a)
    changed = {name: LAYOUTS[layout](array) for name, array in a.items()}
    before = {name: array.copy() for name, array in changed.items()}
    y, state = call(changed)
    for actual, same in zip((y, *state), (expected[0], *expected[1]), strict=True):
        assert actual.dtype == dtype
        assert actual.dtype.isnative
        np.testing.assert_array_equal(actual, same)
    for name, array in changed.items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_strided_and_expanded_tensors_give_the_same_bits(dtype: str) -> None:
    a = {name: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for name, t in arguments("torch").items()}
    expected = call(a)
    strided = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in a.items()}
    transposed = {name: t.mT.contiguous().mT if t.dim() == 2 else t for name, t in a.items()}
    for changed in (strided, transposed):
        y, state = call(changed)
        for actual, same in zip((y, *state), (expected[0], *expected[1]), strict=True):
            assert torch.equal(actual, same)
    row = a["x"][:, :1].expand(-1, B, -1)
    expected = call(a | {"x": row.contiguous()})
    assert torch.equal(call(a | {"x": row})[0], expected[0])


def test_lazily_negated_tensors_keep_their_sign() -> None:
    """The imaginary part of a conjugate is a view of memory that holds the other sign."""
    a = arguments("torch")
    del a["lengths"], a["resets"]
    a["w_ih"] = a["w_ih"][:, :1]
    for x in (a["x"][..., :1], a["x"][..., 0].unsqueeze(-1)):
        z = torch.complex(torch.zeros(T, B), -x[..., 0]).conj().imag.unsqueeze(-1)
        assert z.is_neg()
        assert torch.equal(call(a | {"x": z})[0], call(a | {"x": x})[0])


def test_zero_stays_zero() -> None:
    """No weights, no input: h is 0., not -0."""
    zeros = np.zeros((3, 2, 5), np.float32), np.zeros((28, 5), np.float32), np.zeros((28, 7), np.float32)
    y = lstm_ext.lstm(zeros[0], None, *zeros[1:])[0]
    assert not y.any()
    assert not np.signbit(y).any()


@pytest.mark.parametrize("name", ["x", "w_ih", "w_hh", "b_ih", "h0", "c0"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stand_where_they_belong(name: str, value: float) -> None:
    """As in the reference: a row without them stays clean, and saturated gates are exact."""
    a = arguments()
    del a["lengths"], a["resets"]
    a[name] = a[name].copy()
    a[name].flat[1] = value
    wide = {name: array.astype(np.float64) for name, array in a.items()}
    weights = [wide[w] for w in ("w_ih", "w_hh", "b_ih", "b_hh")]
    asked = LayerCall(wide["x"], wide["h0"][None], wide["c0"][None], weights, None, None, None, FORWARD, False)
    with np.errstate(invalid="ignore"):
        expected = reference.layer_forward(asked, Save.NOTHING)
    y, (h_n, c_n) = call(a)
    for actual, oracle in zip((y, h_n, c_n), (expected[0], expected[1][0], expected[2][0]), strict=True):
        np.testing.assert_allclose(actual, oracle, rtol=0, atol=2e-5 if np.isfinite(value) else 1e-4)


def test_large_gates_saturate_exactly() -> None:
    """Pre-activations far beyond the range of exp give gates of exactly 0 and 1."""
    zeros, state = np.zeros((1, 1, 1), np.float32), np.full((1, 1), 0.5, np.float32)
    bias = np.array([-1e4, 1e4, 1e4, 1e4], np.float32)  # i = 0, f = 1, g = 1, o = 1
    weights = np.zeros((4, 1), np.float32)
    y, (_, c_n) = lstm_ext.lstm(zeros, (state, state), weights, weights, bias, np.zeros(4, np.float32))
    assert c_n[0, 0] == 0.5
    np.testing.assert_allclose(y[0, 0, 0], np.tanh(0.5), rtol=3e-7)
