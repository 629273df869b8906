"""Derivatives of the modules and ops, first to third; what is saved; what torch asks of custom ops."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from lstm_ext.testing import assert_close

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch.autograd.graph import saved_tensors_hooks  # noqa: E402
from torch.library import opcheck  # noqa: E402
from torch.nn.utils.rnn import PackedSequence  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import lstm_ext  # noqa: E402
from lstm_ext import engines, route  # noqa: E402
from lstm_ext.call import BOTH, FORWARD, REVERSE, LayerCall, Needs, Save  # noqa: E402
from lstm_ext.engines import composed  # noqa: E402
from lstm_ext.torch_op import layer_backward, layer_forward  # noqa: E402

from .conftest import count_runs  # noqa: E402


def run_layer(x: Any, h0: Any, c0: Any, weights: Any, *masks: Any, save: Save = Save.CELLS) -> tuple[Any, ...]:
    """y, h_n, c_n and the cells."""
    return route.run(LayerCall(x, h0, c0, weights, *masks), save)[:4]


def leaf(*shape: int, dtype: Any = torch.float64) -> Any:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def make_weights(I: int, H: int, P: int = 0, bias: bool = True, directions: int = FORWARD) -> list[Any]:  # noqa: E741
    shapes = [(4 * H, I), (4 * H, P or H), *([(4 * H,)] * 2 if bias else []), *([(P, H)] if P else [])]
    return [leaf(*shape) for shape in shapes * (2 if directions == BOTH else 1)]


# Numerical derivatives -----------------------------------------------------------------------------------------------

# options of the layer; what is given in place of None: lengths, resets, batch_sizes, the state
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "state": {"state": True},
    "projected": {"P": 2, "state": True, "bias": False},
    "reverse": {"directions": REVERSE, "lengths": [3, 1], "batch_first": True, "state": True},
    "both": {"directions": BOTH, "lengths": [0, 3], "resets": True, "state": True},
    "packed": {"directions": BOTH, "batch_sizes": [2, 2, 1], "P": 1, "state": True},
}


def make_layer(I: int, H: int, P: int = 0, bias: bool = True, **options: Any) -> tuple[list[Any], tuple[Any, ...]]:  # noqa: E741
    """The differentiable arguments x, h0, c0, *weights (h0 and c0 may be None) and the masks of a layer."""
    directions, batch_first = options.get("directions", FORWARD), options.get("batch_first", False)
    T, B, D = 3, 2, 2 if directions == BOTH else 1
    batch_sizes = options.get("batch_sizes")
    x = leaf(sum(batch_sizes), I) if batch_sizes else leaf(B, T, I) if batch_first else leaf(T, B, I)
    state = [leaf(D, B, P or H), leaf(D, B, H)] if options.get("state") else [None, None]
    lengths, sizes = (None if a is None else torch.tensor(a) for a in (options.get("lengths"), batch_sizes))
    resets = torch.rand(x.shape[:2]) < 0.4 if options.get("resets") else None
    return [x, *state, *make_weights(I, H, P, bias, directions)], (lengths, resets, sizes, directions, batch_first)


@pytest.mark.parametrize("name", LAYERS)
def test_first_and_second_derivative(name: str, backend: str) -> None:
    """Of y, h_n, c_n and the cells with respect to the input, the state and each weight."""
    arguments, masks = make_layer(2, 3, **LAYERS[name])
    present = [a is not None for a in arguments]

    def layer(*given: Any) -> tuple[Any, ...]:
        rest = iter(given)
        x, h0, c0, *weights = (next(rest) if p else None for p in present)
        return run_layer(x, h0, c0, weights, *masks)

    given = tuple(a for a in arguments if a is not None)
    assert gradcheck(layer, given)
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(layer, given, fast_mode=True, check_forward_ad=True, **batched)
    assert gradgradcheck(layer, given, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_derivatives_of_the_modules(backend: str) -> None:
    lstm, cell = lstm_ext.LSTM(2, 3, 2, bidirectional=True, dtype=torch.float64), lstm_ext.LSTMCell(2, 3).double()
    x, h, c = leaf(3, 2, 2), leaf(2, 3), leaf(2, 3)
    assert gradcheck(lambda x: lstm(x)[0], x)
    assert gradgradcheck(lambda x: lstm(x)[0], x)
    assert gradcheck(lambda x, h, c: cell(x, (h, c)), (x[0].detach().requires_grad_(), h, c))
    assert gradgradcheck(lambda x, h, c: cell(x, (h, c)), (x[0].detach().requires_grad_(), h, c))


def test_third_derivative(backend: str) -> None:
    lstm = lstm_ext.LSTM(2, 2, dtype=torch.float64)

    def second(x: Any) -> Any:
        first = torch.autograd.grad(lstm(x)[0].pow(3).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)[0]

    assert gradcheck(second, leaf(2, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivative_by_a_weight_is_that_of_stock(dtype: Any, backend: str) -> None:
    """A gradient penalty, in the dtypes of training."""
    stock, ours = nn.LSTM(3, 4), lstm_ext.LSTM(3, 4)
    ours.load_state_dict(stock.to(dtype).state_dict())
    ours, stock, x = ours.to(dtype), stock.double(), torch.randn(4, 2, 3).to(dtype)
    penalties = []
    for module in (ours, stock):
        own = x.to(next(module.parameters()).dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(module(own)[0].sum(), own, create_graph=True)
        gradient.pow(2).sum().backward()
        penalties.append([p.grad for p in module.parameters()])
    for actual, expected in zip(*penalties, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, str(dtype).removeprefix("torch."), terms=64)


def test_gradients_batched(backend: str) -> None:
    """Many at once, as in a vectorised Jacobian."""
    module, x = lstm_ext.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64), leaf(3, 2, 3)
    y, _ = module(x)
    seeds = torch.randn(4, *y.shape, dtype=torch.float64)
    together = torch.autograd.grad(y, x, seeds, is_grads_batched=True, retain_graph=True)[0]
    each = [torch.autograd.grad(y, x, seed, retain_graph=True)[0] for seed in seeds]
    assert_close(together, torch.stack(each), "float64", terms=64)


@pytest.mark.parametrize("name", LAYERS)
def test_second_and_third_derivatives_are_those_of_torchs_operations(name: str, backend: str) -> None:
    """By everything, the gradients of the outputs too; the gradient of c_n and the tangent of x are left out."""
    arguments, masks = make_layer(2, 3, **LAYERS[name])
    given = [a for a in arguments if a is not None]
    call = LayerCall(*arguments[:3], arguments[3:], *masks)
    seeds: list[Any] = []
    weights: list[Any] = []
    tangents = [torch.randn_like(a) for a in given[1:]]
    results = []
    for forward in (route.run, composed.forward):
        outputs = [a for n, a in enumerate(forward(call, Save.CELLS)[:4]) if n != 2]
        seeds = seeds or [torch.randn_like(a).requires_grad_() for a in outputs]
        first = torch.autograd.grad(outputs, given, seeds, create_graph=True)
        second = torch.autograd.grad(first[1:], [*given, *seeds], tangents, create_graph=True)
        weights = weights or [torch.randn_like(s) for s in second]
        results.append([*second, *torch.autograd.grad(second, [*given, *seeds], weights)])
    magnitude = max(float(a.abs().max()) for a in results[1])
    for a, e in zip(*results, strict=True):
        assert_close(a.detach(), e.detach(), "float64", terms=200, magnitude=magnitude)


@pytest.mark.parametrize("name", LAYERS)
def test_many_second_derivatives_at_once(name: str) -> None:
    arguments, masks = make_layer(2, 3, **LAYERS[name])
    given = [a for a in arguments if a is not None]
    outputs = run_layer(*arguments[:3], arguments[3:], *masks)
    first = torch.autograd.grad(sum(a.pow(2).sum() for a in outputs), given, create_graph=True)
    tangents = [torch.randn(3, *a.shape, dtype=a.dtype) for a in first]
    together = torch.autograd.grad(first, given, tangents, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(first, given, [t[n] for t in tangents], retain_graph=True) for n in range(3)]
    for a, e in zip(together, zip(*each, strict=True), strict=True):
        assert_close(a, torch.stack(e), "float64", terms=200, magnitude=10)


def test_a_second_derivative_runs_the_kernels_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its backward pass needs is what the first one left."""
    module, x = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    counts = count_runs(engines.choose("cpu", torch.float32).engine, monkeypatch)
    monkeypatch.setattr(engines.composed, "forward", None)
    (gradient,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    gradient.pow(2).sum().backward()
    assert counts == {"forward": 1, "backward": 1}


# Which gradients are asked for, and which are given ------------------------------------------------------------------


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,), (0, 2)])
def test_missing_output_gradients(used: tuple[int, ...], backend: str) -> None:
    """An output that nothing uses counts as one whose gradient is zero."""
    arguments, masks = make_layer(2, 3, state=True, directions=BOTH, lengths=[3, 2])
    x, h0, c0, *weights = arguments
    outputs = run_layer(x, h0, c0, weights, *masks)
    seeds = [torch.randn_like(a) for a in outputs]
    some = torch.autograd.grad([outputs[n] for n in used], arguments, [seeds[n] for n in used], retain_graph=True)
    full = [seed if n in used else torch.zeros_like(seed) for n, seed in enumerate(seeds)]
    for a, e in zip(some, torch.autograd.grad(outputs, arguments, full), strict=True):
        assert_close(a, e, "float64")


@pytest.mark.parametrize("wanted", range(7))
def test_only_what_is_needed(wanted: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen argument gets no gradient, and the backward pass is told so."""
    arguments, masks = make_layer(2, 3, state=True)
    y = run_layer(*arguments[:3], arguments[3:], *masks, save=Save.NOTHING)[0]
    expected = torch.autograd.grad(y.sum(), arguments)
    frozen = [a.detach().requires_grad_(n == wanted) for n, a in enumerate(arguments)]
    told: list[Needs] = []
    engine = engines.choose("cpu", torch.float64).engine
    run_backward = engine.backward
    monkeypatch.setattr(engine, "backward", lambda *a: told.append(a[-1]) or run_backward(*a))
    run_layer(*frozen[:3], frozen[3:], *masks, save=Save.NOTHING)[0].sum().backward()
    assert told == [(Needs.X, Needs.H0, Needs.C0, *[Needs.WEIGHTS] * 4)[wanted]]
    assert [a.grad is not None for a in frozen] == [n == wanted for n in range(7)]
    assert_close(frozen[wanted].grad, expected[wanted], "float64")


def test_retain_graph_and_freed_graph(backend: str) -> None:
    module, x = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    y = module(x)[0].sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)


# Outputs changed in place --------------------------------------------------------------------------------------------


def clear_a_row(y: Any) -> None:
    y[0] = 0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "relu_": lambda y: y.relu_(),
    "mul_": lambda y: y.mul_(2),
    "y[0] = 0": clear_a_row,
    "data": lambda y: y.data.mul_(2),
}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of the module, and of a call
    "plain": ({}, {}),
    "float64": ({"dtype": torch.float64}, {}),
    "bfloat16": ({"dtype": torch.bfloat16}, {}),
    "float16": ({"dtype": torch.float16}, {}),
    "layers": ({"num_layers": 2, "bidirectional": True}, {}),
    "projected": ({"proj_size": 2, "bidirectional": True}, {}),
    "batch first": ({"batch_first": True}, {}),
    "lengths": ({"bidirectional": True}, {"lengths": torch.tensor([2, 5, 0, 4])}),
    "resets": ({"bidirectional": True}, {"resets": torch.arange(20).view(5, 4) % 3 == 0}),
    "packed": ({"bidirectional": True, "proj_size": 2}, {"batch_sizes": torch.tensor([4, 3, 3, 1])}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_may_be_changed_in_place(form: str, change: str, backend: str) -> None:
    """A backward pass needs none of them, so that the change counts as one of a copy does, bit for bit."""
    options, masks = FORMS[form]
    module = lstm_ext.LSTM(3, 4, **options)
    sizes = masks.get("batch_sizes")
    shape = (4, 5, 3) if module.batch_first else (5, 4, 3) if sizes is None else (int(sizes.sum()), 3)
    x = torch.randn(shape, dtype=module.weight_ih_l0.dtype, requires_grad=True)

    def gradients(own: Callable[[Any], Any]) -> list[Any]:
        y, state = module(x, **masks) if sizes is None else module(PackedSequence(x, sizes))
        outputs = [own(a) for a in (y if sizes is None else y.data, *state)]
        for a in outputs:
            CHANGES[change](a)
        loss = sum((a * torch.linspace(1, 2, a.numel()).view_as(a)).sum() for a in outputs)
        return list(torch.autograd.grad(loss, [x, *module.parameters()]))

    actual, expected = gradients(lambda a: a), gradients(torch.clone)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert any(e.abs().sum() > 0 for e in expected)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", [{"bidirectional": True}, {"proj_size": 2}, {"num_layers": 2}], ids=str)
def test_outputs_changed_in_place_give_the_gradients_of_stock(
    options: dict[str, Any], change: str, backend: str
) -> None:
    stock, ours = (L.LSTM(3, 4, dtype=torch.float64, **options) for L in (nn, lstm_ext))
    ours.load_state_dict(stock.state_dict())
    x, gradients = torch.randn(5, 4, 3, dtype=torch.float64), []
    for module in (ours, stock):
        y, _ = module(x)
        CHANGES[change](y)
        gradients.append(torch.autograd.grad(y.pow(2).sum(), list(module.parameters())))
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected, "float64", terms=64)


@pytest.mark.parametrize("way", ["checkpoint", "second derivative", "vmap", "anomaly", "DataParallel", "watched"])
def test_outputs_changed_in_place_by_any_way(way: str, backend: str) -> None:
    module, x = lstm_ext.LSTM(3, 4, bidirectional=True, dtype=torch.float64), leaf(5, 2, 3)

    def doubled(x: Any) -> Any:
        return module(x)[0].mul_(2)

    def gradient(y: Any, create_graph: bool = False) -> Any:
        return torch.autograd.grad(y.sin().sum(), x, create_graph=create_graph)[0]

    expected = gradient(module(x)[0] * 2)
    if way == "checkpoint":
        actual = gradient(checkpoint(doubled, x, use_reentrant=False))
    elif way == "second derivative":
        actual = gradient(doubled(x), create_graph=True)
        assert gradgradcheck(doubled, x, fast_mode=True)
    elif way == "vmap":
        actual = torch.vmap(torch.func.grad(lambda row: doubled(row).sin().sum()), 1, 1)(x)
    elif way == "anomaly":
        with torch.autograd.detect_anomaly(check_nan=True):
            actual = gradient(doubled(x))
    elif way == "DataParallel":
        actual = gradient(nn.DataParallel(module)(x)[0].mul_(2))
    else:
        with torch.overrides.BaseTorchFunctionMode():
            actual = gradient(doubled(x))
    assert_close(actual, expected, "float64", terms=64)


STATE_CHANGES: dict[str, Callable[[Any], Any]] = {
    "mask": lambda a: a.__setitem__(torch.arange(a.numel()).view_as(a) % 2 == 0, 0.0),
    "mul_": lambda a: a.mul_(2),
    "data": lambda a: a.data.mul_(2),
    "detach_": lambda a: a.detach_(),
    "transpose_": lambda a: a.transpose_(0, 1),
    "data =": lambda a: setattr(a, "data", a.data * 2),
    "resize_": lambda a: a.resize_(3),
    "set_": lambda a: a.set_(torch.zeros(3)),
}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("change", STATE_CHANGES)
@pytest.mark.parametrize("kind", ["LSTMCell", "LSTM"])
def test_states_can_be_changed_as_those_of_stock(kind: str, change: str, watched: bool, backend: str) -> None:
    """Each output by itself: what torch allows works, what it refuses is refused in the same words."""

    def outcome(L: Any, n: int) -> Any:
        torch.manual_seed(0)
        module = getattr(L, kind)(3, 4, dtype=torch.float64)
        with torch.overrides.BaseTorchFunctionMode() if watched else nullcontext():
            outputs = module(torch.ones(2, 3, dtype=torch.float64))
        flat = list(outputs) if kind == "LSTMCell" else [outputs[0], *outputs[1]]
        try:
            STATE_CHANGES[change](flat[n])
            sum(a.sum() for a in flat if a.requires_grad).backward()
        except RuntimeError as error:
            return str(error)
        return [p.grad for p in module.parameters()]

    for n in range(2 if kind == "LSTMCell" else 3):
        actual, expected = outcome(lstm_ext, n), outcome(nn, n)
        if isinstance(expected, str):
            assert actual == expected
        else:
            for a, e in zip(actual, expected, strict=True):
                assert_close(a, e, "float64", terms=64)


# Memory --------------------------------------------------------------------------------------------------------------


def saved_bytes(call: Callable[[], Any]) -> tuple[int, Any]:
    """The bytes of all storages kept for the backward pass, and what the call returned."""
    storages: dict[int, int] = {}

    def pack(t: Any) -> Any:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        result = call()
    return sum(storages.values()), result


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_inference_saves_nothing(guard: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3)
    asked: list[Save] = []
    engine = engines.choose("cpu", torch.float32).engine
    forward = engine.forward
    monkeypatch.setattr(engine, "forward", lambda *a: asked.append(a[1]) or forward(*a))
    with guard():
        size, (y, _) = saved_bytes(lambda: module(x))
        module(x, return_cells=True)
    assert (size, asked, y.requires_grad) == (0, [Save.NOTHING, Save.CELLS], False)
    assert saved_bytes(lambda: module(x))[0] > 0
    assert asked[2:] == [Save.ALL]


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 16}])
def test_a_training_step_keeps_no_more_than_stock(options: dict[str, Any]) -> None:
    stock, ours = nn.LSTM(64, 64, **options), lstm_ext.LSTM(64, 64, **options)
    x = torch.randn(50, 16, 64)
    (kept, _), (kept_by_stock, _) = saved_bytes(lambda: ours(x)), saved_bytes(lambda: stock(x))
    assert 0 < kept <= kept_by_stock


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 5}])
def test_a_training_step_keeps_gates_cells_and_what_it_was_given(options: dict[str, Any], backend: str) -> None:
    """Not y."""
    T, B, I, H = 7, 2, 3, 8  # noqa: E741
    module, x = lstm_ext.LSTM(I, H, **options), torch.randn(T, B, I)
    kept, _ = saved_bytes(lambda: module(x))
    directions = 2 if module.bidirectional else 1
    given = sum(p.numel() for p in module.parameters()) + x.numel()
    assert kept == 4 * (given + directions * T * B * 5 * H)


def test_backward_frees_what_it_saved() -> None:
    module, x = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    gc.collect()
    gc.disable()  # a cycle would keep the tensors alive
    try:
        y, state = module(x)
        node = weakref.ref(y.grad_fn)
        y.sum().backward()
        del y, state
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool, backend: str) -> None:
    module, x = lstm_ext.LSTM(3, 4, 2, dropout=0.5), torch.randn(5, 2, 3, requires_grad=True)

    def gradients(call: Callable[[Any], Any]) -> list[Any]:
        torch.manual_seed(1)
        module.zero_grad()
        y, h, c = call(x)
        (y.sum() + h.sum() * 2 + c.sum() * 3).backward()
        result = [x.grad, *(p.grad for p in module.parameters())]
        x.grad = None
        return result

    def flat(x: Any) -> tuple[Any, ...]:
        y, state = module(x)
        return y, *state

    expected = gradients(flat)
    actual = gradients(lambda x: checkpoint(flat, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


# The ops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [0, 1, 2])
@pytest.mark.parametrize("name", ["plain", "both", "packed"])
def test_forward_op(name: str, save: int) -> None:
    (x, h0, c0, *weights), masks = make_layer(2, 3, **LAYERS[name])
    opcheck(layer_forward, (x, h0, c0, weights, *masks, save))


@pytest.mark.parametrize(("name", "needs"), [("plain", 15), ("plain", 2), ("both", 15), ("packed", 9)])
def test_backward_op(name: str, needs: int) -> None:
    (x, h0, c0, *weights), masks = make_layer(2, 3, **LAYERS[name])
    y, h_n, _, cells, gates = layer_forward(x, h0, c0, weights, *masks, 2)
    if name == "packed":  # how a second derivative unpacks depends on what batch_sizes holds
        x, h0, c0, *weights = (a.detach() for a in (x, h0, c0, *weights))
    seeds = (torch.randn_like(y), torch.randn_like(h_n), None, torch.randn_like(cells))
    saved = (y.detach(), cells.detach(), gates.detach())
    opcheck(layer_backward, (*seeds, x, h0, c0, weights, *saved, *masks, needs))


def test_op_refuses_what_the_kernel_would() -> None:
    """Also where only shapes are known."""
    x, weights = torch.randn(3, 2, 5), make_weights(4, 3)
    weights = [w.float() for w in weights]
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match=r"x: expected shape \[T, B, I\] = \[3, 2, 4\], got \[3, 2, 5\]"):
            layer_forward(x.to(device), None, None, [w.to(device) for w in weights], None, None, None, 0, False, 0)


def test_packed_second_derivative_of_the_module(backend: str) -> None:
    module = lstm_ext.LSTM(2, 3, dtype=torch.float64)
    sizes = torch.tensor([2, 1])
    assert gradgradcheck(lambda rows: module(PackedSequence(rows, sizes))[0].data, leaf(3, 2))


# Short path and transforms -------------------------------------------------------------------------------------------


def test_forward_mode_reaches_through() -> None:
    module, x = lstm_ext.LSTM(2, 3, dtype=torch.float64), torch.randn(3, 2, 2, dtype=torch.float64)
    tangent = torch.randn_like(x)
    _, actual = torch.func.jvp(lambda x: module(x)[0], (x,), (tangent,))
    _, expected = torch.autograd.functional.jvp(lambda x: module(x)[0], x, tangent)
    assert_close(actual, expected, "float64", terms=16)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_op_alone_refuses_forward_mode(compiled: bool) -> None:
    """Rather than to lose the tangent; `lstm_ext.lstm` and the modules know another way."""
    (x, _, _, *weights), masks = make_layer(2, 3)
    x, weights = x.detach(), [w.detach() for w in weights]

    def call(x: Any, tangent: Any) -> Any:
        return torch.func.jvp(lambda x: layer_forward(x, None, None, weights, *masks, 0)[0], (x,), (tangent,))

    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="forward mode AD") as refused:
        call(x, torch.randn_like(x))
    assert isinstance(refused.value, RuntimeError)


def test_subclasses_and_modes_see_the_op() -> None:
    class Tagged(torch.Tensor):
        pass

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    module, x = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3)
    plain, _ = module(x)
    tagged, _ = module(x.as_subclass(Tagged))
    assert type(tagged) is Tagged
    assert torch.equal(tagged.as_subclass(torch.Tensor), plain)
    with Names():
        assert torch.equal(module(x)[0], plain)
    assert "lstm_ext.layer_forward.default" in seen
