"""Weights to and from other frameworks, against those frameworks and against golden data made with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lstm_ext
from lstm_ext import convert, lstm, lstm_cell, masks
from lstm_ext.convert import Weights
from lstm_ext.reference import Array, split_gates
from lstm_ext.testing import assert_close

from .golden import make
from .test_process import WITHOUT_TORCH, succeed

torch = pytest.importorskip("torch")

GOLDEN = Path(__file__).with_name("golden")
T, B, I, H, P = 5, 3, 3, 4, 2  # noqa: E741
FORGET_BIASES = (0.0, 1.0, 0.7)

Stack = list[tuple[Weights, ...]]


# Weights and inputs --------------------------------------------------------------------------------------------------


def draw(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> Array:
    return rng.uniform(-0.7, 0.7, shape).astype(dtype)


def draw_weights(
    rng: np.random.Generator,
    inputs: int = I,
    *,
    forget_bias: float = 0.0,
    biases: int = 1,
    projected: bool = False,
    dtype: str = "float32",
) -> Weights:
    """With no bias, with one beside zeros, or with two; the forget bias in b_ih."""
    width = P if projected else H
    w_ih, w_hh = draw(rng, 4 * H, inputs, dtype=dtype), draw(rng, 4 * H, width, dtype=dtype)
    w_hr = draw(rng, P, H, dtype=dtype) if projected else None
    if not biases:
        return Weights(w_ih, w_hh, None, None, w_hr)
    b_ih = draw(rng, 4 * H, dtype=dtype)
    split_gates(b_ih)[1][:] += forget_bias
    return Weights(w_ih, w_hh, b_ih, draw(rng, 4 * H, dtype=dtype) if biases == 2 else np.zeros_like(b_ih), w_hr)


def draw_stack(
    rng: np.random.Generator, num_layers: int, num_directions: int, *, biases: int = 2, projected: bool = False
) -> Stack:
    width = num_directions * (P if projected else H)
    return [
        tuple(
            draw_weights(rng, I if n == 0 else width, forget_bias=0.7, biases=biases, projected=projected)
            for _ in range(num_directions)
        )
        for n in range(num_layers)
    ]


def draw_inputs(
    rng: np.random.Generator, stack: Sequence[Sequence[Weights]], dtype: str = "float32"
) -> tuple[Array, Array, Array]:
    """x [T, B, I], h0 and c0 [L * D, B, ...]."""
    LD, first = len(stack) * len(stack[0]), stack[0][0]
    h0, c0 = draw(rng, LD, B, first.w_hh.shape[1], dtype=dtype), draw(rng, LD, B, len(first.w_hh) // 4, dtype=dtype)
    return draw(rng, T, B, first.w_ih.shape[1], dtype=dtype), h0, c0


def run_ours(stack: Sequence[Sequence[Weights]], x: Array, h0: Array, c0: Array) -> tuple[Array, Array, Array]:
    """(y, h_n, c_n) of our LSTM in float64, its weights loaded by `to_state_dict`."""
    first = stack[0][0]
    lstm = lstm_ext.LSTM(
        first.w_ih.shape[1],
        len(first.w_hh) // 4,
        len(stack),
        bias=first.b_ih is not None,
        bidirectional=len(stack[0]) == 2,
        proj_size=0 if first.w_hr is None else len(first.w_hr),
        dtype=torch.float64,
    )
    lstm.load_state_dict(convert.to_state_dict(stack))
    with torch.no_grad():
        x, h0, c0 = (torch.from_numpy(a.astype("float64")) for a in (x, h0, c0))
        y, (h_n, c_n) = lstm(x, (h0, c0))
    return y.numpy(), h_n.numpy(), c_n.numpy()


def assert_outputs(
    actual: Sequence[Any], stack: Sequence[Sequence[Weights]], inputs: Sequence[Array], dtype: str
) -> None:
    """(y, h_n, c_n) of a framework are those of our LSTM with the converted weights."""
    first = stack[0][0]
    terms = max(w.w_ih.shape[1] for layer in stack for w in layer) + first.w_hh.shape[1]
    for name, a, b in zip(("y", "h_n", "c_n"), actual, run_ours(stack, *inputs), strict=True):
        assert_close(np.asarray(a), b, dtype, terms=terms, name=name)


def leaves(tree: Any) -> dict[str, Any]:
    """The arrays of nested mappings and sequences by path."""
    if isinstance(tree, Mapping):
        return {f"{key}/{path}": a for key, each in tree.items() for path, a in leaves(each).items()}
    if isinstance(tree, (list, tuple)):
        return leaves(dict(enumerate(tree)))
    return {"": tree}


def assert_same(actual: Any, expected: Any) -> None:
    """The same structure, dtypes and values, bit for bit but for the sign of zeros."""
    actual, expected = leaves(actual), leaves(expected)
    assert set(actual) == set(expected)
    for path, a in actual.items():
        if a is None or expected[path] is None:
            assert a is expected[path], path
        else:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(expected[path]), err_msg=path, strict=True)


# Against the frameworks ----------------------------------------------------------------------------------------------


def by_time(step: Callable[[Any, Any], tuple[Any, Any]], state: Any, x: Array) -> tuple[Array, Any]:
    """The outputs [T, B, H] and the last state of a cell, `step(state, x) -> (state, output)`."""
    outputs = []
    for each in x:
        state, output = step(state, each)
        outputs.append(np.asarray(output))
    return np.stack(outputs), state


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


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


@pytest.mark.parametrize("kind", ["OptimizedLSTMCell", "LSTMCell"])
@pytest.mark.parametrize("forget_bias", FORGET_BIASES)
def test_flax_linen(rng: np.random.Generator, forget_bias: float, kind: str) -> None:
    jax, linen = pytest.importorskip("jax"), pytest.importorskip("flax.linen")
    weights = draw_weights(rng, forget_bias=forget_bias)
    x, h0, c0 = draw_inputs(rng, [(weights,)])
    cell, params = getattr(linen, kind)(H), convert.to_linen(weights)
    own = cell.init(jax.random.key(0), (c0[0], h0[0]), x[0])["params"]
    assert jax.tree.map(np.shape, own) == jax.tree.map(np.shape, params)
    y, (c_n, h_n) = by_time(partial(cell.apply, {"params": params}), (c0[0], h0[0]), x)
    back = convert.from_linen(jax.tree.map(jax.numpy.asarray, params))
    assert_same(back, weights)
    assert_same(convert.to_linen(back), params)
    assert_outputs((y, h_n[None], c_n[None]), [(back,)], (x, h0, c0), "float32")


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("forget_bias", FORGET_BIASES)
def test_flax_nnx(rng: np.random.Generator, forget_bias: float, optimized: bool) -> None:
    nnx = pytest.importorskip("flax.nnx")
    weights = draw_weights(rng, forget_bias=forget_bias)
    x, h0, c0 = draw_inputs(rng, [(weights,)])
    cell = (nnx.OptimizedLSTMCell if optimized else nnx.LSTMCell)(I, H, rngs=nnx.Rngs(0))
    params = convert.to_nnx(weights, optimized=optimized)
    names = set(leaves(nnx.to_pure_dict(nnx.state(cell, nnx.Param))))
    assert set(leaves(params)) == names
    nnx.update(cell, params)
    y, (c_n, h_n) = by_time(cell, (c0[0], h0[0]), x)
    for own in (nnx.state(cell, nnx.Param), nnx.to_pure_dict(nnx.state(cell, nnx.Param))):
        back = convert.from_nnx(own)
        assert_same(back, weights)
    assert_same(convert.to_nnx(back, optimized=optimized), params)
    assert_outputs((y, h_n[None], c_n[None]), [(back,)], (x, h0, c0), "float32")


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("forget_bias", FORGET_BIASES)
def test_equinox(rng: np.random.Generator, forget_bias: float, use_bias: bool) -> None:
    jax, eqx = pytest.importorskip("jax"), pytest.importorskip("equinox")
    weights = draw_weights(rng, forget_bias=forget_bias, biases=int(use_bias))
    x, h0, c0 = draw_inputs(rng, [(weights,)])
    cell = eqx.nn.LSTMCell(I, H, use_bias=use_bias, key=jax.random.key(0))
    params = convert.to_equinox(weights)
    names = [name for name, a in params.items() if a is not None]
    for name in names:
        assert getattr(cell, name).shape == params[name].shape
    new = [jax.numpy.asarray(params[name]) for name in names]
    cell = eqx.tree_at(lambda c: [getattr(c, name) for name in names], cell, new)
    step = jax.vmap(lambda state, each: (cell(each, state),) * 2)
    hs, (h_n, c_n) = by_time(lambda state, each: ((new := step(state, each)[0]), new[0]), (h0[0], c0[0]), x)
    back = convert.from_equinox({name: getattr(cell, name) for name in params})
    assert_same(back, weights)
    assert_same(convert.to_equinox(back), params)
    assert_outputs((hs, h_n[None], c_n[None]), [(back,)], (x, h0, c0), "float32")


@pytest.mark.parametrize("biases", [0, 2])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_onnx(rng: np.random.Generator, direction: str, biases: int) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    (layer,) = draw_stack(rng, 1, 2 if direction == "bidirectional" else 1, biases=biases)
    x, h0, c0 = draw_inputs(rng, [layer])
    arrays = convert.to_onnx(layer)
    names = ["X", "W", "R", "B" if biases else "", "", "initial_h", "initial_c"]
    node = onnx.helper.make_node("LSTM", names, ["Y", "Y_h", "Y_c"], hidden_size=H, direction=direction)
    inputs = {"X": x, "initial_h": h0, "initial_c": c0}
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, a.shape) for name, a in inputs.items()]
    ranks = {"Y": 4, "Y_h": 3, "Y_c": 3}
    results = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * rank) for name, rank in ranks.items()
    ]
    constants = [onnx.numpy_helper.from_array(a, name) for name, a in arrays.items()]
    graph = onnx.helper.make_graph([node], "lstm", values, results, constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    Y, h_n, c_n = session.run(None, inputs)

    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    back = convert.from_onnx({t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}, attributes)
    assert_same(back, layer)
    assert_same(convert.to_onnx(back), arrays)
    y = np.concatenate(list(Y.swapaxes(0, 1)), axis=-1)
    if direction != "reverse":
        assert_outputs((y, h_n, c_n), [back], (x, h0, c0), "float32")
    else:  # which no nn.LSTM has alone
        (w,) = back
        ours, state = lstm_ext.lstm(x, (h0[0], c0[0]), *w[:4], reverse=True)
        for a, b in ((y, ours), (h_n[0], state[0]), (c_n[0], state[1])):
            assert_close(a, b, "float32", terms=I + H)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
def test_onnxs_own_cases() -> None:
    """The numbers of its backend tests: biases, peepholes, layouts, directions."""
    onnx, cases = pytest.importorskip("onnx"), pytest.importorskip("onnx.backend.test.case.node")
    seen = set()
    for case in cases.collect_testcases("LSTM"):
        (node,), ((inputs, outputs),) = case.model.graph.node, case.data_sets
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        given = dict(zip((name for name in node.input if name), inputs, strict=True))
        expected = dict(zip((name for name in node.output if name), outputs, strict=True))
        layer = convert.from_onnx({name: given.get(name) for name in "WRBP"}, attributes)
        batch_first = attributes.get("layout", 0) == 1
        x, axis = given["X"].swapaxes(0, 1) if batch_first else given["X"], 1 if batch_first else 0
        results = []
        for d, w in enumerate(layer):
            reverse = d == 1 or attributes.get("direction") == b"reverse"
            results.append(lstm_ext.lstm(x, None, *w[:4], reverse=reverse, peephole=getattr(w, "peephole", None)))
        y = np.stack([y for y, _ in results], axis=1)  # [T, D, B, H]
        found = {
            "Y": np.moveaxis(y, 2, 0) if batch_first else y,
            "Y_h": np.stack([h for _, (h, _) in results], axis=axis),
            "Y_c": np.stack([c for _, (_, c) in results], axis=axis),
        }
        for name, array in expected.items():
            assert_close(found[name], array, "float32", terms=16, name=f"{case.name} {name}")
        seen.add(case.name)
    assert {"test_lstm_defaults", "test_lstm_with_initial_bias", "test_lstm_with_peepholes"} <= seen


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_cudnn_buffers_of_jax(rng: np.random.Generator, bidirectional: bool, num_layers: int) -> None:
    """Its layout, and its reference for what cuDNN computes from it."""
    jax, rnn = pytest.importorskip("jax"), pytest.importorskip("jax.experimental.rnn")
    D, sizes = 1 + bidirectional, (I, H, num_layers, bidirectional)
    stack = draw_stack(rng, num_layers, D)
    x, h0, c0 = draw_inputs(rng, stack)
    flat = convert.to_cudnn(stack)
    assert flat.shape == (rnn.get_num_params_in_lstm(*sizes),)
    back = convert.from_cudnn(jax.numpy.asarray(flat), *sizes)
    assert_same(back, stack)
    assert_same(convert.to_cudnn(back), flat)
    unpacked = rnn.unpack_lstm_weights(flat, *sizes)
    assert_same([list(each.values()) for each in unpacked], [[w[n] for layer in back for w in layer] for n in range(4)])
    lengths = np.full(B, T, np.int32)
    y, h_n, c_n = rnn.lstm_ref(x.swapaxes(0, 1), h0, c0, *unpacked, lengths, I, H, num_layers, 0.0, bidirectional)
    assert_outputs((y.swapaxes(0, 1), h_n, c_n), back, (x, h0, c0), "float32")


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


# Without a framework -------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ({"clip": 3.0}, "clip: expected none"),
        ({"activations": [b"Sigmoid", b"Tanh", b"Relu"]}, "activations: expected .*Tanh.*, got .*Relu"),
        ({"activation_alpha": [0.2]}, "activation_alpha: expected none"),
        ({"activation_beta": []}, r"activation_beta: expected none"),
        ({"input_forget": 1}, "input_forget: expected 0, got 1"),
        ({"hidden_size": 5}, "hidden_size: expected 4, got 5"),
        ({"direction": b"bidirectional"}, "direction: expected forward or reverse, got bidirectional"),
    ],
)
def test_onnx_attributes_without_a_counterpart_are_refused(
    attribute: dict[str, Any], message: str, rng: np.random.Generator
) -> None:
    arrays = convert.to_onnx(draw_weights(rng))
    fine = {"hidden_size": H, "direction": b"reverse", "activations": [b"Sigmoid", b"Tanh", b"Tanh"], "layout": 1}
    convert.from_onnx(arrays, fine)
    with pytest.raises(ValueError, match=message):
        convert.from_onnx(arrays, fine | attribute)
    with pytest.raises(TypeError, match="attributes: expected a mapping from names to values, got list"):
        convert.from_onnx(arrays, list(fine))  # type: ignore[arg-type]


# State dicts and stacks ----------------------------------------------------------------------------------------------


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


def test_keras_lists_of_other_lengths_are_refused() -> None:
    zeros = np.zeros(3, "float32")
    with pytest.raises(ValueError, match=r"weights: expected a list of 2 or 3 arrays .*, got 5"):
        convert.from_keras([zeros] * 5)
    with pytest.raises(ValueError, match=r"weights: expected a list .*, got ndarray"):
        convert.from_keras(zeros)  # type: ignore[arg-type]


def test_cudnn_buffers_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights: expected shape \[288\] with .* 2 direction\(s\), got \[287\]"):
        convert.from_cudnn(np.zeros(287, "float32"), I, H, 1, True)
    with pytest.raises(ValueError, match="num_layers: expected a positive integer, got 0"):
        convert.from_cudnn(np.zeros(144, "float32"), I, H, 0)


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
