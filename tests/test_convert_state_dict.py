"""State dicts of LSTMs and their cells, stacks of layers, and the forms in which all formats take weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import lstm_ext
from lstm_ext import convert, lstm, lstm_cell
from lstm_ext.convert import Weights
from lstm_ext.reference import Array

from .convert_weights import H, I, P, assert_same, draw, draw_stack, draw_weights

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("module", [torch.nn.LSTM, lstm_ext.LSTM])
@pytest.mark.parametrize("options", [{}, {"num_layers": 3}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("proj_size", [0, P])
def test_state_dicts_come_back(module: Any, options: dict[str, Any], bias: bool, proj_size: int) -> None:
    lstm = module(I, H, bias=bias, proj_size=proj_size, **options)
    state_dict = lstm.state_dict()
    layers = convert.from_state_dict(state_dict)
    assert len(layers) == lstm.num_layers
    assert {len(layer) for layer in layers} == {2 if lstm.bidirectional else 1}
    back = convert.to_state_dict(layers)
    assert list(back) == list(state_dict)
    assert_same(back, state_dict)


@pytest.mark.parametrize("bias", [True, False])
def test_state_dicts_of_cells_come_back(bias: bool) -> None:
    state_dict = torch.nn.LSTMCell(I, H, bias=bias).state_dict()
    back = convert.to_state_dict(convert.from_state_dict(state_dict), cell=True)
    assert list(back) == list(state_dict)
    assert_same(back, state_dict)


def test_weights_of_two_frameworks_make_one_stack(rng: np.random.Generator) -> None:
    """A Bidirectional of Keras below an ONNX node."""
    below, above = draw_stack(rng, 2, 2, biases=1)
    layers = [convert.from_keras(convert.to_keras(below)), convert.from_onnx(convert.to_onnx(above))]
    assert_same(convert.from_state_dict(convert.to_state_dict(layers)), [below, above])


def test_stacks_that_one_lstm_cannot_have_are_refused(rng: np.random.Generator) -> None:
    one, two = draw_weights(rng, biases=2), draw_weights(rng, H, biases=2)
    convert.to_state_dict([one, two])
    for write in (convert.to_state_dict, convert.to_cudnn):
        with pytest.raises(
            ValueError, match=r"layers\[1\]\[0\].w_ih: expected shape \[4H, H\] with H = 4, got \[16, 3\]"
        ):
            write([one, one])
        with pytest.raises(ValueError, match=r"missing layers\[1\]\[0\].b_ih, layers\[1\]\[0\].b_hh"):
            write([one, two._replace(b_ih=None, b_hh=None)])
        with pytest.raises(ValueError, match=r"missing layers\[0\]\[0\].b_hh"):
            write([one._replace(b_hh=None)])
        with pytest.raises(ValueError, match=r"unknown layers\[1\]\[1\].w_ih"):
            write([one, (two, two)])
        with pytest.raises(ValueError, match="expected layers of 1 or 2 directions each, got 3"):
            write([one, (two, two, two)])
        with pytest.raises(ValueError, match="layers: expected at least one, got none"):
            write([])
        with pytest.raises(TypeError, match="expected Weights, a tuple of them or a list of layers, got dict"):
            write({})
    with pytest.raises(ValueError, match=r"missing layers\[1\]\[0\].w_hr"):
        convert.to_state_dict([draw_weights(rng, biases=2, projected=True), two])


NO_STACK: list[Callable[[Any], Any]] = [convert.to_keras, convert.to_onnx]
ONE_DIRECTION: list[Callable[[Any], Any]] = [
    partial(convert.to_state_dict, cell=True),
    partial(convert.to_tensorflow, forget_bias=1.0),
    *(convert.to_linen, convert.to_nnx, convert.to_equinox, convert.to_haste),
]


@pytest.mark.parametrize("write", [convert.to_state_dict, convert.to_cudnn, *NO_STACK, *ONE_DIRECTION])
def test_all_take_the_same_forms(write: Callable[[Any], Any], rng: np.random.Generator) -> None:
    """One Weights, the tuple of a layer's directions, a list of layers: as far as the format goes."""
    one, other = draw_weights(rng, H, biases=2), draw_weights(rng, H, biases=2)

    def arrays(written: Any) -> list[Array]:
        leaves = written.values() if isinstance(written, dict) else written if isinstance(written, list) else [written]
        return [a for leaf in leaves for a in (arrays(leaf) if isinstance(leaf, dict) else [np.asarray(leaf)])]

    expected = arrays(write(one))
    for form in ((one,), [one], [(one,)], ((one,),)):
        for a, b in zip(arrays(write(form)), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    if write in ONE_DIRECTION:
        with pytest.raises(ValueError, match="expected one direction, as this format keeps no more, got 2"):
            write((one, other))
    else:  # a tuple of directions is no stack, though both fit here
        assert sum(a.size for a in arrays(write((one, other)))) == 2 * sum(a.size for a in expected)
        for a, b in zip(arrays(write([(one, other)])), arrays(write((one, other))), strict=True):
            np.testing.assert_array_equal(a, b)
    if write in ONE_DIRECTION + NO_STACK:
        with pytest.raises(ValueError, match="expected one layer, as this format keeps no more, got 2"):
            write([one, other])


@pytest.mark.parametrize("projected", [False, True])
def test_weights_go_into_the_functions_as_they_are(projected: bool, rng: np.random.Generator) -> None:
    weights = draw_weights(rng, biases=2, projected=projected)
    x = draw(rng, 2, 3, I)
    _, (h, c) = lstm(x, None, *weights)
    state = None
    for step in x:
        state = lstm_cell(step, state, *weights)
    np.testing.assert_allclose(state[0], h, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state[1], c, rtol=1e-5, atol=1e-6)
    assert Weights(weights.w_ih, weights.w_hh) == (weights.w_ih, weights.w_hh, None, None, None)


@pytest.mark.parametrize("write", [convert.to_haste, convert.to_keras, convert.to_linen, convert.to_equinox])
def test_what_is_no_weights_is_refused(write: Callable[[Any], Any], rng: np.random.Generator) -> None:
    for wrong in ([tuple(draw_weights(rng))], None):
        with pytest.raises(TypeError, match="expected Weights"):
            write(wrong)
    with pytest.raises(ValueError, match=r"w_ih: expected shape \[4H, I\] with H = 4, got \[15, 3\]"):
        write(draw_weights(rng)._replace(w_ih=np.zeros((15, 3), "float32")))
