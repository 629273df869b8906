"""Weights of Keras, TensorFlow 1 and haste, against Keras and against golden data made with the others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lstm_ext
from lstm_ext import convert, masks
from lstm_ext.convert import Weights
from lstm_ext.reference import split_gates
from lstm_ext.testing import assert_close

from .convert_weights import (
    FORGET_BIASES,
    B,
    H,
    I,
    T,
    assert_outputs,
    assert_same,
    draw,
    draw_inputs,
    draw_stack,
    draw_weights,
)
from .golden import make

torch = pytest.importorskip("torch")

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture
def keras(monkeypatch: pytest.MonkeyPatch) -> Any:
    if "KERAS_BACKEND" not in os.environ:  # read at its first import
        pytest.importorskip("jax")
        monkeypatch.setenv("KERAS_BACKEND", "jax")
    return pytest.importorskip("keras")


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("forget_bias", FORGET_BIASES)
def test_keras(keras: Any, rng: np.random.Generator, forget_bias: float, use_bias: bool) -> None:
    weights = draw_weights(rng, forget_bias=forget_bias, biases=int(use_bias))
    x, h0, c0 = draw_inputs(rng, [(weights,)])
    layer = keras.layers.LSTM(H, use_bias=use_bias, return_sequences=True, return_state=True)
    layer.build((B, T, I))
    arrays = convert.to_keras(weights)
    layer.set_weights(arrays)
    y, h_n, c_n = (keras.ops.convert_to_numpy(a) for a in layer(x.swapaxes(0, 1), initial_state=[h0[0], c0[0]]))
    back = convert.from_keras(layer.get_weights())
    assert_same(back, (weights,))
    assert_same(convert.to_keras(back), arrays)
    assert_outputs((y.swapaxes(0, 1), h_n[None], c_n[None]), [back], (x, h0, c0), "float32")


@pytest.mark.parametrize("use_bias", [True, False])
def test_keras_bidirectional(keras: Any, rng: np.random.Generator, use_bias: bool) -> None:
    (pair,) = draw_stack(rng, 1, 2, biases=int(use_bias))
    x, h0, c0 = draw_inputs(rng, [pair])
    layer = keras.layers.Bidirectional(
        keras.layers.LSTM(H, use_bias=use_bias, return_sequences=True, return_state=True)
    )
    layer.build((B, T, I))
    layer.set_weights(convert.to_keras(pair))
    outputs = layer(x.swapaxes(0, 1), initial_state=[h0[0], c0[0], h0[1], c0[1]])
    y, h_f, c_f, h_b, c_b = (keras.ops.convert_to_numpy(a) for a in outputs)
    back = convert.from_keras(layer.get_weights())
    assert_same(back, pair)
    assert_outputs((y.swapaxes(0, 1), np.stack([h_f, h_b]), np.stack([c_f, c_b])), [back], (x, h0, c0), "float32")


@pytest.mark.parametrize(
    ("activation", "recurrent_activation"),
    [
        ("relu", "hard_sigmoid"),
        ("elu", "sigmoid"),
        ("softsign", "tanh"),
        ("softplus", "hard_sigmoid"),
        ("linear", "softsign"),
    ],
)
def test_activations_are_those_of_keras(
    keras: Any, rng: np.random.Generator, activation: str, recurrent_activation: str
) -> None:
    options = {"activation": activation, "recurrent_activation": recurrent_activation}
    weights = draw_weights(rng)
    x, h0, c0 = draw_inputs(rng, [(weights,)])
    layer = keras.layers.LSTM(H, return_sequences=True, return_state=True, **options)
    layer.build((B, T, I))
    layer.set_weights(convert.to_keras(weights))
    theirs = [keras.ops.convert_to_numpy(a) for a in layer(x.swapaxes(0, 1), initial_state=[h0[0], c0[0]])]
    y, (h_n, c_n) = lstm_ext.lstm(x, (h0[0], c0[0]), *weights[:4], **options)
    for ours, expected in zip((y.swapaxes(0, 1), h_n, c_n), theirs, strict=True):
        assert_close(ours, expected, "float32", terms=I + H)


def test_recurrent_dropout_is_that_of_keras(keras: Any, rng: np.random.Generator) -> None:
    """But that Keras draws a mask for each gate: here all four are ours."""
    p, seed = 0.4, 3
    weights = draw_weights(rng)
    x, h0, c0 = draw_inputs(rng, [(weights,)])
    layer = keras.layers.LSTM(H, return_sequences=True, return_state=True, recurrent_dropout=p)
    layer.build((B, T, I))
    layer.set_weights(convert.to_keras(weights))
    times, rows, units = np.zeros(1, np.int64), np.arange(B), np.arange(H)
    dropped = masks.happens(np.array([seed]), masks.Mask.RECURRENT_DROPOUT, 0, times, rows, units, p)
    assert 0 < dropped.sum() < dropped.size
    mask = np.where(dropped, 0, 1 / (1 - p)).astype(np.float32)
    layer.cell.get_recurrent_dropout_mask = lambda _: [mask] * 4
    given = {"initial_state": [h0[0], c0[0]], "training": True}
    theirs = [keras.ops.convert_to_numpy(a) for a in layer(x.swapaxes(0, 1), **given)]
    y, (h_n, c_n) = lstm_ext.lstm(x, (h0[0], c0[0]), *weights[:4], recurrent_dropout=p, training=True, seed=seed)
    for ours, expected in zip((y.swapaxes(0, 1), h_n, c_n), theirs, strict=True):
        assert_close(ours, expected, "float32", terms=I + H)


def test_keras_initial_weights_have_the_forget_bias_in_b_ih(keras: Any) -> None:
    layer = keras.layers.LSTM(H)
    layer.build((B, T, I))
    ((_, _, b_ih, b_hh, _),) = convert.from_keras(layer.get_weights())
    assert b_ih is not None
    assert b_hh is not None
    assert [set(block.tolist()) for block in split_gates(b_ih)] == [{0.0}, {1.0}, {0.0}, {0.0}]
    assert not b_hh.any()


def test_keras_lists_of_other_lengths_are_refused() -> None:
    zeros = np.zeros(3, "float32")
    with pytest.raises(ValueError, match=r"weights: expected a list of 2 or 3 arrays .*, got 5"):
        convert.from_keras([zeros] * 5)
    with pytest.raises(ValueError, match=r"weights: expected a list .*, got ndarray"):
        convert.from_keras(zeros)  # type: ignore[arg-type]


def golden(name: str) -> list[dict[str, Any]]:
    """The cases of a file that `golden/make.py` made, with arrays for lists."""

    def to_arrays(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: to_arrays(each) for key, each in value.items()}
        return np.array(value) if isinstance(value, list) else value

    return [to_arrays(case) for case in json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))]


def assert_golden_outputs(case: Mapping[str, Any], weights: Weights) -> None:
    actual = (case["y"], case["h_n"][None], case["c_n"][None])
    assert_outputs(actual, [(weights,)], (case["x"], case["h0"][None], case["c0"][None]), "float64")


@pytest.mark.parametrize("case", golden("tensorflow"), ids=lambda case: f"{case['cell']}-{case['forget_bias']}")
def test_tensorflow_golden(case: dict[str, Any]) -> None:
    weights = convert.from_tensorflow(case["params"], forget_bias=case["forget_bias"])
    if isinstance(weights, convert.Weights):
        assert_golden_outputs(case, weights)
    else:
        clips = {name: value for name, value in case["options"].items() if name != "use_peepholes"}
        state = case["h0"], case["c0"]
        y, (h_n, c_n) = lstm_ext.lstm(case["x"], state, *weights[:5], peephole=weights.peephole, **clips)
        for name, actual in (("y", y), ("h_n", h_n), ("c_n", c_n)):
            assert_close(actual, case[name], "float64", terms=I + H, name=name)
    assert_same(convert.to_tensorflow(weights, forget_bias=case["forget_bias"]), case["params"])


def test_tensorflow_itself_computes_the_golden_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    pytest.importorskip("tf_keras")
    for actual, expected in zip(make.tensorflow_cases(), golden("tensorflow"), strict=True):
        results = {name: (actual.pop(name), expected.pop(name)) for name in ("y", "h_n", "c_n")}
        assert_same(actual["params"], expected["params"])
        for name, (a, b) in results.items():
            assert_close(a, b, "float64", terms=I + H, name=name)


@pytest.mark.parametrize("case", golden("haste"), ids=lambda case: f"{case['forget_bias']}")
def test_haste_golden(case: dict[str, Any]) -> None:
    weights = convert.from_haste(case["params"])
    assert_golden_outputs(case, weights)
    assert_same(convert.to_haste(weights), case["params"])
    initial = convert.from_haste(case["params"] | {"bias": case["initial_bias"]})
    expected = [{0.0}, {case["forget_bias"]}, {0.0}, {0.0}]
    assert initial.b_ih is not None
    assert [set(block.tolist()) for block in split_gates(initial.b_ih)] == expected


def test_our_basic_lstm_cell(rng: np.random.Generator) -> None:
    cell = lstm_ext.BasicLSTMCell(H, forget_bias=0.7, input_size=I, dtype=torch.float64)
    weights = draw_weights(rng, forget_bias=1.0, biases=2, dtype="float64")
    params = convert.to_tensorflow(weights, forget_bias=cell.forget_bias)
    cell.load_state_dict({name: torch.from_numpy(a) for name, a in params.items()})
    x, h0, c0 = draw_inputs(rng, [(weights,)], "float64")
    with torch.no_grad():
        state, ys = (torch.from_numpy(c0[0]), torch.from_numpy(h0[0])), []
        for each in torch.from_numpy(x):
            y, state = cell(each, state)
            ys.append(y)
    for back in (weights, convert.from_tensorflow(cell.state_dict(), forget_bias=cell.forget_bias)):
        actual = (torch.stack(ys), state[1][None], state[0][None])
        assert_outputs(actual, [(back,)], (x, h0, c0), "float64")


def test_names_with_their_scope_and_arrays_without_names_get_a_hint(rng: np.random.Generator) -> None:
    params = {"kernel": draw(rng, I + H, 4 * H), "bias": draw(rng, 4 * H)}
    for scope in ("rnn/basic_lstm_cell/", "cell."):
        with pytest.raises(ValueError, match=r"unknown .*; the names are those without the scope before them"):
            convert.from_tensorflow({scope + name: a for name, a in params.items()}, forget_bias=1.0)
    with pytest.raises(
        TypeError, match=r"a mapping from the names bias, projection/kernel \(optional\), kernel to arrays"
    ):
        convert.from_tensorflow(list(params.values()), forget_bias=1.0)  # type: ignore[arg-type]


def test_a_kernel_too_short_for_h_is_refused(rng: np.random.Generator) -> None:
    params = {"kernel": draw(rng, H - 1, 4 * H), "bias": draw(rng, 4 * H)}
    with pytest.raises(ValueError, match=r"kernel: expected shape \[I\+P, 4U\] with P = 4, got \[3, 16\]"):
        convert.from_tensorflow(params, forget_bias=1.0)
