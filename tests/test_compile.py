"""torch.compile, trace and script over the modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from lstm_ext import engines
from lstm_ext.testing import assert_close

from .conftest import count_runs

torch = pytest.importorskip("torch")

from functorch.compile import make_boxed_func  # noqa: E402
from torch import nn  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.nn.utils import prune, weight_norm  # noqa: E402
from torch.nn.utils.rnn import pack_sequence  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import lstm_ext  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def tensors(result: Any) -> list[Any]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [] if result is None else [t for each in result for t in tensors(each)]


def assert_same(actual: Any, expected: Any) -> None:
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        assert_close(a, e, "float32", terms=200)


def lstm(**options: Any) -> Any:
    return lstm_ext.LSTM(3, 4, 2, bidirectional=True, **options)


def masked_call(module: Any, T: int, B: int) -> Any:
    lengths, resets = torch.randint(T + 1, (B,)), torch.rand(T, B) < 0.2
    return (torch.randn(T, B, 3),), {"lengths": lengths, "resets": resets, "return_cells": True}


def state_call(module: Any, T: int, B: int) -> Any:
    return (torch.randn(T, B, 3), (torch.randn(4, B, 4), torch.randn(4, B, 4))), {}


MODULES: dict[str, tuple[Any, Any]] = {
    "lstm": (lstm, lambda m, T, B: ((torch.randn(T, B, 3),), {})),
    "batch first": (lambda: lstm(batch_first=True, proj_size=2), lambda m, T, B: ((torch.randn(B, T, 3),), {})),
    "state": (lstm, state_call),
    "masks": (lstm, masked_call),
    "unbatched": (lstm, lambda m, T, B: ((torch.randn(T, 3),), {})),
    "cell": (lambda: lstm_ext.LSTMCell(3, 4), lambda m, T, B: ((torch.randn(B, 3),), {})),
    "cell state": (
        lambda: lstm_ext.LSTMCell(3, 4, bias=False),
        lambda m, T, B: ((torch.randn(B, 3), (torch.randn(B, 4), torch.randn(B, 4))), {}),
    ),
    "cell resets": (
        lambda: lstm_ext.LSTMCell(3, 4),
        lambda m, T, B: ((torch.randn(B, 3), (torch.randn(B, 4), torch.randn(B, 4))), {"resets": torch.rand(B) < 0.5}),
    ),
    "basic": (lambda: lstm_ext.BasicLSTMCell(4, input_size=3), lambda m, T, B: ((torch.randn(B, 3),), {})),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_compiles_once_for_every_length_and_batch(name: str, training: bool) -> None:
    make, call = MODULES[name]
    module = make()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    first_count = None
    for T, B in ((5, 2), (7, 3), (4, 6)):
        args, options = call(module, T, B)
        with torch.set_grad_enabled(training):
            actual, expected = compiled(*args, **options), module(*args, **options)
            assert_same(actual, expected)
            if training:
                parameters = list(module.parameters())
                gradients = [
                    torch.autograd.grad(sum(t.pow(2).sum() for t in tensors(each)), parameters, allow_unused=True)
                    for each in (actual, expected)
                ]
                assert_same(*gradients)
        first_count = first_count or counter.frame_count
    assert counter.frame_count == first_count


def test_compiles_packed_sequences_and_functions() -> None:
    module, packed = lstm(), pack_sequence([torch.randn(n, 3) for n in (2, 4)], enforce_sorted=False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(compiled(packed), module(packed))
    weights = torch.randn(16, 3), torch.randn(16, 4), torch.randn(16)
    function = torch.compile(lstm_ext.lstm, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3)
    assert_same(function(x, None, *weights, reverse=True), lstm_ext.lstm(x, None, *weights, reverse=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_outputs_may_be_changed_in_place(backend: str) -> None:
    layer, cell = lstm(), lstm_ext.LSTMCell(8, 4)

    def call(x: torch.Tensor) -> torch.Tensor:
        y, _ = layer(x)
        h, c = cell(y.mul_(2)[-1])
        h.detach_()
        c[0] = 0
        return (y * 3).relu_().sum() + (h * c).sum()

    x, parameters = torch.randn(5, 2, 3), [*layer.parameters(), *cell.parameters()]
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    actual, expected = (torch.autograd.grad(each(x), parameters) for each in (compiled, call))
    assert_same(actual, expected)


def test_the_numbers_of_an_option_are_part_of_the_program() -> None:
    """A compiler takes those for its inputs that may change."""
    layer, weights = lstm(zoneout=0.1, cell_clip=0.5), (torch.randn(16, 3), torch.randn(16, 4))
    cell = lstm_ext.BasicLSTMCell(4, input_size=8)

    def call(x: torch.Tensor, clip: float) -> Any:
        cell.forget_bias = clip
        h, _ = cell(layer(x)[0][-1])
        return h, lstm_ext.lstm(x, None, *weights, cell_clip=clip)

    layer.eval()
    compiled, x = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager"), torch.randn(5, 2, 3)
    for clip in (0.1, 0.2):
        actual = compiled(x, clip)
        assert_same(actual, call(x, clip))


PACKED_OUTPUTS: dict[str, Any] = {
    "rows": lambda packed, state: packed.data,
    "h_n": lambda packed, state: state[0],
    "rows and c_n": lambda packed, state: packed.data.sum() + state[1].sum(),
}


@pytest.mark.parametrize("given", [None, "c0", "both"])
@pytest.mark.parametrize("used", PACKED_OUTPUTS)
def test_packed_sequences_train_compiled(used: str, given: str | None) -> None:
    """Whichever outputs are used and which states ask for gradients: what batch_sizes tell is known as it runs."""
    module, packed = lstm(), pack_sequence([torch.randn(n, 3) for n in (4, 2)])
    hx = None if given is None else [torch.randn(4, 2, 4, requires_grad=asked) for asked in (given == "both", True)]

    def call(packed: Any, hx: Any) -> Any:
        return PACKED_OUTPUTS[used](*module(packed, hx))

    results = []
    for each in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        y = each(packed, None if hx is None else tuple(hx))
        asked = [a for a in (*module.parameters(), *(hx or [])) if a.requires_grad]
        results.append([y, torch.autograd.grad(y.pow(2).sum(), asked, allow_unused=True)])
    assert_same(*results)


def test_a_compiled_packed_call_refuses_a_state_of_another_batch() -> None:
    module, packed = lstm(), pack_sequence([torch.randn(n, 3) for n in (4, 2)])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"h0: expected shape .* got \[2, 3, 4\]"):
        compiled(packed, (torch.zeros(4, 3, 4), torch.zeros(4, 3, 4)))


# What runs -----------------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """A larger model around the layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 3)
        self.lstm = lstm(batch_first=True, **options)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        y, (h_n, _) = self.lstm(self.embed(tokens), lengths=lengths)
        return self.head(self.norm(y + h_n[-2:].transpose(0, 1).flatten(1)[:, None])).log_softmax(-1)


def tagged(B: int = 3, T: int = 6) -> tuple[Any, Any]:
    return torch.randint(11, (B, T)), torch.randint(T + 1, (B,))


@pytest.fixture
def graphs() -> dict[str, list[Any]]:
    """The forward and backward graphs of all that `recording` compiles."""
    return {"forward": [], "backward": []}


def recording(graphs: dict[str, list[Any]]) -> Any:
    def compiler(name: str) -> Any:
        def keep(graph: Any, _: Any) -> Any:
            graphs[name].append(graph)
            return make_boxed_func(graph.forward)

        return keep

    return aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))


def our_calls(graph: Any, op: Any) -> list[Any]:
    return [node for node in graph.graph.nodes if node.target is op]


@pytest.mark.parametrize("training", [True, False])
def test_the_graph_calls_the_kernel_once_a_layer(training: bool, graphs: dict[str, list[Any]]) -> None:
    """And what is saved for the backward pass is saved where there is one."""
    model = Tagger()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=recording(graphs))
    with torch.set_grad_enabled(training):
        y = compiled(*tagged())
    if training:
        y.sum().backward()
    (forward,) = graphs["forward"]
    calls = our_calls(forward, torch.ops.lstm_ext.layer_forward.default)
    assert [call.args[-1] for call in calls] == [2 if training else 0] * 2
    assert not our_calls(forward, torch.ops.aten.sigmoid.default)
    assert len(graphs["backward"]) == training
    for backward in graphs["backward"]:
        assert len(our_calls(backward, torch.ops.lstm_ext.layer_backward.default)) == 2
        assert not our_calls(backward, torch.ops.lstm_ext.layer_forward.default)


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_call_runs_the_kernel_once_a_layer(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At run time, through inductor: nothing falls back to torch's own operations."""
    model, inputs = Tagger(), tagged()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    compiled(*inputs).sum().backward()
    counts = count_runs(engines.choose("cpu", torch.float32).engine, monkeypatch)
    monkeypatch.setattr(engines.composed, "forward", None)
    compiled.zero_grad()
    with torch.set_grad_enabled(training):
        y = compiled(*inputs)
    if training:
        y.sum().backward()
    assert counts == {"forward": 2, "backward": 2 if training else 0}
    assert_same(y, model(*inputs))
    if training:
        model(*inputs).sum().backward()
        assert_same([p.grad for p in compiled.parameters()], [p.grad for p in model.parameters()])


def test_sizes_become_dynamic_by_themselves() -> None:
    """As `torch.compile` does by default: once for the first sizes, once more for all others."""
    model, counter = Tagger(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for B, T in ((3, 6), (4, 7), (5, 8), (9, 2), (2, 9)):
        inputs = tagged(B, T)
        assert_same(compiled(*inputs), model(*inputs))
    assert counter.frame_count == 2


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool) -> None:
    """As uncompiled, dtypes and bits."""
    model = Tagger()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for inputs in (tagged(), tagged(5, 8)):
        results = []
        for call in (compiled, model):
            with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
                y = call(*inputs)
            gradients = torch.autograd.grad(y.float().pow(2).sum(), list(model.parameters())) if training else ()
            results.append([y.detach(), *gradients])
        for a, e in zip(*results, strict=True):
            assert a.dtype == e.dtype
            assert torch.equal(a, e)


# Dropout -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_dropout_draws_as_uncompiled(backend: str, batch_first: bool) -> None:
    """The same masks from the same seed, where torch draws as it does uncompiled."""
    if backend == "inductor" and batch_first and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 draws otherwise, also where F.dropout of a transposed tensor's copy is all there is")
    module, x = lstm(dropout=0.5, batch_first=batch_first), torch.randn(5, 2, 3)
    options = {"fallback_random": True} if backend == "inductor" else None
    compiled = torch.compile(module, fullgraph=True, backend=backend, options=options)
    results = []
    for call in (compiled, module, compiled):
        torch.manual_seed(3)
        y = call(x)
        results.append([y, torch.autograd.grad(y[0].pow(2).sum(), list(module.parameters()))])
    assert_same(results[0], results[1])
    assert_same(results[2], results[1])
    assert not torch.equal(compiled(x)[0], results[0][0][0])


def test_dropout_drops_its_share() -> None:
    """Of inductor's own random numbers too; none in evaluation."""
    T, B, H, p = 40, 50, 8, 0.3
    module = lstm_ext.LSTM(H, H, 2, dropout=p)
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
        # Layer 1 gives tanh(1) everywhere, layer 2 tanh(tanh(x)): zero where x was dropped.
        open_gates = torch.tensor([20.0, -20.0, 20.0, 20.0]).repeat_interleave(H)
        module.bias_ih_l0.copy_(open_gates)
        module.bias_ih_l1.copy_(open_gates)
        module.bias_ih_l1[2 * H : 3 * H] = 0
        module.weight_ih_l1[2 * H : 3 * H] = torch.eye(H)
    compiled = torch.compile(module, fullgraph=True)
    y = compiled(torch.randn(T, B, H))[0]
    kept = (y > 0.1).float()  # what the closed forget gate lets through is 1e-9
    error = 5 * (p * (1 - p) / y.numel()) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < error
    assert_same(y[y > 0.1], torch.tensor(1.0).tanh().div(1 - p).tanh().tanh().expand(int(kept.sum())))
    torch.manual_seed(1)
    first = compiled(torch.randn(T, B, H))[0]
    assert not torch.equal(first, y)
    torch.manual_seed(1)
    assert torch.equal(compiled(torch.randn(T, B, H))[0], first)
    module.eval()
    assert (compiled(torch.randn(T, B, H))[0] > 0.1).all()


# torch.func inside ---------------------------------------------------------------------------------------------------


def per_sample(module: Any, x: Any) -> Any:
    def loss(weights: Any, x: Any) -> Any:
        return torch.func.functional_call(module, weights, (x,))[0].pow(2).sum()

    weights = {name: w.detach() for name, w in module.named_parameters()}
    return torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)


TRANSFORMS: dict[str, Any] = {
    "vmap": lambda m, x: torch.vmap(lambda x: m(x))(x),
    "per-sample gradients": per_sample,
    "jacrev": lambda m, x: torch.func.jacrev(lambda x: m(x)[0])(x[0]),
    "jvp": lambda m, x: torch.func.jvp(lambda x: m(x)[0], (x[0, :2].clone(),), (x[1, :2].clone(),)),
    "hessian": lambda m, x: torch.func.hessian(lambda x: m(x)[0].pow(2).sum())(x[0, :2, :1]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_inside(name: str) -> None:
    module, x = lstm(), torch.randn(4, 5, 2, 3)
    compiled = torch.compile(lambda x: TRANSFORMS[name](module, x), fullgraph=True, backend="aot_eager")
    actual, expected = (tree_leaves(f(x)) for f in (compiled, lambda x: TRANSFORMS[name](module, x)))
    assert_same(actual, expected)


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_reduce_overhead_on_a_gpu(training: bool) -> None:
    """CUDA graphs replay what the module does."""
    model = Tagger().cuda()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        inputs = [a.cuda() for a in tagged()]
        with torch.set_grad_enabled(training):
            torch.compiler.cudagraph_mark_step_begin()
            results = [call(*inputs) for call in (compiled, model)]
            assert_same(*results)
            if training:
                assert_same(*(torch.autograd.grad(y.pow(2).sum(), list(model.parameters())) for y in results))


@pytest.mark.parametrize("change", [prune.l1_unstructured, weight_norm])
def test_a_hook_that_sets_a_weight_is_compiled_too(change: Any) -> None:
    module, x = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3)
    change(module, "weight_hh_l0", **({"amount": 0.5} if change is prune.l1_unstructured else {}))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_same(compiled(x), module(x))


# TorchScript ---------------------------------------------------------------------------------------------------------


def test_traces() -> None:
    module = lstm()
    traced = torch.jit.trace(module, torch.randn(5, 2, 3))
    x = torch.randn(6, 3, 3)
    y, expected = traced(x), module(x)
    assert_same(y, expected)
    parameters = list(module.parameters())
    assert_same(*(torch.autograd.grad(tensors(each)[0].sum(), parameters) for each in (y, expected)))


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm()
        self.cell = lstm_ext.LSTMCell(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lstm(x)[0]
        return self.cell(y[0])[0]


def test_scripts_as_torchs_own() -> None:
    module, x = Wrapper(), torch.randn(5, 2, 3)
    expected = module(x)
    with pytest.warns(UserWarning, match="TorchScript") as caught:
        scripted = torch.jit.script(module)
    assert {each.filename for each in caught if "lstm_ext" in str(each.message)} == {__file__}
    assert_same(scripted(x), expected)
