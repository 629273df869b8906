"""What other people's code does to a `torch.nn.LSTM`, done to ours: with the same effect."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import lstm_ext

from .drop_in import B, H, I, T, assert_same, pair, run, tensors

LSTMS: dict[str, Callable[..., Any]] = {
    "ours": lstm_ext.LSTM,
    "replaced": lambda *args, **options: lstm_ext.replace_lstm(nn.LSTM(*args, **options)),
}
X = torch.randn(T, B, I)


# Weights that others put in ------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """Low-rank adapters as people write them, which all end in `_flat_weights`."""

    def __init__(self, lstm: Any, how: str) -> None:
        super().__init__()
        self.lstm, self.how = lstm.requires_grad_(False), how
        self.a, self.b = nn.Parameter(torch.randn(4 * H, 1)), nn.Parameter(torch.randn(1, I))
        if how == "pre-hook":
            lstm.register_forward_pre_hook(lambda module, _: setattr(module, "_flat_weights", self.weights()))

    def weights(self) -> list[Any]:
        changed = {"weight_ih_l0": self.lstm.weight_ih_l0 + self.a @ self.b}
        return [changed.get(name, getattr(self.lstm, name)) for name in self.lstm._flat_weights_names]

    def forward(self, x: Any) -> Any:
        if self.how == "list":
            self.lstm._flat_weights = self.weights()
        if self.how == "item":
            self.lstm._flat_weights[0] = self.weights()[0]
        return self.lstm(x)


@pytest.mark.parametrize("how", ["list", "item", "pre-hook"])
@pytest.mark.parametrize("name", LSTMS)
def test_what_is_written_to_flat_weights_is_used(name: str, how: str) -> None:
    stock = Adapted(nn.LSTM(I, H, 2), how)
    ours = Adapted(LSTMS[name](I, H, 2), how)
    ours.load_state_dict(stock.state_dict())
    for _ in range(2):
        for module in (stock, ours):
            module.zero_grad()
            module(X)[0].square().sum().backward()
        assert_same([*tensors(ours(X)), ours.a.grad, ours.b.grad], [*tensors(stock(X)), stock.a.grad, stock.b.grad])
        for module in (stock, ours):
            with torch.no_grad():
                module.a.mul_(0.5)


def with_own_weights(base: Any) -> Any:
    class Scaled(base):  # type: ignore[misc]
        scale = 0.5

        def _init_flat_weights(self) -> None:
            super()._init_flat_weights()
            self._flat_weights = [self.scale * w for w in self._flat_weights]

    return Scaled


def with_computed_weights(base: Any) -> Any:
    class Quantised(base):  # type: ignore[misc]
        levels = 0

        def __getattr__(self, name: str) -> Any:
            value = super().__getattr__(name)
            return (value * 8).round() / 8 if self.levels and name.startswith("weight") else value

    return Quantised


@pytest.mark.parametrize(
    ("derive", "cell"), [(with_own_weights, False), (with_computed_weights, False), (with_computed_weights, True)]
)
def test_subclasses_that_compute_weights_are_asked(derive: Callable[[Any], Any], cell: bool) -> None:
    modules = []
    for base in (nn.LSTMCell, lstm_ext.LSTMCell) if cell else (nn.LSTM, lstm_ext.LSTM):
        torch.manual_seed(1)  # the list that a module makes of its weights stays when they change, in torch's class too
        modules.append(derive(base)(I, H).float())
        modules[-1].levels = 8
    stock, ours = modules
    plain = nn.LSTMCell(I, H) if cell else nn.LSTM(I, H)
    plain.load_state_dict(stock.state_dict())
    x = X[0] if cell else X
    with torch.no_grad():
        actual, expected = tensors(ours(x)), tensors(stock(x))
        assert_same(actual, expected)
        assert not torch.allclose(actual[0], plain(x)[0])
        weights = {name: 2 * w for name, w in plain.state_dict().items()}
        assert_same(
            tensors(torch.func.functional_call(ours, weights, (x,))),
            tensors(torch.func.functional_call(stock, weights, (x,))),
        )


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", LSTMS)
def test_what_is_written_after_a_weight_was_set_is_used(name: str, assign: bool) -> None:
    modules = nn.LSTM(I, H), LSTMS[name](I, H)
    state = modules[0].state_dict()
    results = []
    for module in modules:
        if assign:
            module.load_state_dict({n: w.clone() for n, w in state.items()}, assign=True)
        else:
            module.load_state_dict(state)
            module.weight_hh_l0 = nn.Parameter(torch.zeros(4 * H, H))
        module(X)
        module._flat_weights[0] = 2 * module.weight_ih_l0
        results.append(tensors(module(X)))
    assert_same(results[1], results[0])


def test_a_swap_keeps_what_is_written_after_a_weight_was_set() -> None:
    module = nn.LSTM(I, H)
    module.weight_hh_l0 = nn.Parameter(torch.zeros(4 * H, H))
    lstm_ext.replace_lstm(module)
    module._flat_weights = [0 * w for w in module._flat_weights]
    assert not module(X)[0].any()


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
def test_a_cell_with_one_bias(missing: str) -> None:
    stock, ours = pair(I, H, cell=True)
    for module in (stock, ours):
        setattr(module, missing, None)
    assert_same(run(ours, X[0]), run(stock, X[0]))


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0", "weight_hh_l1", "bias_hh_l1"])
def test_a_deleted_weight_is_refused_as_by_torch(name: str) -> None:
    stock, ours = pair(I, H, 2)
    for module in (stock, ours):
        setattr(module, name, None)
    with pytest.raises(TypeError) as expected:
        stock(X)
    with pytest.raises(TypeError) as actual:
        ours(X)
    assert str(actual.value) == str(expected.value)


# Methods -------------------------------------------------------------------------------------------------------------


def test_the_methods_of_torchs_class_are_there() -> None:
    stock, ours = pair(I, H, 2, bidirectional=True, proj_size=3)
    state = torch.randn(4, B, 3), torch.randn(4, B, H)
    order = torch.tensor([2, 0, 1])
    assert_same(list(ours.permute_hidden(state, order)), list(stock.permute_hidden(state, order)))
    assert ours.check_forward_args(X, state, None) is None
    for module in (stock, ours):
        with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(4, 3, 7\), got \[4, 3, 3\]"):
            module.check_forward_args(X, (state[0], state[0]), None)
    assert ours.get_expected_cell_size(X, None) == stock.get_expected_cell_size(X, None) == (4, B, H)
    public = {name for name in dir(nn.LSTM) if not name.startswith("__")}
    assert public <= set(dir(lstm_ext.LSTM))


def asking(base: Any) -> Any:
    class Asking(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.asked: list[str] = []

        def check_forward_args(self, input: Any, hidden: Any, batch_sizes: Any) -> None:
            self.asked.append(f"check {list(input.shape)} {[list(a.shape) for a in hidden]}")
            super().check_forward_args(input, hidden, batch_sizes)

        def permute_hidden(self, hx: Any, permutation: Any) -> Any:
            self.asked.append(f"permute {permutation is not None}")
            return tuple(2 * a for a in super().permute_hidden(hx, permutation))

    return Asking


@pytest.mark.parametrize("form", ["padded", "state", "unbatched", "packed"])
def test_overridden_methods_are_asked(form: str) -> None:
    stock, ours = (asking(n.LSTM)(I, H, 2) for n in (nn, lstm_ext))
    ours.load_state_dict(stock.state_dict())
    state = (torch.randn(2, B, H), torch.randn(2, B, H))
    args: tuple[Any, ...] = {
        "padded": (X,),
        "state": (X, state),
        "unbatched": (X[:, 0], (state[0][:, 0], state[1][:, 0])),
        "packed": (pack_sequence([X[:n, 0] for n in (2, 5, 3)], enforce_sorted=False), state),
    }[form]
    assert_same(tensors(ours(*args)), tensors(stock(*args)))
    if form != "packed":  # there torch leaves the checks to its operator
        asked = [a for a in ours.asked if a != "permute False"]
        assert asked == [a for a in stock.asked if a != "permute False"] != []


OVERRIDES: dict[str, Callable[[Any], Any]] = {
    "permute_hidden": lambda module: lambda hx, order: tuple(2 * a for a in hx),
    "_update_flat_weights": lambda module: (
        lambda: setattr(module, "_flat_weights", [2 * getattr(module, name) for name in module._flat_weights_names])
    ),
}


@pytest.mark.parametrize("when", ["ours", "before the swap", "after the swap"])
@pytest.mark.parametrize("name", OVERRIDES)
def test_methods_overridden_on_one_module_are_asked(name: str, when: str) -> None:
    stock, ours = pair(I, H)
    if when != "ours":
        ours = lstm_ext.to_torch(ours)
        ours = ours if when == "before the swap" else lstm_ext.replace_lstm(ours)
    for module in (stock, ours):
        setattr(module, name, OVERRIDES[name](module))
    ours = lstm_ext.replace_lstm(ours) if when == "before the swap" else ours
    assert isinstance(ours, lstm_ext.LSTM)
    assert_same(run(ours, X), run(stock, X))


def copying(base: Any) -> Any:
    class Copying(base):  # type: ignore[misc]
        """Its forward is made of the pieces that torch's is."""

        def forward(self, input: Any, hx: Any = None) -> Any:
            self._update_flat_weights()
            if hx is None:
                sizes = self.get_expected_hidden_size(input, None), self.get_expected_cell_size(input, None)
                hx = input.new_zeros(sizes[0]), input.new_zeros(sizes[1])
            self.check_forward_args(input, hx, None)
            hx = self.permute_hidden(hx, None)
            options = self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first
            y, *state = torch._VF.lstm(input, hx, self._flat_weights, *options)
            return y, self.permute_hidden(tuple(state), None)

    return Copying


def test_a_forward_that_was_copied_from_torch_runs() -> None:
    stock, ours = (copying(n.LSTM)(I, H, 2) for n in (nn, lstm_ext))
    ours.load_state_dict(stock.state_dict())
    assert_same(run(ours, X), run(stock, X))


# Graphs of torch.fx, traces, scripts ---------------------------------------------------------------------------------


class Uses(nn.Module):
    """A model that unpacks what its layers return."""

    def __init__(self, n: Any) -> None:
        super().__init__()
        self.lstm, self.cell = n.LSTM(I, H, 2), n.LSTMCell(H, H)

    def forward(self, x: torch.Tensor):
        y, state = self.lstm(x)
        h, c = self.cell(y[0], (state[0][0], state[1][0]))
        return y, h + c


@pytest.mark.parametrize("replaced", [False, True])
def test_fx_sees_leaves(replaced: bool) -> None:
    stock, ours = Uses(nn), Uses(lstm_ext)
    ours.load_state_dict(stock.state_dict())
    if replaced:
        ours = lstm_ext.replace_lstm(Uses(nn))
        ours.load_state_dict(stock.state_dict())
    graphs = [torch.fx.symbolic_trace(model) for model in (stock, ours)]
    assert graphs[0].code == graphs[1].code
    assert_same(tensors(graphs[1](X)), tensors(stock(X)))
    torch.fx.passes.shape_prop.ShapeProp(graphs[1]).propagate(X)
    (lstm,) = [node for node in graphs[1].graph.nodes if node.target == "lstm"]
    assert lstm.meta["tensor_meta"][0].shape == (T, B, H)


def test_fx_records_the_new_arguments() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = lstm_ext.LSTM(I, H)

        def forward(self, x: Any, lengths: Any) -> Any:
            return self.lstm(x, lengths=lengths, return_cells=True)[2]

    model, lengths = Masked(), torch.tensor([1, 6, 3])
    graph = torch.fx.symbolic_trace(model)
    (node,) = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert set(node.kwargs) == {"lengths", "return_cells"}
    assert torch.equal(graph(X, lengths), model(X, lengths))


TRACED: dict[str, tuple[Callable[[], Any], tuple[Any, ...], list[str]]] = {
    "one layer": (lambda: lstm_ext.LSTM(I, H), (X,), ["aten::lstm"]),
    "stack": (lambda: lstm_ext.LSTM(I, H, 2, bidirectional=True, batch_first=True), (X,), ["aten::lstm"]),
    "state": (lambda: lstm_ext.LSTM(I, H).eval(), (X, (torch.zeros(1, B, H), torch.ones(1, B, H))), ["aten::lstm"]),
    "unbatched": (lambda: lstm_ext.LSTM(I, H), (X[:, 0],), ["aten::lstm"]),
    "replaced": (lambda: lstm_ext.replace_lstm(nn.LSTM(I, H, 2)), (X,), ["aten::lstm"]),
    "cell": (lambda: lstm_ext.LSTMCell(I, H), (X[0],), []),
    "cell with a state": (
        lambda: lstm_ext.LSTMCell(I, H),
        (X[0], (X[0, :, :1].repeat(1, H),) * 2),
        [],
    ),
}


RUN_TRACES = """
import sys, torch
for folder in sys.argv[1:]:
    args = torch.load(folder + "/args.pt")
    torch.save(torch.jit.load(folder + "/trace.pt")(*args), folder + "/result.pt")
assert "lstm_ext" not in sys.modules
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, Any]]:
    """Of each of TRACED the module, its trace, and what another process, without lstm_ext, has from the trace."""
    folders, modules, traces = {name: tmp_path_factory.mktemp("trace") for name in TRACED}, {}, {}
    for name, (make, args, _) in TRACED.items():
        modules[name] = make()
        traces[name] = torch.jit.trace(modules[name], args)
        traces[name].save(folders[name] / "trace.pt")
        torch.save(args, folders[name] / "args.pt")
    subprocess.run([sys.executable, "-c", RUN_TRACES, *map(str, folders.values())], check=True, timeout=300)
    return {name: (modules[name], traces[name], torch.load(folders[name] / "result.pt")) for name in TRACED}


@pytest.mark.parametrize("name", TRACED)
def test_a_trace_records_torchs_own_operator(name: str, traced: dict[str, tuple[Any, Any, Any]]) -> None:
    """So that a process, or a runtime, without lstm_ext can read it."""
    (_, args, operators), (module, trace, result) = TRACED[name], traced[name]
    kinds = [node.kind() for node in trace.inlined_graph.nodes()]
    assert [kind for kind in kinds if "lstm" in kind] == operators  # torch's cell is recorded in its parts
    assert {kind.partition("::")[0] for kind in kinds} == {"aten", "prim"}
    assert_same(tensors(result), tensors(module(*args)))


def test_a_trace_of_functions_too() -> None:
    w_ih, w_hh = torch.randn(4 * H, I), torch.randn(4 * H, H)
    for function, x in ((lstm_ext.lstm, X), (lstm_ext.lstm_cell, X[0])):
        trace = torch.jit.trace(lambda x, f=function: f(x, None, w_ih, w_hh)[0], (x,))
        assert "lstm_ext::" not in str(trace.inlined_graph)
        assert_same([trace(x)], [function(x, None, w_ih, w_hh)[0]])


def test_a_trace_of_what_torch_lacks_records_our_operator() -> None:
    module, lengths = lstm_ext.LSTM(I, H).requires_grad_(False), torch.tensor([1, 6, 3])
    trace = torch.jit.trace(lambda x, lengths: module(x, lengths=lengths)[0], (X, lengths))
    assert "lstm_ext::layer_forward" in str(trace.inlined_graph)
    assert_same([trace(X, lengths)], [module(X, lengths=lengths)[0]])


def test_under_torchs_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual quick try: another class is put into torch.nn."""
    monkeypatch.setattr(nn, "LSTM", lstm_ext.LSTM)
    monkeypatch.setattr(nn, "LSTMCell", lstm_ext.LSTMCell)
    model = Uses(nn)
    assert type(model.lstm) is lstm_ext.LSTM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        script = torch.jit.script(model)
    assert_same(tensors(script(X)), tensors(model(X)))
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D, got 1D instead"):
        model.lstm(X[0, 0])
    assert type(lstm_ext.to_torch(model).lstm) is torch.nn.modules.rnn.LSTM


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
@pytest.mark.parametrize("batch_first", [False, True])
def test_masks_of_other_kinds(kind: Callable[[Any], Any], batch_first: bool) -> None:
    """Lengths come as for `pack_padded_sequence`, and the resets of an environment are often an array."""
    module, lengths = lstm_ext.LSTM(I, H, 2, batch_first=batch_first), [2, 0, 3]
    x = X[:3].transpose(0, 1) if batch_first else X[:3]
    resets = torch.rand(3, 3) < 0.5
    expected = module(x, lengths=torch.tensor(lengths), resets=resets)
    assert_same(tensors(module(x, lengths=kind(lengths), resets=kind(resets.tolist()))), tensors(expected))
    one = module(x[0] if batch_first else x[:, 0], lengths=kind(lengths[:1]))
    assert_same(tensors(one), tensors(module(x[0] if batch_first else x[:, 0], lengths=torch.tensor(lengths[:1]))))


def test_a_wrong_state_without_a_kernel_is_refused_as_by_torch() -> None:
    stock, ours = pair(I, H)
    state = torch.zeros(1, B, H)
    for module in (stock, ours):
        with pytest.raises(RuntimeError, match=r"should also be 3-D but got \(3-D, 2-D\) tensors"):
            module(X.to(torch.complex64), (state, state[0]))


def test_where_torch_finds_no_fault_its_result_is_given() -> None:
    """What our kernels refuse and torch's own cell takes, with a word of warning."""
    stock, ours = pair(I, H, cell=True)
    state = torch.randn(B, H), torch.randn(B, H).double()
    for args in ((X[0].to_sparse(),), (X[0], state)):
        lstm_ext.engines.warn_once.cache_clear()
        with pytest.warns(UserWarning, match="lstm_ext runs torch's own LSTMCell: (x|c0): expected"):
            actual = ours(*args)
        assert [a.dtype for a in actual] == [a.dtype for a in stock(*args)]
        assert_same(list(actual), list(stock(*args)))
