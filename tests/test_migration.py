"""`replace_lstm` and `to_torch`: the objects stay, what is left alone, what is told."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import types
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import lstm_ext
import lstm_ext.swap as swap_module

from .drop_in import B, H, I, T, assert_same, pair, run, tensors


class Doubled(nn.Module):
    def forward(self, weight: Any) -> Any:
        return 2 * weight


WEIGHT_CHANGES: list[Callable[[Any, str], Any]] = [
    lambda m, name: parametrize.register_parametrization(m, name, Doubled()),
    lambda m, name: nn.utils.weight_norm(m, name),
    lambda m, name: nn.utils.parametrizations.weight_norm(m, name),
    lambda m, name: prune.l1_unstructured(m, name, 0.5),
    lambda m, name: setattr(m, name, nn.Parameter(getattr(m, name) * 2)),
    lambda m, name: getattr(m, name).data.mul_(2),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", WEIGHT_CHANGES)
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("cell", [False, True])
def test_changed_weights_are_used(change: Callable[[Any, str], Any], replace: bool, cell: bool) -> None:
    """Changed before the swap or after, and again between two calls."""
    stock, ours = pair(I, H, cell=cell)
    x = torch.randn(B, I) if cell else torch.randn(T, B, I)
    name = "weight_ih" if cell else "weight_ih_l0"
    change(stock, name)
    if replace:
        ours = lstm_ext.replace_lstm(stock)
        assert isinstance(ours, lstm_ext.LSTMCell if cell else lstm_ext.LSTM)
    else:
        change(ours, name)
    assert_same(run(ours, x), run(stock, x))
    before = tensors(ours(x))[0]
    with torch.no_grad():
        for module in (stock,) if replace else (stock, ours):
            for parameter in module.parameters():
                parameter.mul_(0.5)
    assert not torch.equal(tensors(ours(x))[0], before)
    assert_same(run(ours, x), run(stock, x))


class OwnLSTM(nn.LSTM):
    pass


class OurOwnLSTM(lstm_ext.LSTM):
    pass


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(I, H, bidirectional=True)
        self.again = self.first
        self.cells = nn.ModuleList([nn.LSTMCell(2 * H, H), OwnLSTM(H, H), nn.Linear(H, H)])

    def forward(self, x: Any) -> Any:
        y, _ = self.first(x)
        h, c = self.cells[0](y[0])
        return self.cells[2](self.cells[1](h[None])[0] + c)


@pytest.mark.filterwarnings("ignore:.* leaves cells.1 alone")
def test_a_model_there_and_back() -> None:
    model, x, calls = Model(), torch.randn(T, B, I), []
    handle = model.first.register_forward_hook(lambda *_: calls.append(1))
    model.first.weight_ih_l0.requires_grad_(False)
    model.cells[0].eval()
    expected, names, parameters = model(x), list(model.state_dict()), list(model.parameters())
    modules = list(model.modules())
    for swap, lstm, cell in (
        (lstm_ext.replace_lstm, swap_module.LSTM, lstm_ext.LSTMCell),
        (partial(lstm_ext.replace_lstm, compilable=True), lstm_ext.LSTM, lstm_ext.LSTMCell),
        (lstm_ext.to_torch, nn.LSTM, nn.LSTMCell),
    ):
        assert swap(model) is model
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert [type(m) for m in (model.first, *model.cells)] == [lstm, cell, OwnLSTM, nn.Linear]
        assert model.again is model.first
        assert list(model.state_dict()) == names
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert not model.first.weight_ih_l0.requires_grad
        assert (model.first.training, model.cells[0].training) == (True, False)
        assert_same([model(x)], [expected])
    assert len(calls) == 4
    handle.remove()
    model(x)
    assert len(calls) == 4


ROOTS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((I, H, 2), {"dropout": 0.5}),
    ((I, H), {"batch_first": True, "bidirectional": True, "proj_size": 3, "dtype": torch.float64}),
    ((I, H), {"bias": False, "device": "meta"}),
]


@pytest.mark.parametrize(("args", "options"), ROOTS)
def test_a_root_is_returned_and_keeps_its_options(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    stock = nn.LSTM(*args, **options).eval()
    ours, back = copy.deepcopy(stock), copy.deepcopy(stock)
    assert lstm_ext.replace_lstm(ours) is ours
    assert lstm_ext.to_torch(lstm_ext.replace_lstm(back)) is back
    assert (type(stock), type(ours), type(back)) == (nn.LSTM, swap_module.LSTM, nn.LSTM)
    assert isinstance(ours, nn.LSTM)
    assert isinstance(ours, lstm_ext.LSTM)
    assert repr(stock) == repr(ours) == repr(back)
    assert not ours.training
    assert not back.training
    if stock.weight_ih_l0.is_meta:
        return
    x, dtype = (
        torch.randn(T, B, I, dtype=stock.weight_ih_l0.dtype),
        str(stock.weight_ih_l0.dtype).removeprefix("torch."),
    )
    for module in (ours, back, pickle.loads(pickle.dumps(ours)), copy.deepcopy(back)):
        assert_same(run(module, x), run(stock, x), dtype)
    assert_same(run(ours.float(), x.float()), run(copy.deepcopy(stock).float(), x.float()))


def test_what_is_no_lstm_is_returned_as_it_is() -> None:
    for module in (nn.Linear(2, 2), nn.GRU(2, 2)):
        name = type(module).__name__
        with pytest.warns(UserWarning, match=rf"replace_lstm found no torch.nn.LSTM and no .*LSTMCell in {name}"):
            assert lstm_ext.replace_lstm(module) is module
        with pytest.warns(UserWarning, match=rf"to_torch found no lstm_ext.LSTM and no lstm_ext.LSTMCell in {name}"):
            assert lstm_ext.to_torch(module) is module


def test_what_is_ours_already_stays_without_a_word() -> None:
    model = nn.Sequential(lstm_ext.LSTM(I, H), lstm_ext.LSTMCell(I, H), nn.LSTM(H, H))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm_ext.replace_lstm(lstm_ext.replace_lstm(model))
        assert [type(m) for m in model] == [lstm_ext.LSTM, lstm_ext.LSTMCell, swap_module.LSTM]
        lstm_ext.to_torch(lstm_ext.to_torch(model))
    assert [type(m) for m in model] == [nn.LSTM, nn.LSTMCell, nn.LSTM]


class Listed(nn.Module):
    """Layers in a list beside `add_module`, a method of one kept, and a layer that another object holds."""

    def __init__(self, lstm: Any = nn.LSTM) -> None:
        super().__init__()
        self.layers = []
        for n in range(2):
            layer = lstm(H, H, 2, dropout=0.5)
            self.add_module(f"layer{n}", layer)
            self.layers.append(layer)
        self.held = [lstm(H, H, 2, dropout=0.5)]
        self.last = self.held[0]
        self.run = self.last.forward

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x, _ = layer(x)
        return self.held[0](self.run(x)[0])[0]


@pytest.mark.parametrize("swap", [lstm_ext.replace_lstm, lstm_ext.to_torch])
def test_other_references_keep_what_runs(swap: Callable[[Any], Any]) -> None:
    model, x = Listed(nn.LSTM if swap is lstm_ext.replace_lstm else lstm_ext.LSTM), torch.randn(T, B, H)
    swap(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    zeros = {name: torch.zeros_like(a) for name, a in model.state_dict().items()}
    model.load_state_dict(zeros, assign=True)
    assert not model(x).any()
    assert all(type(a) is type(b) for a, b in zip(model.layers, (model.layer0, model.layer1), strict=True))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", WEIGHT_CHANGES)
@pytest.mark.parametrize("cell", [False, True])
def test_changed_weights_survive_the_way_back(change: Callable[[Any, str], Any], cell: bool) -> None:
    """Parametrizations, pruning masks and hooks work in a model, on torch's side and on ours."""
    stock, ours = pair(I, H, cell=cell)
    x = torch.randn(B, I) if cell else torch.randn(T, B, I)
    for module in (stock, ours):
        change(module, "weight_hh" if cell else "weight_hh_l0")
    model = nn.ModuleDict({"lstm": ours})
    names = list(model.state_dict())
    lstm_ext.to_torch(model)
    assert isinstance(model["lstm"], nn.LSTMCell if cell else nn.LSTM)
    assert list(model.state_dict()) == names
    assert_same(run(model["lstm"], x), run(stock, x))
    with torch.no_grad():
        for a, b in zip(model["lstm"].parameters(), stock.parameters(), strict=True):
            a.mul_(0.5)
            b.mul_(0.5)
    assert_same(run(model["lstm"], x), run(stock, x))


@pytest.mark.parametrize("swap", [lstm_ext.replace_lstm, lstm_ext.to_torch])
def test_parametrizations_and_pruning_can_be_removed_after_the_swap(swap: Callable[[Any], Any]) -> None:
    stock, ours = pair(I, H)
    module, x = (stock if swap is lstm_ext.replace_lstm else ours), torch.randn(T, B, I)
    parametrize.register_parametrization(module, "weight_hh_l0", Doubled())
    prune.random_unstructured(module, "weight_ih_l0", 0.5)
    new = swap(module)
    expected = run(new, x)[:3]
    assert parametrize.is_parametrized(new, "weight_hh_l0")
    assert prune.is_pruned(new)
    prune.remove(new, "weight_ih_l0")
    parametrize.remove_parametrizations(new, "weight_hh_l0")
    assert [name for name, _ in new.named_parameters()] == [
        "bias_ih_l0",
        "bias_hh_l0",
        "weight_ih_l0",
        "weight_hh_l0",
    ]
    assert_same(run(new, x)[:3], expected)


def test_a_forward_taken_before_refuses_what_torch_has_not() -> None:
    module, cell, x = lstm_ext.LSTM(3, 4), lstm_ext.LSTMCell(3, 4), torch.randn(5, 2, 3)
    forward, step = module.forward, cell.forward
    lstm_ext.to_torch(module)
    lstm_ext.to_torch(cell)
    assert_same(tensors(forward(x)), tensors(module(x)))
    for name, value in {"lengths": [5, 1], "resets": torch.ones(5, 2).bool(), "return_cells": True}.items():
        with pytest.raises(TypeError, match=name):
            forward(x, **{name: value})
    with pytest.raises(TypeError, match="resets"):
        step(x[0], resets=torch.ones(2).bool())


def test_hooks_that_know_their_module_stay() -> None:
    """torch keeps such a module by a weak reference."""
    model, seen = nn.Sequential(nn.LSTM(I, H)), []
    handle = model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    lstm_ext.replace_lstm(model)
    gc.collect()
    model.load_state_dict(model.state_dict())
    assert seen == [model[0]]
    handle.remove()
    model.load_state_dict(model.state_dict())
    assert len(seen) == 1


# What is told --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* alone")
def test_the_log_names_each_module_replaced(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    with caplog.at_level(logging.INFO, "lstm_ext"):
        lstm_ext.replace_lstm(model)
        lstm_ext.to_torch(model)
    assert [record.getMessage() for record in caplog.records] == [
        f"replace_lstm: first, again is now lstm_ext.LSTM({I}, {H}, bidirectional=True)",
        f"replace_lstm: cells.0 is now lstm_ext.LSTMCell({2 * H}, {H})",
        "replace_lstm: 2 modules replaced",
        f"to_torch: first, again is now torch.nn.LSTM({I}, {H}, bidirectional=True)",
        f"to_torch: cells.0 is now torch.nn.LSTMCell({2 * H}, {H})",
        "to_torch: 2 modules replaced",
    ]


def with_own_forward(module: Any) -> Any:
    module.forward = types.MethodType(lambda self, x: type(self).forward(self, 2 * x), module)
    return module


LEFT_ALONE: dict[str, tuple[Callable[[Any], Any], Callable[[], Any], str]] = {
    "subclass": (lstm_ext.replace_lstm, lambda: OwnLSTM(I, H), r"OwnLSTM is a subclass of torch\.nn\.LSTM"),
    "our subclass": (lstm_ext.to_torch, lambda: OurOwnLSTM(I, H), r"OurOwnLSTM is a subclass of lstm_ext\.LSTM"),
    "BasicLSTMCell": (lstm_ext.to_torch, lambda: lstm_ext.BasicLSTMCell(H), r"torch has no BasicLSTMCell"),
    "own forward": (lstm_ext.replace_lstm, lambda: with_own_forward(nn.LSTM(I, H)), "its forward method was replaced"),
    "our own forward": (lstm_ext.to_torch, lambda: with_own_forward(lstm_ext.LSTM(I, H)), "its forward method was"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_left_alone_is_named_with_the_reason(name: str) -> None:
    swap, make, reason = LEFT_ALONE[name]
    module = make()
    model = nn.ModuleDict({"encoder": module})
    with pytest.warns(UserWarning, match=f"{swap.__name__} leaves encoder alone: {reason}"):
        swap(model)
    assert model["encoder"] is module
    with pytest.warns(UserWarning, match=f"{swap.__name__} leaves the module itself alone: {reason}"):
        assert swap(module) is module


def test_one_module_is_said_as_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lstm_ext"):
        lstm_ext.replace_lstm(nn.LSTM(I, H))
    assert caplog.records[-1].getMessage() == "replace_lstm: 1 module replaced"


@pytest.mark.parametrize("allow_rnn", [False, True])
@pytest.mark.parametrize("compilable", [False, True])
def test_a_compiled_module_runs_the_new_class(allow_rnn: bool, compilable: bool) -> None:
    """As torch's class it breaks the graph, unless `allow_rnn` is set; ours runs in each case."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=allow_rnn):
        check_compiled(allow_rnn, compilable)
    torch._dynamo.reset()


def check_compiled(allow_rnn: bool, compilable: bool) -> None:
    stock, x = nn.LSTM(I, H), torch.randn(T, B, I)
    expected = tensors(stock(x))
    stock.compile(backend="eager")
    with torch.no_grad():
        stock(x)
        ours = lstm_ext.replace_lstm(stock, compilable=compilable)
        with torch.profiler.profile() as profile:
            actual = tensors(ours(x))
    assert_same(actual, expected)
    assert not any("aten::lstm" in event.key for event in profile.key_averages())
    whole = torch.compile(lambda x: ours(x)[0] * 2, backend="eager", fullgraph=True)
    if allow_rnn or compilable:
        assert_same([whole(x)], [2 * expected[0]])
    else:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            whole(x)
