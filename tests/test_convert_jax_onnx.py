"""Weights of Flax, Equinox, ONNX and of cuDNN as JAX has them, against these frameworks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import lstm_ext
from lstm_ext import convert
from lstm_ext.reference import Array
from lstm_ext.testing import assert_close

from .convert_weights import (
    FORGET_BIASES,
    B,
    H,
    I,
    T,
    assert_outputs,
    assert_same,
    draw_inputs,
    draw_stack,
    draw_weights,
    leaves,
)


def by_time(step: Callable[[Any, Any], tuple[Any, Any]], state: Any, x: Array) -> tuple[Array, Any]:
    """The outputs [T, B, H] and the last state of a cell, `step(state, x) -> (state, output)`."""
    outputs = []
    for each in x:
        state, output = step(state, each)
        outputs.append(np.asarray(output))
    return np.stack(outputs), state


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


def test_cudnn_buffers_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights: expected shape \[288\] with .* 2 direction\(s\), got \[287\]"):
        convert.from_cudnn(np.zeros(287, "float32"), I, H, 1, True)
    with pytest.raises(ValueError, match="num_layers: expected a positive integer, got 0"):
        convert.from_cudnn(np.zeros(144, "float32"), I, H, 0)
