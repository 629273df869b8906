"""torch.onnx.export of the modules: standard LSTM nodes, checked with onnxruntime; its int8 beside ours."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lstm_ext.testing import assert_close

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

from torch import nn  # noqa: E402
from torch.export import Dim  # noqa: E402
from torch.nn.utils.rnn import pack_sequence  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import lstm_ext  # noqa: E402

from .test_frozen import learned_text, threads, with_weights  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
I, H = 3, 5  # noqa: E741
DYNAMIC = Dim.DYNAMIC


class Model(nn.Module):
    """A module called with its tensors in order, for a graph whose inputs are these."""

    def __init__(self, module: nn.Module, state: bool = False, lengths: bool = False):
        super().__init__()
        self.module, self.state, self.lengths = module, state, lengths

    def forward(self, x: Any, *tensors: Any) -> Any:
        hx = tensors[:2] if self.state else None
        return self.module(x, hx, lengths=tensors[-1]) if self.lengths else self.module(x, hx)


def nodes(model: Any) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(node.op_type for node in model.graph.node)


def attributes(node: Any) -> dict[str, Any]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def exported(model: Any, inputs: tuple[Any, ...], shapes: Any, path: Path, **options: Any) -> Any:
    """The ONNX model, from its file."""
    torch.onnx.export(model, inputs, path, dynamo=True, dynamic_shapes=shapes, verbose=False, **options)
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded, full_check=True)
    assert {each.domain for each in loaded.opset_import} <= {"", "ai.onnx"}
    return loaded


def assert_runs_as(module: Any, path: Path, *inputs: Any) -> None:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {each.name: a.numpy() for each, a in zip(session.get_inputs(), inputs, strict=True)}
    results = session.run(None, given)
    for n, (a, e) in enumerate(zip(results, tree_leaves(module(*inputs)), strict=True)):
        assert_close(a, e, "float32", terms=200, name=f"output {n}")


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias, batch first": {"bias": False, "batch_first": True},
    "two layers, both ways": {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    "both ways, batch first": {"bidirectional": True, "batch_first": True},
}


@pytest.mark.parametrize("given", ["input", "state", "lengths", "state and lengths"])
@pytest.mark.parametrize("name", OPTIONS)
def test_one_node_a_layer(name: str, given: str, tmp_path: Path) -> None:
    """With dynamic time and batch; `lengths`, zero among them, are sequence_lens."""
    options, path = OPTIONS[name], tmp_path / "lstm.onnx"
    D, L, batch = (
        1 + options.get("bidirectional", False),
        options.get("num_layers", 1),
        options.get("batch_first", False),
    )
    model = Model(lstm_ext.LSTM(I, H, **options), "state" in given, "lengths" in given).eval()

    def inputs(T: int, B: int) -> tuple[Any, ...]:
        x = torch.randn((B, T, I) if batch else (T, B, I))
        state = [torch.randn(L * D, B, H) for _ in "hc"] if model.state else []
        lengths = torch.arange(B) % (T + 1)
        return x, *state, *([lengths] if model.lengths else [])

    rest = ([{1: DYNAMIC}] * 2 if model.state else []) + ([{0: DYNAMIC}] if model.lengths else [])
    shapes = ({0: DYNAMIC, 1: DYNAMIC}, *([tuple(rest)] if rest else []))
    loaded = exported(model, inputs(4, 3), shapes, path)
    found = [node for node in loaded.graph.node if node.op_type == "LSTM"]
    assert len(found) == L
    assert not {"Loop", "Scan", "If"} & set(nodes(loaded))
    for node in found:
        assert attributes(node) == {"hidden_size": H, "direction": b"bidirectional" if D == 2 else b"forward"}
        given_inputs = [bool(name) for name in node.input]
        wanted = [True, True, True, options.get("bias", True), model.lengths, model.state, model.state]
        assert given_inputs == wanted[: len(given_inputs)]
        assert not any(wanted[len(given_inputs) :])
    for T, B in ((4, 3), (7, 2), (3, 9), (1, 1)):
        assert_runs_as(model, path, *inputs(T, B))


CELLS: dict[str, dict[str, Any]] = {
    "activations": {"activation": ("elu", 0.7), "recurrent_activation": ("hard_sigmoid", 0.25), "bidirectional": True},
    "more of them": {"activation": ("leaky_relu", 0.1), "recurrent_activation": "softsign", "bias": False},
    "lines": {"activation": "linear", "recurrent_activation": "softplus"},
    "peephole": {"peephole": True, "forget_bias": 0.5, "bidirectional": True},
    "coupled": {"coupled": True, "peephole": True, "forget_bias": 1.0, "bias": False},
    "coupled, hard": {"coupled": True, "recurrent_activation": "hard_sigmoid", "activation": "relu", "num_layers": 2},
    "forget bias": {"forget_bias": 1.0, "recurrent_dropout": 0.2, "weight_drop": 0.1},
}


@pytest.mark.parametrize("name", CELLS)
def test_options_are_attributes(name: str, tmp_path: Path) -> None:
    options, path = CELLS[name], tmp_path / "lstm.onnx"
    model, x = lstm_ext.LSTM(I, H, **options).eval(), torch.randn(6, 3, I)
    loaded = exported(model, (x,), None, path)
    node = next(node for node in loaded.graph.node if node.op_type == "LSTM")
    found = attributes(node)
    assert found.get("input_forget", 0) == options.get("coupled", False)
    assert (len(node.input) == 8) == ("peephole" in options)
    assert_runs_as(model, path, x)


REFUSED_OPTIONS: dict[str, dict[str, Any]] = {
    "cell_clip": {"cell_clip": 1.0},
    "layer_norm": {"layer_norm": True},
    "zoneout": {"zoneout": (0.1, 0.0)},
    "coupled, recurrent_activation": {"coupled": True, "recurrent_activation": "softsign"},
}


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_options_that_onnx_lacks_are_named(name: str) -> None:
    module, x = lstm_ext.LSTM(I, H, **REFUSED_OPTIONS[name]).eval(), torch.randn(6, 3, I)
    program = torch.export.export(module, (x,))
    with pytest.raises(NotImplementedError, match=f"{name}: expected .* since the LSTM of ONNX has nothing like it"):
        program.run_decompositions(lstm_ext.onnx.decompositions())


@pytest.mark.parametrize("sequence", [False, True])
def test_tensorflows_cell_is_a_node(sequence: bool, tmp_path: Path) -> None:
    cell, path = lstm_ext.BasicLSTMCell(H, input_size=I, activation="relu"), tmp_path / "cell.onnx"

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: Any) -> Any:
            return lstm_ext.dynamic_rnn(self.cell, x)

    model, x = Sequence() if sequence else cell, torch.randn(*((2, 6) if sequence else (2,)), I)
    loaded = exported(model, (x,), None, path)
    assert nodes(loaded)["LSTM"] == 1
    assert_runs_as(model, path, x)


def test_weights_are_constants(tmp_path: Path) -> None:
    """Small ones at once; large ones by the optimizer without its limits, as a runtime does when it loads the model."""
    from onnxscript import optimizer

    initializers = {}
    for width in (5, 128):
        module = lstm_ext.LSTM(width, width, bidirectional=True).eval()
        program = torch.onnx.export(module, (torch.randn(2, 1, width),), dynamo=True, verbose=False)
        if width == 128:
            optimizer.fold_constants(program.model, input_size_limit=2**30, output_size_limit=2**30)
            optimizer.remove_unused_nodes(program.model)
        (node,) = (each for each in program.model.graph if each.op_type == "LSTM")
        initializers[width] = [a.const_value.shape.numpy() for a in node.inputs[1:4]]
    assert initializers == {n: [(2, 4 * n, n), (2, 4 * n, n), (2, 8 * n)] for n in (5, 128)}


class Tagger(nn.Module):
    """A larger model, with each kind of module of ours in it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, I)
        self.lstm = lstm_ext.LSTM(I, H, bidirectional=True, batch_first=True)
        self.cell = lstm_ext.LSTMCell(2 * H, H)
        self.basic = lstm_ext.BasicLSTMCell(H, input_size=H)
        self.head = nn.Linear(H, 2)

    def forward(self, tokens: Any, lengths: Any) -> Any:
        y, (h_n, _) = self.lstm(self.embed(tokens), lengths=lengths)
        h, c = self.cell(y.amax(1), (h_n[0], h_n[1]))
        w_ih, w_hh = self.cell.weight_ih[:, :H], self.cell.weight_hh
        backward, _ = lstm_ext.lstm(h[None], (h, c), w_ih, w_hh, reverse=True)
        return self.head(self.basic(backward[0])[0]).softmax(-1)


def test_a_model_with_all_of_our_modules(tmp_path: Path) -> None:
    model, path = Tagger().eval(), tmp_path / "tagger.onnx"
    inputs = torch.randint(11, (3, 6)), torch.tensor([6, 1, 4])
    loaded = exported(model, inputs, ({0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC}), path)
    directions = [attributes(node)["direction"] for node in loaded.graph.node if node.op_type == "LSTM"]
    assert directions == [b"bidirectional", b"forward", b"reverse", b"forward"]
    assert_runs_as(model, path, *inputs)
    assert_runs_as(model, path, torch.randint(11, (5, 9)), torch.tensor([9, 2, 0, 1, 3]))


def test_an_unbatched_sequence(tmp_path: Path) -> None:
    model, path = lstm_ext.LSTM(I, H, 2).eval(), tmp_path / "row.onnx"
    assert nodes(exported(model, (torch.randn(4, I),), ({0: DYNAMIC},), path))["LSTM"] == 2
    assert_runs_as(model, path, torch.randn(9, I))


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_of_torch_export(strict: bool, tmp_path: Path) -> None:
    """It names our op; `decompositions` puts the node there."""
    model, path = lstm_ext.LSTM(I, H, bidirectional=True).eval(), tmp_path / "lstm.onnx"
    program = torch.export.export(
        model, (torch.randn(4, 2, I),), dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},), strict=strict
    )
    decomposed = program.run_decompositions(lstm_ext.onnx.decompositions())
    assert nodes(exported(decomposed, (), None, path))["LSTM"] == 1
    assert_runs_as(model, path, torch.randn(7, 3, I))


def test_the_exporter_of_torchscript(tmp_path: Path) -> None:
    """It has a rule for torch's own LSTM, which is recorded for it."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = lstm_ext.LSTM(I, H, 2, bidirectional=True, batch_first=True)

        def forward(self, x: Any) -> Any:
            return self.lstm(x)[0]

    model, path = Outer().eval(), tmp_path / "old.onnx"
    names: dict[str, Any] = {"input_names": ["x"], "dynamic_axes": {"x": {0: "B", 1: "T"}}}
    torch.onnx.export(model, (torch.randn(2, 4, I),), path, dynamo=False, **names)
    assert nodes(onnx.load(path))["LSTM"] == 2
    assert_runs_as(model, path, torch.randn(3, 7, I))
    with pytest.raises(NotImplementedError, match=r"lengths.*dynamo=True"):
        torch.onnx.export(
            Model(model.lstm, lengths=True), (torch.randn(2, 4, I), torch.tensor([4, 1])), path, dynamo=False
        )


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "projection": ({"proj_size": 2}, {}, "proj_size: expected 0"),
    "resets": ({}, {"resets": torch.zeros(4, 2, dtype=torch.bool)}, "resets: expected None"),
    "cells": ({}, {"return_cells": True}, "return_cells: expected False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_onnx_cannot_say_is_refused(name: str) -> None:
    options, keywords, message = REFUSED[name]
    module = lstm_ext.LSTM(I, H, **options).eval()
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=message):
        torch.onnx.export(module, (torch.randn(4, 2, I),), kwargs=keywords, dynamo=True, verbose=False)
    program = torch.export.export(module, (torch.randn(4, 2, I),), keywords)
    with pytest.raises(NotImplementedError, match=message):
        program.run_decompositions(lstm_ext.onnx.decompositions())


def test_a_packed_sequence_is_refused() -> None:
    module, packed = lstm_ext.LSTM(I, H).eval(), pack_sequence([torch.randn(3, I), torch.randn(2, I)])
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="input: expected a padded sequence, with lengths"):
        torch.onnx.export(module, (packed,), dynamo=True, verbose=False)


def test_padding_never_matters(tmp_path: Path) -> None:
    """NaN past a length stays out of the results of onnxruntime too."""
    model, path = Model(lstm_ext.LSTM(I, H, bidirectional=True), lengths=True).eval(), tmp_path / "lstm.onnx"
    x, lengths = torch.randn(4, 3, I), torch.tensor([4, 0, 2])
    exported(model, (x, lengths), ({0: DYNAMIC, 1: DYNAMIC}, ({0: DYNAMIC},)), path)
    x[torch.arange(4)[:, None] >= lengths] = np.nan
    assert_runs_as(model, path, x, lengths)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_frozen_layers_are_nodes(weights: str | None, tmp_path: Path) -> None:
    """In float32, with the weights that are stored, which is said."""
    model, path = lstm_ext.freeze(lstm_ext.LSTM(I, H, 2, bidirectional=True), weights), tmp_path / "frozen.onnx"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loaded = exported(model, (torch.randn(4, 3, I),), ({0: DYNAMIC, 1: DYNAMIC},), path)
    said = [str(each.message) for each in warned if "ONNX gets" in str(each.message)]
    assert said == ([] if weights is None else ["ONNX gets the weights as float32, not int8"])
    assert nodes(loaded)["LSTM"] == 2
    layers = model if weights is None else with_weights(lstm_ext.LSTM(I, H, 2, bidirectional=True), model)
    for T, B in ((4, 3), (7, 1)):
        assert_runs_as(layers.eval(), path, torch.randn(T, B, I))


@pytest.mark.parametrize("cell", [False, True])
def test_frozen_programs_for_onnx(cell: bool) -> None:
    frozen: Any = lstm_ext.freeze((lstm_ext.LSTMCell if cell else lstm_ext.LSTM)(I, H), "bfloat16")
    program = torch.export.export(frozen, (torch.randn((2, I) if cell else (4, 2, I)),))
    decomposed = str(program.run_decompositions(lstm_ext.onnx.decompositions()).graph)
    assert "lstm_ext" not in decomposed
    assert decomposed.count("onnx_symbolic") == 1
    projected: Any = lstm_ext.freeze(lstm_ext.LSTM(I, H, proj_size=2))
    program = torch.export.export(projected, (torch.randn(4, 2, I),))
    with pytest.raises(NotImplementedError, match="proj_size: expected 0"):
        program.run_decompositions(lstm_ext.onnx.decompositions())


# Accuracy ------------------------------------------------------------------------------------------------------------


def digits() -> tuple[Any, Any, Any, Any]:
    """A layer and a head that tell the digits of scikit-learn, what they read, and what is right."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(data.images / 16, dtype=torch.float32).transpose(0, 1).contiguous()  # [8, B, 8]
    target = torch.tensor(data.target)
    torch.manual_seed(0)
    lstm, head = lstm_ext.LSTM(8, 64), nn.Linear(64, 10)
    optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], 0.01)
    with threads(1):
        for _ in range(12):
            for rows in torch.randperm(1400).split(50):
                loss = nn.functional.cross_entropy(head(lstm(x[:, rows])[0][-1]), target[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return lstm, head, x, target


def characters() -> tuple[Any, Any, Any, Any]:
    """The same of the characters of a text, read after its end."""
    lstm, head, x, ids = learned_text(48)
    return lstm, head, x[:-1], ids[1:]


def wide_characters() -> tuple[Any, Any, Any, Any]:
    """The same with so many inputs that int8 has 8 bits of each."""
    lstm, head, x, ids = learned_text(136)
    return lstm, head, x[:-1], ids[1:]


def nodes_of_constants(lstm: Any, x: Any) -> bytes:
    """The model whose weights are constants in the file, as quantize_dynamic wants them."""
    constants, layers, y = {"direction": np.array([1])}, [], "x"
    for n, layer in enumerate(lstm_ext.convert.from_state_dict(lstm.state_dict())):
        arrays = {f"{name}{n}": a for name, a in lstm_ext.convert.to_onnx(layer).items()}
        constants |= arrays
        layers.append(onnx.helper.make_node("LSTM", [y, *arrays], [f"wide{n}"], hidden_size=lstm.hidden_size))
        layers.append(onnx.helper.make_node("Squeeze", [f"wide{n}", "direction"], [y := f"y{n}"]))
    rows, numbers = list(x.shape[:-1]), onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        layers,
        "lstm",
        [onnx.helper.make_tensor_value_info("x", numbers, x.shape)],
        [onnx.helper.make_tensor_value_info(y, numbers, [*rows, lstm.hidden_size])],
        [onnx.numpy_helper.from_array(a, name) for name, a in constants.items()],
    )
    opset = onnx.helper.make_opsetid("", 17)
    return bytes(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString())


@pytest.mark.parametrize("trained", [digits, characters, wide_characters])
def test_int8_is_no_less_accurate_than_onnxruntimes(trained: Any, tmp_path: Path) -> None:
    """Of trained layers, against float64: no larger an error than DynamicQuantizeLSTM's and torch's; the same told."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    lstm, head, x, target = trained()
    path, quantised = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    path.write_bytes(nodes_of_constants(lstm, x))
    quantize_dynamic(path, quantised, weight_type=QuantType.QInt8, per_channel=True)
    assert nodes(onnx.load(quantised))["DynamicQuantizeLSTM"] == lstm.num_layers
    session = ort.InferenceSession(quantised, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        exact = copy.deepcopy(lstm).double()(x.double())[0]
        whole = nn.Sequential(lstm_ext.to_torch(copy.deepcopy(lstm)))
        others = {
            "onnxruntime": torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]),
            "torch": torch.ao.quantization.quantize_dynamic(whole, {nn.LSTM})(x)[0],
        }
        ours = {weights: lstm_ext.freeze(lstm, weights)(x)[0] for weights in ("float32", "bfloat16", "int8")}

        def share(y: Any) -> float:
            y = y[-1] if trained is digits else y
            return float((head(y).argmax(-1) == target).double().mean())

        shares = {name: share(y) for name, y in ours.items()}
    error = (ours["int8"] - exact).abs()
    for name, y in others.items():
        theirs = (y - exact).abs()
        assert error.mean() <= theirs.mean(), name
        assert error.norm() <= theirs.norm(), name
        if trained is not wide_characters:  # among so many numbers the largest error is chance: some 0.03 of either
            assert error.max() <= theirs.max(), name
    assert shares["float32"] > 0.9
    assert abs(shares["int8"] - shares["float32"]) <= 0.003
    assert abs(shares["bfloat16"] - shares["float32"]) <= 0.003
