"""Every format that weights are converted to and from: what comes back, and which arrays are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest

import lstm_ext
from lstm_ext import convert
from lstm_ext.convert import Weights
from lstm_ext.reference import Array
from lstm_ext.testing import assert_close

from .convert_weights import H, I, assert_same, draw, draw_weights, leaves
from .test_process import WITHOUT_TORCH, succeed

torch = pytest.importorskip("torch")

# How each format of one direction is read and written, and whether it has a place for absent biases.
FORMATS: dict[str, tuple[Callable[[Any], Weights], Callable[[Weights], Any], bool]] = {
    "tensorflow": (
        partial(convert.from_tensorflow, forget_bias=0.7),
        partial(convert.to_tensorflow, forget_bias=0.7),
        False,
    ),
    "keras": (lambda arrays: convert.from_keras(arrays)[0], convert.to_keras, True),
    "linen": (convert.from_linen, convert.to_linen, False),
    "nnx": (convert.from_nnx, convert.to_nnx, False),
    "nnx-gates": (convert.from_nnx, partial(convert.to_nnx, optimized=False), False),
    "equinox": (convert.from_equinox, convert.to_equinox, True),
    "haste": (convert.from_haste, convert.to_haste, False),
    "onnx": (lambda inputs: convert.from_onnx(inputs)[0], convert.to_onnx, True),
    "cudnn": (
        lambda flat: convert.from_cudnn(flat, I, H)[0][0],
        lambda weights: convert.to_cudnn([weights]),
        False,
    ),
    "state_dict": (
        lambda state_dict: convert.from_state_dict(state_dict)[0][0],
        lambda weights: convert.to_state_dict([weights]),
        True,
    ),
    "cell": (
        lambda state_dict: convert.from_state_dict(state_dict)[0][0],
        lambda weights: convert.to_state_dict([weights], cell=True),
        True,
    ),
}
BOTH_BIASES = {"onnx", "cudnn", "state_dict", "cell"}
each_format = pytest.mark.parametrize("name", FORMATS)


def map_leaves(tree: Any, f: Callable[[Any], Any]) -> Any:
    if isinstance(tree, Mapping):
        return {key: map_leaves(each, f) for key, each in tree.items()}
    return [map_leaves(each, f) for each in tree] if isinstance(tree, list) else f(tree)


@each_format
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_a_format_holds_comes_back(name: str, dtype: str, rng: np.random.Generator) -> None:
    read, write, _ = FORMATS[name]
    drawn = write(draw_weights(rng, dtype=dtype))
    params = map_leaves(drawn, lambda a: draw(rng, *a.shape, dtype=dtype))
    weights = read(params)
    assert_same(map_leaves(write(weights), np.asarray), params)
    assert_same(read(write(weights)), weights)


@each_format
def test_both_biases_come_back_as_they_are_or_as_their_sum(name: str, rng: np.random.Generator) -> None:
    read, write, _ = FORMATS[name]
    weights = draw_weights(rng, forget_bias=1.0, biases=2)
    back = read(write(weights))
    if name in BOTH_BIASES:
        assert_same(back, weights)
        return
    assert_same((back.w_ih, back.w_hh), (weights.w_ih, weights.w_hh))
    assert weights.b_ih is not None
    assert weights.b_hh is not None
    assert back.b_ih is not None
    assert back.b_hh is not None
    assert_close(back.b_ih + back.b_hh, weights.b_ih.astype("float64") + weights.b_hh, "float32")


@each_format
def test_absent_biases_stay_absent_or_become_zeros(name: str, rng: np.random.Generator) -> None:
    read, write, optional = FORMATS[name]
    weights = draw_weights(rng, biases=0)
    back = read(write(weights))
    if optional:
        assert_same(back, weights)
        return
    assert_same((back.w_ih, back.w_hh), (weights.w_ih, weights.w_hh))
    assert back.b_ih is not None
    assert back.b_hh is not None
    assert not (back.b_ih + back.b_hh).any()


@each_format
def test_arrays_are_contiguous_copies(name: str, rng: np.random.Generator) -> None:
    read, write, _ = FORMATS[name]
    weights = draw_weights(rng, biases=2)
    params = write(weights)
    outputs = [np.asarray(a) for a in leaves(params).values()]
    for a in outputs:
        assert a.flags.c_contiguous
        assert a.flags.writeable
        assert not any(np.shares_memory(a, b) for b in weights if b is not None)
    back = read(params)
    for each in back:
        if each is not None:
            assert each.flags.c_contiguous
            assert not any(np.shares_memory(each, a) for a in outputs)


@each_format
def test_tensors_and_other_layouts_of_memory_are_taken(name: str, rng: np.random.Generator) -> None:
    read, write, _ = FORMATS[name]
    params = map_leaves(write(draw_weights(rng, biases=2)), np.asarray)
    expected = read(params)
    assert_same(read(map_leaves(params, lambda a: torch.nn.Parameter(torch.from_numpy(a)))), expected)
    assert_same(read(map_leaves(params, np.asfortranarray)), expected)
    assert_same(read(map_leaves(params, lambda a: a.astype(a.dtype.newbyteorder()))), expected)


@each_format
def test_wrong_dtypes_are_refused(name: str, rng: np.random.Generator) -> None:
    read, write, _ = FORMATS[name]
    params = map_leaves(write(draw_weights(rng, biases=2)), np.asarray)
    for wrong, got in (
        (lambda a: a.astype("int64"), "int64"),
        (lambda a: a.astype("complex64"), "complex64"),
        (lambda a: torch.from_numpy(a).bfloat16(), "bfloat16"),
    ):
        with pytest.raises(TypeError, match=rf"expected dtype float16, float32, float64, got {got}"):
            read(map_leaves(params, wrong))
    for wrong in (np.ma.masked_array, lambda a: a.tolist()):
        with pytest.raises(TypeError, match=r"expected an array, got (MaskedArray|list)"):
            read(map_leaves(params, wrong))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "cudnn"])  # which is one array
def test_mixed_dtypes_are_refused(name: str, rng: np.random.Generator) -> None:
    read, write, _ = FORMATS[name]
    params = map_leaves(write(draw_weights(rng, biases=2)), np.asarray)
    dtypes = iter(["float64"] + ["float32"] * 20)
    with pytest.raises(TypeError, match=r"expected dtype float(32|64) as \S+ has, got float(32|64)"):
        read(map_leaves(params, lambda a: a.astype(next(dtypes))))


def wrong_shapes(a: Array) -> list[Array]:
    """Of other rank, transposed, and short by one in each dimension that the input width does not make free."""
    fixed = [axis for axis, size in enumerate(a.shape) if size not in (I, I + H)]
    shorter = [np.delete(a, -1, axis) for axis in fixed]
    return [a[None], a[..., None], *shorter, *([a.T] if a.T.shape != a.shape else [])]


@each_format
def test_each_wrong_shape_is_refused_by_name(name: str, rng: np.random.Generator) -> None:
    read, write, _ = FORMATS[name]
    params = map_leaves(write(draw_weights(rng, biases=2)), np.asarray)
    for n, each in enumerate(leaves(params).values()):
        for wrong in wrong_shapes(each):
            arrays = iter(range(20))
            bad = map_leaves(params, lambda a: wrong if next(arrays) == n else a)  # noqa: B023
            # The array named is the wrong one, or the first that does not fit to it.
            with pytest.raises(ValueError, match=r"^\S+: expected shape \[.+\].*, got \[[\d, ]+\]$"):
                read(bad)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("cudnn", "keras")])
def test_missing_and_unknown_names_are_refused(name: str, rng: np.random.Generator) -> None:
    read, write, _ = FORMATS[name]
    params = write(draw_weights(rng, biases=2))
    optional = {"equinox": "bias", "onnx": "B"}.get(name)
    for key in set(params) - {optional}:
        without = {other: a for other, a in params.items() if other != key}
        with pytest.raises(ValueError, match=rf"expected the arrays .*missing {key}"):
            read(without)
    with pytest.raises(ValueError, match=r"expected the arrays .*; unknown extra$"):
        read(params | {"extra": np.zeros(3, "float32")})
    with pytest.raises(TypeError, match="expected a mapping"):
        read([1, 2])


ARRAYS_PROGRAM = """
import numpy as np
from lstm_ext import convert
(weights,) = convert.from_keras([np.ones(shape, np.float32) for shape in [(3, 16), (4, 16), (16,)]])
assert convert.to_cudnn([weights]).shape == (144,)
"""


def test_arrays_need_no_torch() -> None:
    succeed(WITHOUT_TORCH + ARRAYS_PROGRAM)


def test_peepholes_and_norms_come_and_go(rng: np.random.Generator) -> None:
    plain = convert.to_haste(draw_weights(rng))  # with one bias, as in the others
    weights = convert.from_haste(plain)
    peephole = rng.standard_normal((3, H)).astype("float32")
    norms = [rng.standard_normal(shape).astype("float32") for shape in ((2, 4 * H), (H,), (H,))]
    with_peephole = convert.CellWeights(*weights, peephole=peephole)
    with_norms = convert.CellWeights(*weights, gamma=norms[0], gamma_h=norms[1], beta_h=norms[2])

    def check(actual: Any, expected: Any) -> None:
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a, e)

    params = convert.to_tensorflow(with_peephole, forget_bias=0.0)
    np.testing.assert_array_equal(params["w_f_diag"], peephole[1])
    check(convert.from_tensorflow(params, forget_bias=0.0), with_peephole)
    inputs = convert.to_onnx((with_peephole, with_peephole))
    np.testing.assert_array_equal(inputs["P"][1], np.concatenate([peephole[0], peephole[2], peephole[1]]))
    check(convert.from_onnx(inputs)[1], with_peephole)
    haste = convert.to_haste(with_norms)
    for gate, place in enumerate((0, 2, 1, 3)):  # i, g, f, o
        columns = slice(gate * H, (gate + 1) * H), slice(place * H, (place + 1) * H)
        np.testing.assert_array_equal(haste["gamma"][:, columns[1]], norms[0][:, columns[0]])
    check(convert.from_haste(haste), with_norms)
    for cell in (False, True):
        state = convert.to_state_dict(with_norms, cell=cell)
        module: Any = (lstm_ext.LSTMCell if cell else lstm_ext.LSTM)(weights.w_ih.shape[1], H, layer_norm=True)
        module.load_state_dict(state)
        found = convert.from_state_dict(module.state_dict())
        check(found[0][0], with_norms)

    with pytest.raises(ValueError, match="missing w_f_diag, w_o_diag"):
        convert.from_tensorflow(
            {**convert.to_tensorflow(weights, forget_bias=0.0), "w_i_diag": norms[1]}, forget_bias=0
        )
    with pytest.raises(ValueError, match=r"P: expected shape \[D, 3H\] with D = 1, H = "):
        convert.from_onnx(convert.to_onnx(weights) | {"P": peephole[None]})
    with pytest.raises(ValueError, match=r"weights.peephole: expected shape \[3, H\] with H = "):
        convert.to_onnx(with_peephole._replace(peephole=peephole.T))
    for write in (convert.to_keras, convert.to_cudnn, convert.to_haste, convert.to_equinox):
        with pytest.raises(ValueError, match="peephole: expected None, as this format keeps none"):
            write(with_peephole)
    with pytest.raises(ValueError, match="beta_h: expected None"):
        convert.to_onnx(with_norms)


@each_format
def test_projections_are_refused_where_the_format_has_none(name: str, rng: np.random.Generator) -> None:
    read, write, _ = FORMATS[name]
    weights = draw_weights(rng, projected=True)
    if name in ("tensorflow", "state_dict"):
        assert_same(read(write(weights)).w_hr, weights.w_hr)
        return
    with pytest.raises(ValueError, match="w_hr: expected None"):
        write(weights)
