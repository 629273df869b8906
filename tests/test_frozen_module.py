"""Frozen modules as modules: nothing changes them; they are copied, saved, compiled, mapped and exported."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import lstm_ext
from lstm_ext import frozen_stack

from .test_frozen import TOLERANCES, assert_close, assert_same


@pytest.mark.parametrize("weights", [None, "bfloat16", "int8"])
def test_nothing_changes_it(weights: str | None) -> None:
    module = lstm_ext.LSTM(5, 9, 2)
    frozen, x = lstm_ext.freeze(module, weights), torch.randn(4, 2, 5)
    expected = frozen(x)
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
    for a in frozen.state_dict().values():
        a.zero_()
    assert not list(frozen.parameters())
    assert not list(frozen.buffers())
    changes = [
        lambda: frozen.train(),
        lambda: setattr(frozen, "weight_ih_l0", torch.zeros(36, 5)),
        lambda: setattr(frozen, "weight_ih_l0", None),
        lambda: setattr(frozen, "hidden_size", 3),
        lambda: setattr(frozen, "training", True),
        lambda: setattr(frozen, "_stack", None),
        lambda: delattr(frozen, "_tensors"),
        lambda: frozen.register_buffer("weight_ih_l0", torch.zeros(36, 5)),
        lambda: frozen.add_module("head", torch.nn.Linear(9, 2)),
        lambda: frozen.double(),
        lambda: frozen.to(torch.float16),
        lambda: frozen.to("meta"),
        lambda: frozen.register_parameter("weight_ih_l0", torch.nn.Parameter(torch.zeros(36, 5))),
        lambda: frozen.load_state_dict({name: a * 0 for name, a in frozen.state_dict().items()}),
        lambda: torch.nn.Sequential(frozen).train(),
    ]
    for change in changes:
        with pytest.raises(RuntimeError, match="freeze that again"):
            change()
    frozen.register_forward_hook(lambda *_: None).remove()
    frozen.eval().cpu().float().to("cpu")
    frozen.load_state_dict(frozen.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        frozen.load_state_dict({})
    assert_same(frozen(x), expected)
    assert not frozen(x.requires_grad_())[0].requires_grad


@pytest.mark.parametrize("weights", [None, "bfloat16", "int8"])
def test_copies_and_files(weights: str | None) -> None:
    model = torch.nn.ModuleDict({"lstm": lstm_ext.LSTM(5, 9, 2, peephole=True), "head": torch.nn.Linear(9, 2)})
    frozen, x = lstm_ext.freeze(model, weights), torch.randn(4, 2, 5)
    assert isinstance(model["lstm"], lstm_ext.LSTM)
    assert isinstance(frozen["lstm"], lstm_ext.FrozenLSTM)
    expected, file = frozen["lstm"](x), io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (loaded, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert_same(other["lstm"](x), expected)
        assert other["lstm"].error == frozen["lstm"].error
        assert repr(other) == repr(frozen)
    names = [name for name in frozen.state_dict() if not name.endswith("scale_l0") and "_scale_" not in name]
    assert names == list(model.state_dict())
    state = frozen["lstm"].__getstate__()
    for version in (2, None):
        with pytest.raises(RuntimeError, match="expected format 1 of a frozen module, got"):
            lstm_ext.FrozenLSTM.__new__(lstm_ext.FrozenLSTM).__setstate__({**state, "_format": version})


@pytest.mark.parametrize("weights", [None, "bfloat16", "int8"])
def test_compilers_see_one_op(weights: str | None) -> None:
    model = lstm_ext.freeze(torch.nn.Sequential(lstm_ext.LSTM(5, 9, 2, bidirectional=True)), weights)
    x, hx = torch.randn(4, 2, 5), (torch.randn(4, 2, 9), torch.randn(4, 2, 9))
    frozen, expected = model[0], model[0](x, hx, lengths=torch.tensor([4, 1]))
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same(compiled(x, hx, lengths=torch.tensor([4, 1])), expected)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (x,), dynamic_shapes=(dynamic,))
    ops = [node.target for node in program.graph.nodes if "lstm_ext" in str(node.target)]
    assert ops == [torch.ops.lstm_ext.frozen_forward.default]
    longer, file = torch.randn(7, 3, 5), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for each in (program, torch.export.load(file)):
        assert_same(each.module()(longer), frozen(longer))
    packed = len(frozen_stack._known)
    module = program.module()
    for _ in range(3):
        module(longer)
    assert len(frozen_stack._known) <= packed + 1  # packed once


def test_the_op_packs_again_what_was_written_to() -> None:
    frozen, x = lstm_ext.freeze(lstm_ext.LSTM(5, 9)), torch.randn(4, 2, 5)
    weights = [a.clone() for a in frozen._tensors]

    def run(weights: list[torch.Tensor]) -> torch.Tensor:
        y: torch.Tensor = frozen_stack.frozen_forward(x, None, None, weights, None, None, None, False, frozen._text)[0]
        return y

    assert torch.equal(run(weights), frozen(x)[0])
    weights[1].mul_(2)
    other = lstm_ext.LSTM(5, 9)
    other.load_state_dict(dict(zip(frozen._spec.names(), weights, strict=True)))
    torch.testing.assert_close(run(weights), other(x)[0].detach())
    assert not torch.equal(run(weights), frozen(x)[0])
    count = len(frozen_stack._known)
    del weights
    assert len(frozen_stack._known) == count - 1


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_vmap_is_a_larger_batch(weights: str | None, batch_first: bool) -> None:
    frozen: Any = lstm_ext.freeze(lstm_ext.LSTM(5, 9, 2, batch_first=batch_first, bidirectional=True), weights)
    B, T = (4, 2) if batch_first else (2, 4)
    x, states = torch.randn(3, 4, 2, 5), torch.randn(3, 4, B, 9)
    lengths, resets = torch.randint(0, T + 1, (3, B)), torch.rand(3, 4, 2) < 0.3

    def run(x: Any, h: Any, lengths: Any, resets: Any) -> tuple[Any, ...]:
        y, (h_n, c_n) = frozen(x, (h, h), lengths=lengths, resets=resets)
        return y, h_n, c_n

    for mapped in ((0, 0, 0, 0), (0, None, None, None), (None, 0, None, 0)):
        given = [a if dim == 0 else a[1] for a, dim in zip((x, states, lengths, resets), mapped, strict=True)]
        ours = torch.func.vmap(run, in_dims=mapped)(*given)
        entries = [[a if dim is None else a[n] for a, dim in zip(given, mapped, strict=True)] for n in range(3)]
        for mine, each in zip(ours, zip(*(run(*each) for each in entries), strict=True), strict=True):
            torch.testing.assert_close(mine, torch.stack(each))
    rows = torch.func.vmap(lambda row: frozen(row)[0])(x[0])
    torch.testing.assert_close(rows, torch.stack([frozen(row)[0] for row in x[0]]))
    packed = pack_sequence([torch.randn(3, 5), torch.randn(2, 5)])
    state = torch.randn(3, 4, 2, 9)
    rows = torch.func.vmap(lambda h: frozen(packed, (h, h))[0].data)(state)
    torch.testing.assert_close(rows, torch.stack([frozen(packed, (h, h))[0].data for h in state]))


def test_vmap_of_cells() -> None:
    cell: Any = lstm_ext.freeze(lstm_ext.LSTMCell(5, 9), "int8")
    x, h, resets = torch.randn(3, 2, 5), torch.randn(3, 2, 9), torch.rand(3, 2) < 0.5

    def run(x: Any, h: Any, resets: Any) -> Any:
        return cell(x, (h, h), resets=resets)

    for given in ((x, h, resets), (x[0], h[0], resets[0])):
        expected = [run(*each) for each in zip(*given, strict=True)]
        for mine, each in zip(torch.func.vmap(run)(*given), zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(mine, torch.stack(each))
    y = torch.func.vmap(run, in_dims=(0, None, None))(x, h[0], resets[0])[0]
    torch.testing.assert_close(y, torch.stack([run(each, h[0], resets[0])[0] for each in x]))


def test_what_others_record() -> None:
    """torch.fx sees a module, and the flop counter its products, as of one that is not frozen."""
    for module, x in (
        (lstm_ext.LSTM(5, 9, 2, bidirectional=True), torch.randn(4, 2, 5)),
        (lstm_ext.LSTMCell(5, 9), torch.randn(2, 5)),
        (lstm_ext.BasicLSTMCell(9, input_size=5), torch.randn(2, 5)),
    ):
        frozen: Any = lstm_ext.freeze(module, "int8")
        graph = torch.fx.symbolic_trace(torch.nn.Sequential(frozen))
        assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
        assert torch.equal(graph(x)[0], frozen(x)[0])
        counted = []
        for each in (module, frozen):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                each(x)
            counted.append(counter.get_total_flops())
        assert counted[0] == counted[1] > 0


def test_hooks_and_modes() -> None:
    module, seen = lstm_ext.LSTM(5, 9), []
    module.register_forward_hook(lambda *_: seen.append(1))
    frozen, x = lstm_ext.freeze(module), torch.randn(4, 2, 5)
    frozen(x)
    assert seen == [1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen(x.bfloat16())[0].dtype == torch.float32
    with lstm_ext.use_backend("numpy"):
        y, *state = frozen._stack.run_by_engines(frozen_stack._call((x, *[None] * 6, False, "")))
        assert_same(frozen(x), (y, state))


class Watched(torch.nn.Module):
    """A model whose hook is a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.calls = torch.nn.LSTM(5, 9), 0
        self.lstm.register_forward_hook(self.count, with_kwargs=True, always_call=True)
        self.lstm.register_forward_pre_hook(self.scale, with_kwargs=True)

    def count(self, *_: Any) -> None:
        self.calls += 1

    @staticmethod
    def scale(_: Any, arguments: Any, options: Any) -> Any:
        return (arguments[0] * 2, *arguments[1:]), options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x, hx=None)[0]


def test_hooks_are_those_of_the_copy() -> None:
    model, x = Watched(), torch.randn(4, 2, 5)
    frozen = lstm_ext.freeze(model)
    torch.testing.assert_close(frozen(x), model(x), **TOLERANCES["float32"])
    assert (model.calls, frozen.calls) == (1, 1)
    with pytest.raises(RuntimeError, match="x: expected"):
        frozen(x[..., :2])
    assert frozen.calls == 2


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("made", ["pruned", "weight norm", "spectral norm"])
def test_weights_that_hooks_make(made: str) -> None:
    module, x = torch.nn.LSTM(5, 9), torch.randn(4, 2, 5)
    if made == "pruned":
        torch.nn.utils.prune.l1_unstructured(module, "weight_hh_l0", 0.5)
    elif made == "weight norm":
        torch.nn.utils.weight_norm(module, "weight_hh_l0")
    else:
        torch.nn.utils.spectral_norm(module, "weight_hh_l0")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= 1.5  # which nothing has seen yet
    torch.testing.assert_close(lstm_ext.freeze(module)(x)[0], module.eval()(x)[0], **TOLERANCES["float32"])


def test_programs_without_lstm_ext() -> None:
    """The op in torch's own operations."""
    for weights in (None, "int8"):
        frozen, x = lstm_ext.freeze(lstm_ext.LSTM(5, 9, 2), weights), torch.randn(4, 2, 5)
        program = torch.export.export(frozen, (x,))
        taken_apart = program.run_decompositions(lstm_ext.ops.decompositions())
        assert "lstm_ext" not in str(taken_apart.graph)
        tolerance = TOLERANCES["float32"] if weights is None else {"rtol": 1e-3, "atol": 1e-3}
        assert_close(taken_apart.module()(x), frozen(x), **tolerance)


# Of a model ----------------------------------------------------------------------------------------------------------


def test_a_model_is_copied() -> None:
    shared = torch.nn.LSTM(4, 4)
    model = torch.nn.ModuleDict({"a": shared, "b": shared, "c": lstm_ext.LSTMCell(4, 4), "d": torch.nn.GRU(4, 4)})
    frozen = lstm_ext.freeze(model)
    assert frozen["a"] is frozen["b"]
    assert isinstance(frozen["a"], lstm_ext.FrozenLSTM)
    assert isinstance(frozen["c"], lstm_ext.FrozenLSTMCell)
    assert isinstance(frozen["d"], torch.nn.GRU)
    assert model["a"] is shared
    assert frozen["d"].weight_ih_l0 is not model["d"].weight_ih_l0

    class Mine(torch.nn.LSTM):
        pass

    with pytest.warns(UserWarning, match="freeze leaves a alone: Mine is a subclass"):
        lstm_ext.freeze(torch.nn.ModuleDict({"a": Mine(3, 3), "b": torch.nn.LSTM(3, 3)}))
    with pytest.warns(UserWarning, match="freeze found no LSTM"):
        lstm_ext.freeze(torch.nn.ModuleDict({"d": torch.nn.GRU(4, 4)}))
    with pytest.raises(TypeError, match="Mine is a subclass"):
        lstm_ext.freeze(Mine(3, 3))
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module, got int"):
        lstm_ext.freeze(3)  # type: ignore[arg-type]


def test_what_is_frozen_already() -> None:
    frozen = lstm_ext.freeze(torch.nn.LSTM(4, 4), "int8")
    assert lstm_ext.freeze(frozen) is frozen
    assert lstm_ext.freeze(frozen, "int8") is frozen
    with pytest.raises(ValueError, match="it is frozen with weights 'int8' already: freeze the module"):
        lstm_ext.freeze(frozen, "float32")
    model = torch.nn.Sequential(frozen, torch.nn.Dropout(), torch.nn.LSTM(4, 4))
    again = lstm_ext.freeze(model)
    assert [getattr(each, "weights", "") for each in again] == ["int8", "", "float32"]
    assert not any(each.training for each in again.modules())
    assert model[1].training
    with pytest.warns(UserWarning, match="freeze leaves 0 alone: it is frozen with weights 'int8' already"):
        lstm_ext.freeze(model, "bfloat16")


def test_the_error_is_that_of_the_module() -> None:
    """Also of float64 weights that become float32, and of half ones whose bfloat16 is exact."""
    wide = torch.nn.LSTM(4, 6).double()
    assert 1e-9 < lstm_ext.freeze(wide, "float32").error < 1e-6
    assert lstm_ext.freeze(wide).error < 1e-14
    assert lstm_ext.freeze(wide.bfloat16(), "bfloat16").error == 0
    assert 1e-5 < lstm_ext.freeze(wide.float(), "int8").error < 1e-2
    with pytest.raises(ValueError, match="module: expected weights with contents, got some on the meta device"):
        lstm_ext.freeze(torch.nn.LSTM(4, 6, device="meta"))


def test_parametrized_and_replaced_modules() -> None:
    module = lstm_ext.replace_lstm(torch.nn.LSTM(5, 9))
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = torch.randn(4, 2, 5)
    assert_close(lstm_ext.freeze(module)(x), module(x))


def test_a_model_that_flattens_its_parameters_goes_on_doing_so() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = torch.nn.LSTM(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.lstm.flatten_parameters()
            return self.lstm(x)[0]

    model, x = Model(), torch.randn(5, 2, 3)
    torch.testing.assert_close(lstm_ext.freeze(model)(x), model(x))


def test_a_layer_on_the_cpu_is_frozen_where_another_device_is_the_default() -> None:
    module, x = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3)
    with torch.device("meta"):
        frozen = lstm_ext.freeze(module)
    assert_close(frozen(x), module(x))
