"""torch.compile, export, trace, script, vmap and torch.func over the modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from .tolerances import assert_close

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.nn.utils.rnn import pack_sequence  # noqa: E402

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


def test_inductor_trains() -> None:
    module, x = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3)
    twin = copy.deepcopy(module)
    compiled = torch.compile(lambda x: twin(x)[0].relu().sum(), fullgraph=True)
    compiled(x).backward()
    module(x)[0].relu().sum().backward()
    assert_same([p.grad for p in twin.parameters()], [p.grad for p in module.parameters()])


def test_exports_with_dynamic_time_and_batch() -> None:
    module, dim = lstm(), torch.export.Dim
    exported = torch.export.export(module, (torch.randn(5, 2, 3),), dynamic_shapes=({0: dim("T"), 1: dim("B")},))
    x = torch.randn(6, 3, 3)
    assert_same(exported.module()(x), module(x))


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
    with pytest.warns(UserWarning, match="TorchScript"):
        scripted = torch.jit.script(module)
    assert_same(scripted(x), expected)


# vmap and torch.func -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"batch_first": True}])
def test_vmap_over_inputs(options: dict[str, Any]) -> None:
    module = lstm(**options)
    x, h, c = torch.randn(3, 5, 2, 3), torch.randn(4, 3, 2, 4), torch.randn(4, 2, 4)
    c = torch.randn(4, 5, 4) if options else c
    h = torch.randn(4, 3, 5, 4) if options else h
    mapped = torch.vmap(lambda x, h: module(x, (h, c)), in_dims=(0, 1))(x, h)
    assert_same(
        mapped, [torch.stack(t) for t in zip(*(tensors(module(x[n], (h[:, n], c))) for n in range(3)), strict=True)]
    )
    if not options:
        lengths, resets = torch.tensor([[5, 0], [2, 3], [1, 4]]), torch.rand(3, 5, 2) < 0.3
        mapped = torch.vmap(lambda x, n, r: module(x, lengths=n, resets=r, return_cells=True))(x, lengths, resets)
        each = [module(x[n], lengths=lengths[n], resets=resets[n], return_cells=True) for n in range(3)]
        assert_same(mapped, [torch.stack(t) for t in zip(*map(tensors, each), strict=True)])


def test_vmap_over_stacked_weights() -> None:
    modules, x = [lstm() for _ in range(3)], torch.randn(5, 2, 3)
    stacked, _ = torch.func.stack_module_state(modules)
    mapped = torch.vmap(lambda weights: torch.func.functional_call(modules[0], weights, (x,))[0])(stacked)
    expected = torch.stack([m(x)[0] for m in modules])
    assert_same(mapped, expected)
    gradients = torch.autograd.grad(mapped.pow(2).sum(), list(stacked.values()))
    parameters = [list(m.parameters()) for m in modules]
    each = [torch.autograd.grad(m(x)[0].pow(2).sum(), p) for m, p in zip(modules, parameters, strict=True)]
    assert_same(gradients, [torch.stack(t) for t in zip(*each, strict=True)])


def test_vmap_over_gradients() -> None:
    """As in a vectorised Jacobian."""
    module, x = lstm(), torch.randn(3, 2, 3, requires_grad=True)
    y, _ = module(x)
    seeds = torch.randn(4, *y.shape)
    together = torch.autograd.grad(y, x, seeds, is_grads_batched=True, retain_graph=True)[0]
    assert_same([together], [torch.stack([torch.autograd.grad(y, x, s, retain_graph=True)[0] for s in seeds])])


def test_torch_func() -> None:
    """Gradients, per-sample gradients and a Hessian."""
    module, x = lstm_ext.LSTM(3, 4), torch.randn(6, 5, 2, 3)
    weights = dict(module.named_parameters())

    def loss(weights: Any, x: Any) -> Any:
        return torch.func.functional_call(module, weights, (x,))[0].pow(2).sum()

    expected = [torch.autograd.grad(loss(weights, each), list(weights.values())) for each in x]
    assert_same(torch.func.grad(loss)(weights, x[0]).values(), expected[0])
    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    assert_same(per_sample.values(), [torch.stack(t) for t in zip(*expected, strict=True)])
    small = x[0, :2, :1]
    hessian = torch.func.hessian(loss, argnums=1)(weights, small)
    assert_same([hessian], [torch.autograd.functional.hessian(lambda x: loss(weights, x), small)])
