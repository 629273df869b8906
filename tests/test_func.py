"""torch.func and torch.vmap over the layer and the modules, against the same transform of torch's own operations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from lstm_ext.testing import assert_close

from .conftest import count_runs

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.func import functional_call, stack_module_state  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import lstm_ext  # noqa: E402
from lstm_ext import engines, route  # noqa: E402
from lstm_ext.call import BOTH, FORWARD, REVERSE, Directions, LayerCall, Save  # noqa: E402
from lstm_ext.engines import composed  # noqa: E402

T, B, I, H, N = 4, 3, 2, 3, 2  # noqa: E741


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the engine ran forward and backward."""
    return count_runs(engines.choose("cpu", torch.float64).engine, monkeypatch)


def assert_same(actual: Any, expected: Any, dtype: str = "float64") -> None:
    """The tensors in two nests of the same structure agree."""
    for n, (a, e) in enumerate(zip(tree_leaves(actual), tree_leaves(expected), strict=True)):
        assert_close(a, e, dtype, terms=200, name=f"result {n}")


# The layer -----------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "projected": {"P": 2, "bias": False, "batch_first": True},
    "reverse": {"directions": REVERSE, "masks": True, "batch_first": True},
    "both": {"directions": BOTH, "masks": True},
    "packed": {"directions": BOTH, "packed": True},
}
NAMES = ("x", "h0", "c0", "lengths", "resets", "weights")


class Layer:
    """The arguments of a layer, each with N entries; a call takes those of one entry."""

    def __init__(self, *, P: int = 0, bias: bool = True, **options: Any):
        self.directions: Directions = options.get("directions", FORWARD)
        self.batch_first: bool = options.get("batch_first", False)
        self.batch_sizes = torch.tensor([3, 3, 2, 1]) if options.get("packed") else None
        D, P, masks = 2 if self.directions == BOTH else 1, P or H, options.get("masks")
        rows = (9,) if options.get("packed") else (B, T) if self.batch_first else (T, B)
        shapes = [(4 * H, I), (4 * H, P), *[(4 * H,)] * (2 * bias), *[(P, H)] * (P != H)] * D
        self.arguments: list[Any] = [
            self.draw(*rows, I),
            self.draw(D, B, P),
            self.draw(D, B, H),
            torch.tensor([[4, 0, 2], [1, 3, 4]]) if masks else None,
            torch.rand(N, *rows) < 0.3 if masks else None,
            [self.draw(*shape) for shape in shapes],
        ]

    @staticmethod
    def draw(*shape: int) -> Any:
        return torch.randn(N, *shape, dtype=torch.float64)

    def call(self, x: Any, h0: Any, c0: Any, lengths: Any, resets: Any, weights: Any) -> LayerCall:
        masks = (lengths, resets, self.batch_sizes)
        return LayerCall(x, h0, c0, weights, *masks, self.directions, self.batch_first)

    def run(self, *arguments: Any) -> Any:
        return route.run(self.call(*arguments), Save.CELLS)[:4]

    def compose(self, *arguments: Any) -> Any:
        return composed.forward(self.call(*arguments), Save.CELLS)[:4]

    def mapped(self, dims: tuple[int | None, ...]) -> tuple[list[Any], list[Any]]:
        """The arguments, each with its entries along its dimension, or the first entry alone; and those dimensions."""

        def place(a: Any, dim: int | None) -> Any:
            if isinstance(a, list):
                return [place(w, dim) for w in a]
            return None if a is None else a[0] if dim is None else a.movedim(0, dim)

        arguments = [place(a, dim) for a, dim in zip(self.arguments, dims, strict=True)]
        return arguments, [None if a is None else dim for a, dim in zip(self.arguments, dims, strict=True)]


def energy(layer: Callable[..., Any]) -> Callable[..., Any]:
    """A scalar that every output, and each differently, goes into."""

    def loss(*arguments: Any) -> Any:
        return sum((n + 1) * a.sin().sum() for n, a in enumerate(layer(*arguments)))

    return loss


def mapped_arguments(name: str) -> list[tuple[int | None, ...]]:
    """Which of the layer's arguments are mapped, and along which of their dimensions: first, last or second."""
    masked = OPTIONS[name].get("masks", False)
    free = [(None, 1), (None, 0), (None, -1), (None, -1) if masked else (None,), (None, 2) if masked else (None,)]
    return [dims for dims in itertools.product(*free, (None, -1)) if any(dim is not None for dim in dims)]


@pytest.mark.parametrize("name", OPTIONS)
def test_vmap_over_every_choice_of_arguments(name: str) -> None:
    """Outputs, per-entry gradients of everything, and the gradient of a sum over the entries."""
    layer = Layer(**OPTIONS[name])
    differentiable = (0, 1, 2, 5)
    for dims in mapped_arguments(name):
        arguments, in_dims = layer.mapped(dims)
        transforms: list[Callable[[Any], Any]] = [
            lambda f, d=in_dims: torch.vmap(f, tuple(d)),
            lambda f, d=in_dims: torch.vmap(torch.func.grad(energy(f), differentiable), tuple(d)),
            lambda f, d=in_dims: torch.func.grad(lambda *a: torch.vmap(energy(f), tuple(d))(*a).sum(), differentiable),
        ]
        for transform in transforms:
            assert_same(transform(layer.run)(*arguments), transform(layer.compose)(*arguments))


def test_vmap_over_one_weight() -> None:
    layer = Layer()
    (x, h0, c0, _, _, weights), _ = layer.mapped((None,) * 6)
    many = layer.draw(4 * H)

    def by_bias(f: Callable[..., Any]) -> Callable[[Any], Any]:
        return torch.func.grad(lambda b: energy(f)(x, h0, c0, None, None, [*weights[:2], b, weights[3]]))

    assert_same(torch.vmap(by_bias(layer.run))(many), torch.vmap(by_bias(layer.compose))(many))


@pytest.mark.parametrize("transform", ["vmap", "vmap of grad", "vmap of jvp"])
def test_bad_lengths_under_vmap(transform: str, backend: str) -> None:
    layer = Layer(**OPTIONS["both"])
    arguments, _ = layer.mapped((0, None, None, 0, None, None))

    def call(x: Any, lengths: Any) -> Any:
        def f(x: Any) -> Any:
            return layer.run(x, *arguments[1:3], lengths, *arguments[4:])[0].sum()

        return {
            "vmap": lambda: f(x),
            "vmap of grad": lambda: torch.func.grad(f)(x),
            "vmap of jvp": lambda: torch.func.jvp(f, (x,), (x,)),
        }[transform]()

    with pytest.raises(ValueError, match=rf"lengths: expected values from 0 to T = {T}, got 0 to {T + 1}"):
        torch.vmap(call)(arguments[0], torch.where(arguments[3] == T, T + 1, arguments[3]))


@pytest.mark.parametrize("name", OPTIONS)
def test_nested_vmap(name: str, backend: str) -> None:
    """The inner one over the input, the outer one over something else each time."""
    layer = Layer(**OPTIONS[name])
    for outer in range(6):
        dims = tuple(0 if n == outer and a is not None else None for n, a in enumerate(layer.arguments))
        (_, *others), in_dims = layer.mapped(dims)
        x = torch.stack([layer.arguments[0] * n for n in range(3)])  # [3, N, …]
        inner = (0, *[None] * 5)
        in_dims[0] = 1 if outer == 0 else None
        x = x if outer == 0 else x[:, 0]
        if outer and in_dims[outer] is None:
            continue
        for differentiate in (lambda f: f, lambda f: torch.func.grad(energy(f), (0, 5))):
            results = [
                torch.vmap(torch.vmap(differentiate(f), inner), tuple(in_dims))(x, *others)
                for f in (layer.run, layer.compose)
            ]
            assert_same(*results)


@pytest.mark.parametrize("name", ["projected", "both", "packed"])
def test_every_transform(name: str, backend: str) -> None:
    """Forward, reverse and mixed derivatives of first and second order, by the input, the state and a weight."""
    layer = Layer(**OPTIONS[name])
    arguments, _ = layer.mapped((None,) * 6)

    def over_floats(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, h0, w: f(x, h0, arguments[2], *arguments[3:5], [w, *arguments[5][1:]])

    primals = (arguments[0], arguments[1], arguments[5][0])
    tangents = tuple(torch.randn_like(a) for a in primals)
    func: Any = torch.func
    every: dict[str, Callable[[Any], Any]] = {
        "jvp": lambda f: func.jvp(f, primals, tangents),
        "linearize": lambda f: func.linearize(f, *primals)[1](*tangents),
        "vjp": lambda f: (lambda out, pull: pull(tuple(map(torch.cos, out))))(*func.vjp(f, *primals)),
        "jacrev": lambda f: func.jacrev(f, (0, 1, 2))(*primals),
        "jacrev in chunks": lambda f: func.jacrev(f, 0, chunk_size=4)(*primals),
        "jacfwd": lambda f: func.jacfwd(f, (0, 1, 2))(*primals),
        "grad of grad": lambda f: func.grad(lambda *a: func.grad(energy(f), 0)(*a).pow(2).sum(), 2)(*primals),
        "jvp of grad": lambda f: func.jvp(func.grad(energy(f), (0, 2)), primals, tangents),
        "grad of jvp": lambda f: func.grad(lambda *a: sum(t.sum() for t in func.jvp(f, a, tangents)[1]), 2)(*primals),
        "hessian": lambda f: func.hessian(energy(f))(*primals),
        "jacrev of jacrev": lambda f: func.jacrev(func.jacrev(energy(f), 1), 1)(*primals),
    }
    if name == "packed":
        del every["linearize"]  # records a graph without values, and those of batch_sizes say what to do
    for transform in every.values():
        assert_same(*(transform(over_floats(f)) for f in (layer.run, layer.compose)))


def test_forward_mode_outside_of_functions(backend: str) -> None:
    """`torch.autograd.forward_ad`, with tensors that ask for gradients too."""
    layer = Layer(**OPTIONS["both"])
    arguments, _ = layer.mapped((None,) * 6)
    tangents = [torch.randn_like(arguments[0]), *(torch.randn_like(w) for w in arguments[5])]
    results = []
    for f in (layer.run, layer.compose):
        forward_ad: Any = torch.autograd.forward_ad
        h0 = arguments[1].clone().requires_grad_()
        with forward_ad.dual_level():
            x, *weights = map(forward_ad.make_dual, [arguments[0], *arguments[5]], tangents)
            outputs = [forward_ad.unpack_dual(a) for a in f(x, h0, *arguments[2:5], weights)]
        results.append([*outputs, torch.autograd.grad(sum(a.tangent.sum() for a in outputs), h0)])
    assert_same(*results)


def test_a_gradient_inside_of_a_recorded_one(backend: str) -> None:
    """`torch.func.grad` by the input within an ordinary backward pass by the weights: a gradient penalty."""
    layer = Layer(**OPTIONS["both"])
    arguments, _ = layer.mapped((None,) * 6)
    results = []
    for f in (layer.run, layer.compose):
        weights = [w.clone().requires_grad_() for w in arguments[5]]
        penalty = torch.func.grad(energy(f))(*arguments[:5], weights).pow(2).sum()
        results.append([penalty.detach(), torch.autograd.grad(penalty, weights)])
    assert_same(*results)


def test_mapping_over_nothing(backend: str) -> None:
    """No entries, N = 0: empty results of the right shapes."""
    layer = Layer()
    arguments, _ = layer.mapped((0, 0, 0, None, None, 0))
    empty = [None if a is None else [w[:0] for w in a] if isinstance(a, list) else a[:0] for a in arguments]
    for in_dims in ((0, 0, 0, None, None, 0), (0, 0, 0, None, None, None)):
        given = [a if dim == 0 else layer.arguments[n] for n, (a, dim) in enumerate(zip(empty, in_dims, strict=True))]
        if in_dims[5] is None:
            given[5] = [w[0] for w in layer.arguments[5]]
        results = torch.vmap(layer.run, in_dims)(*given)
        assert [list(a.shape) for a in results] == [[0, T, B, H], [0, 1, B, H], [0, 1, B, H], [0, 1, T, B, H]]


def test_how_often_the_kernels_run(runs: dict[str, int]) -> None:
    """Rows with shared weights are one batch; gradients by shared weights, per entry, and own weights, take turns."""
    layer = Layer(**OPTIONS["both"])
    rows = (0, 0, 0, 0, 0, None)
    arguments, in_dims = layer.mapped(rows)
    models, model_dims = layer.mapped((0, None, None, None, None, 0))
    over_rows = tuple(in_dims)

    def count(transform: Callable[[], Any]) -> tuple[int, int]:
        runs.update(forward=0, backward=0)
        transform()
        return runs["forward"], runs["backward"]

    assert count(lambda: torch.vmap(layer.run, over_rows)(*arguments)) == (1, 0)
    assert count(lambda: torch.vmap(torch.func.grad(energy(layer.run), (0, 1)), over_rows)(*arguments)) == (1, 1)
    loss_of_all = lambda *a: torch.vmap(energy(layer.run), over_rows)(*a).sum()  # noqa: E731
    for differentiated in (0, 5):
        assert count(lambda: torch.func.grad(loss_of_all, differentiated)(*arguments)) == (1, 1)  # noqa: B023
    assert count(lambda: torch.vmap(torch.func.grad(energy(layer.run), 5), over_rows)(*arguments)) == (1, N)
    assert count(lambda: torch.vmap(layer.run, tuple(model_dims))(*models)) == (N, 0)
    alone, _ = layer.mapped((None,) * 6)
    assert count(lambda: torch.func.jacrev(layer.run)(*alone)) == (1, 1)


# The modules ---------------------------------------------------------------------------------------------------------


def stock_and_ours(**options: Any) -> tuple[Any, Any]:
    stock = nn.LSTM(I, H, dtype=torch.float64, **options)
    ours = lstm_ext.LSTM(I, H, dtype=torch.float64, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def loss_of(module: Any) -> Callable[..., Any]:
    def loss(weights: Any, x: Any) -> Any:
        y, (h, c) = functional_call(module, weights, (x,))
        return y.sin().sum() + 2 * h.sin().sum() + 3 * c.sin().sum()

    return loss


MODULES: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers, both ways": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "projected": {"proj_size": 2, "bias": False},
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_equal_stock_entry_by_entry(name: str, backend: str) -> None:
    """Gradients, per-sample gradients, ensembles and Jacobians, of stock taken in a loop."""
    stock, ours = stock_and_ours(**MODULES[name])
    x, weights = torch.randn(5, T, B, I, dtype=torch.float64), dict(ours.named_parameters())
    own = [torch.autograd.grad(loss_of(stock)(dict(stock.named_parameters()), each), stock.parameters()) for each in x]
    assert_same(list(torch.func.grad(loss_of(ours))(weights, x[0]).values()), list(own[0]))
    per_sample = torch.vmap(torch.func.grad(loss_of(ours)), (None, 0))(weights, x)
    assert_same(list(per_sample.values()), [torch.stack(each) for each in zip(*own, strict=True)])
    jacobian = torch.func.jacrev(lambda x: ours(x)[0])(x[0])
    assert_same(jacobian, torch.autograd.functional.jacobian(lambda x: stock(x)[0], x[0]))
    assert_same(torch.func.jacfwd(lambda x: ours(x)[0])(x[0]), jacobian)
    small = x[0, :2, :2]
    hessian = torch.func.hessian(loss_of(ours), argnums=1)(weights, small)
    by_rows = torch.autograd.functional.hessian(
        lambda x: loss_of(ours)(weights, x), small
    )  # twice through the recorded backward
    assert_same(hessian, by_rows)


@pytest.mark.parametrize("name", MODULES)
def test_ensembles(name: str, backend: str) -> None:
    """`stack_module_state`: outputs, gradients and a step of training, against the modules one by one."""
    modules = [stock_and_ours(**MODULES[name])[1] for _ in range(3)]
    x = torch.randn(T, B, I, dtype=torch.float64)
    stacked, buffers = stack_module_state(modules)
    assert not buffers
    template = modules[0]
    losses = torch.vmap(loss_of(template), (0, None))(stacked, x)
    singles = [loss_of(m)(dict(m.named_parameters()), x) for m in modules]
    assert_same(losses, torch.stack(singles))
    gradients = torch.autograd.grad(losses.sum(), list(stacked.values()))
    own = [torch.autograd.grad(s, m.parameters()) for s, m in zip(singles, modules, strict=True)]
    assert_same(list(gradients), [torch.stack(each) for each in zip(*own, strict=True)])
    by_func = torch.vmap(torch.func.grad(loss_of(template)), (0, None))(
        {name: w.detach() for name, w in stacked.items()}, x
    )
    assert_same(list(by_func.values()), list(gradients))


def test_cells_and_functions(backend: str) -> None:
    stock, cell = nn.LSTMCell(I, H).double(), lstm_ext.LSTMCell(I, H).double()
    cell.load_state_dict(stock.state_dict())
    x, h, c = (torch.randn(5, B, width, dtype=torch.float64) for width in (I, H, H))
    resets = torch.rand(5, B) < 0.5
    mapped = torch.vmap(lambda x, h, resets: cell(x, (h, c[0]), resets=resets))(x, h, resets)
    by_hand = [cell(x[n], (h[n], c[0]), resets=resets[n]) for n in range(5)]
    assert_same(mapped, [torch.stack(a) for a in zip(*by_hand, strict=True)])
    jacobian = torch.func.jacfwd(lambda h: cell(x[0], (h, c[0]), resets=resets[0])[0])(h[0])
    assert_same(jacobian, torch.func.jacrev(lambda h: cell(x[0], (h, c[0]), resets=resets[0])[0])(h[0]))
    singles: Any = [stock(each, (h[n], c[0])) for n, each in enumerate(x)]
    assert_same(torch.vmap(lambda x, h: cell(x, (h, c[0])))(x, h), [torch.stack(a) for a in zip(*singles, strict=True)])
    weights = dict(cell.named_parameters())

    def loss(module: Any, weights: Any, x: Any) -> Any:
        return sum(a.sin().sum() for a in functional_call(module, weights, (x, (h[0], c[0]))))

    per_sample = torch.vmap(torch.func.grad(lambda w, x: loss(cell, w, x)), (None, 0))(weights, x)
    singles = [torch.autograd.grad(loss(stock, dict(stock.named_parameters()), each), stock.parameters()) for each in x]
    assert_same(list(per_sample.values()), [torch.stack(a) for a in zip(*singles, strict=True)])
    hessian = torch.func.hessian(lambda x: loss(cell, weights, x))(x[0])
    assert_same(hessian, torch.autograd.functional.hessian(lambda x: loss(stock, weights, x), x[0]))
    arrays = [torch.randn(3, *shape, dtype=torch.float64) for shape in ((T, B, I), (4 * H, I), (4 * H, H))]
    mapped = torch.vmap(lambda x, w: lstm_ext.lstm(x, None, w, arrays[2][0], reverse=True), (0, 0))(*arrays[:2])
    singles = [lstm_ext.lstm(x, None, w, arrays[2][0], reverse=True) for x, w in zip(*arrays[:2], strict=True)]
    assert_same(mapped[0], torch.stack([y for y, _ in singles]))
    unbatched = stock_and_ours()[1]
    rows = torch.randn(5, T, I, dtype=torch.float64)
    assert_same(torch.vmap(unbatched)(rows)[0], torch.stack([unbatched(row)[0] for row in rows]))


@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_under_vmap(batch_first: bool) -> None:
    """vmap's three ways with random numbers, as for every module."""
    module = stock_and_ours(num_layers=2, dropout=0.5, batch_first=batch_first)[1]
    x = torch.randn(T, B, I, dtype=torch.float64).expand(64, T, B, I)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(module)(x)
    same = torch.vmap(module, randomness="same")(x)[0]
    assert torch.equal(same, same[:1].expand_as(same))
    different = torch.vmap(module, randomness="different")(x)[0]
    assert len({tuple(y.flatten().tolist()) for y in different}) == 64
    assert torch.equal(torch.vmap(module.eval())(x)[0][0], module(x[0])[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes(dtype: str, backend: str) -> None:
    """Per-sample gradients in the dtypes of training, against those of float64."""
    _, exact = stock_and_ours(bidirectional=True)
    module = lstm_ext.LSTM(I, H, bidirectional=True)
    module.load_state_dict(exact.state_dict())
    module = module.to(getattr(torch, dtype))
    exact.load_state_dict(module.state_dict())
    x = torch.randn(4, T, B, I).to(getattr(torch, dtype))
    actual, expected = (
        torch.vmap(torch.func.grad(loss_of(m)), (None, 0))(dict(m.named_parameters()), x.to(p.dtype))
        for m in (module, exact)
        for p in [next(m.parameters())]
    )
    assert_same(list(actual.values()), list(expected.values()), dtype)
