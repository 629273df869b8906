"""Modules, functions and derivatives on a GPU: against the CPU, torch's modules and float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from lstm_ext.call import LayerCall, Save
from lstm_ext.testing import assert_close

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch.nn.utils.rnn import pack_sequence  # noqa: E402

import lstm_ext  # noqa: E402
from lstm_ext import route  # noqa: E402

from .drop_in import B, H, I, T, assert_same, pair, run, tensors  # noqa: E402
from .test_autograd import LAYERS, make_layer  # noqa: E402
from .test_modules import OPTIONS, make_state  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_no_hang", "_exact_products")]


def moved(a: Any) -> Any:
    """Tensors, PackedSequences and tuples of them on the GPU; all else as it is."""
    if type(a) is tuple:
        return tuple(map(moved, a))
    return a.cuda() if hasattr(a, "cuda") else a


def cast(a: Any, dtype: Any) -> Any:
    """A tensor, or a tuple of them, in a dtype."""
    return tuple(each.to(dtype) for each in a) if type(a) is tuple else a.to(dtype)


def assert_as_on_the_cpu(module: Any, *args: Any, **options: Any) -> None:
    twin = copy.deepcopy(module).cuda()
    actual = run(twin, *map(moved, args), **{name: moved(a) for name, a in options.items()})
    assert_same([None if a is None else a.cpu() for a in actual], run(module, *args, **options))


@OPTIONS
def test_module_gives_the_numbers_of_the_cpu(options: dict[str, Any]) -> None:
    module, state = lstm_ext.LSTM(I, H, **options), make_state(options)
    x = torch.randn((B, T, I) if options["batch_first"] else (T, B, I))
    assert_as_on_the_cpu(module, x)
    assert_as_on_the_cpu(module, x, state)
    assert_as_on_the_cpu(module, torch.randn(T, I), make_state(options, ()))
    lengths, resets = torch.tensor([6, 0, 4], dtype=torch.int32), torch.rand(x.shape[:2]) < 0.3
    assert_as_on_the_cpu(module, x, state, lengths=lengths, resets=resets, return_cells=True)
    for sorted_ in (True, False):
        rows = [torch.randn(n, I) for n in ((6, 4, 1) if sorted_ else (4, 6, 1))]
        assert_as_on_the_cpu(module, pack_sequence(rows, enforce_sorted=sorted_), state)
    cell = lstm_ext.LSTMCell(I, H, options["bias"])
    assert_as_on_the_cpu(cell, torch.randn(B, I), (torch.randn(B, H), torch.randn(B, H)))


@pytest.mark.parametrize("name", ["peephole", "coupled, softsign", "means of zoneout", "clips", "layer norm"])
def test_module_with_options_gives_the_numbers_of_the_cpu(name: str) -> None:
    options: dict[str, Any] = {
        "peephole": {"peephole": True, "forget_bias": 1.0},
        "coupled, softsign": {"coupled": True, "activation": "softsign", "bidirectional": True},
        "means of zoneout": {"zoneout": (0.2, 0.3), "num_layers": 2},
        "layer norm": {"layer_norm": True, "bidirectional": True, "num_layers": 2},
        "clips": {"cell_clip": 0.4, "proj_clip": 0.2, "proj_size": 3, "recurrent_activation": "hard_sigmoid"},
    }[name]
    module = lstm_ext.LSTM(I, H, dtype=torch.float64, **options).train("zoneout" not in name)
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths, resets = torch.tensor([6, 0, 4]), torch.rand(T, B) < 0.3
    assert_as_on_the_cpu(module, x, lengths=lengths, resets=resets, return_cells=True)
    for kind in (lstm_ext.BasicLSTMCell, lstm_ext.LayerNormBasicLSTMCell):
        cell = kind(H, input_size=I).cuda()
        twin, rows = copy.deepcopy(cell).cpu(), torch.randn(B, I)
        torch.testing.assert_close(cell(rows.cuda())[0].cpu(), twin(rows)[0])


def assert_near(actual: list[Any], exact: list[Any], dtype: str) -> None:
    """Of results in a dtype, and the same in float64."""
    assert {a.dtype for a in actual} == {getattr(torch, dtype)}
    assert_same([a.double() for a in actual], exact, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@OPTIONS
def test_module_equals_stock(options: dict[str, Any], dtype: str) -> None:
    """Stock runs in float64: the float32 of cuDNN is off by 5e-6 in such small layers, more than TOLERANCES allow."""
    stock, ours = (module.cuda() for module in pair(I, H, **options))
    stock.double()
    ours.to(getattr(torch, dtype))
    x = torch.randn((B, T, I) if options["batch_first"] else (T, B, I)).cuda()
    for state in ((), (moved(make_state(options)),)):
        mine, theirs = ([cast(a, each.weight_ih_l0.dtype) for a in (x, *state)] for each in (ours, stock))
        assert_near(run(ours, *mine), run(stock, *theirs), dtype)
        with torch.no_grad():
            assert_near(tensors(ours(*mine)), tensors(stock(*theirs)), dtype)


@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_training_is_as_near_to_float64_as_on_the_cpu(dtype: str, cell: bool) -> None:
    module = (lstm_ext.LSTMCell if cell else lstm_ext.LSTM)(40, 96, dtype=getattr(torch, dtype)).cuda()
    exact = (nn.LSTMCell if cell else nn.LSTM)(40, 96, dtype=torch.float64).cuda()
    exact.load_state_dict(module.state_dict())
    x = torch.randn(12, 40) if cell else torch.randn(50, 12, 40)
    x = x.to(getattr(torch, dtype))
    results = run(module, x.cuda()), run(exact, x.double().cuda())
    for n, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert actual.dtype == x.dtype
        assert_close(actual, expected, dtype, terms=50 * 12, name=f"result {n}")


def test_lengths_come_from_anywhere_and_are_clamped() -> None:
    """A range check would wait for the device."""
    weights = [torch.randn(20, n).cuda() for n in (3, 5)]
    x = torch.randn(4, 3, 3).cuda()
    expected = lstm_ext.lstm(x, None, *weights, lengths=torch.tensor([4, 0, 2]).cuda())
    for lengths in (torch.tensor([99, -7, 2]), torch.tensor([99, -7, 2], dtype=torch.int32).cuda()):
        for a, e in zip(tensors(lstm_ext.lstm(x, None, *weights, lengths=lengths)), tensors(expected), strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("name", LAYERS)
def test_first_and_second_derivative(name: str) -> None:
    arguments, (lengths, resets, sizes, *layout) = make_layer(2, 3, **LAYERS[name])
    present = [a is not None for a in arguments]
    masks = (moved(lengths), moved(resets), sizes, *layout)

    def layer(*given: Any) -> tuple[Any, ...]:
        rest = iter(given)
        x, h0, c0, *weights = (next(rest) if p else None for p in present)
        return route.run(LayerCall(x, h0, c0, weights, *masks), Save.CELLS)[:4]

    given = tuple(a.detach().cuda().requires_grad_() for a in arguments if a is not None)
    assert gradcheck(layer, given)
    assert gradgradcheck(layer, given, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_as_stock(dtype: Any) -> None:
    """The numbers of float32 as far as the half type goes, and the dtypes of stock.

    But for the LSTM in bfloat16, which torch runs in float16.
    """
    stock, ours = (module.cuda() for module in pair(I, H))
    stock_cell, cell = (module.cuda() for module in pair(I, H, cell=True))
    x, state = torch.randn(T, B, I).cuda(), (torch.randn(B, H).cuda(), torch.randn(B, H).cuda())
    for theirs, mine, args in (
        (stock, ours, (x,)),
        (stock, ours, (x, tuple(s[None] for s in state))),
        (stock_cell, cell, (x[0],)),
        (stock_cell, cell, (x[0].to(dtype), state)),
    ):
        exact = run(theirs, *(a.float() if hasattr(a, "float") else a for a in args))
        with torch.autocast("cuda", dtype):
            actual, expected = run(mine, *args), run(theirs, *args)
        asked = {torch.float16: dtype} if theirs is stock else {}
        assert [a.dtype for a in actual] == [asked.get(e.dtype, e.dtype) for e in expected]
        for a, e in zip(actual, exact, strict=True):
            assert_close(a, e, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend: str) -> None:
    if backend == "inductor" and not torch.utils._triton.has_triton():
        pytest.skip("inductor needs Triton")
    torch._dynamo.reset()
    module, x = lstm_ext.LSTM(3, 4, 2, bidirectional=True).cuda(), torch.randn(5, 2, 3).cuda()
    compiled = torch.compile(lambda x: module(x)[0].relu().sum(), fullgraph=True, backend=backend)
    parameters, gradients = list(module.parameters()), []
    for call in (compiled, lambda x: module(x)[0].relu().sum()):
        gradients.append(torch.autograd.grad(call(x), parameters))
    assert_same(*map(list, gradients))


def test_wrong_arguments_are_named() -> None:
    x, w_ih, w_hh = torch.randn(4, 3, 3).cuda(), torch.randn(20, 3).cuda(), torch.randn(20, 5).cuda()
    for error, message, call in (
        (RuntimeError, "w_hh: expected on device cuda", lambda: lstm_ext.lstm(x, None, w_ih, w_hh.cpu())),
        (RuntimeError, r"x: expected shape \[T, B, I\]", lambda: lstm_ext.lstm(x[..., :2], None, w_ih, w_hh)),
        (
            RuntimeError,
            "x: expected dtype float32 as the weights have, got float16",
            lambda: lstm_ext.lstm(x.half(), None, w_ih, w_hh),
        ),
        (
            RuntimeError,
            "x: expected at least one time step, got T = 0",
            lambda: lstm_ext.lstm(x[:0], None, w_ih, w_hh),
        ),
        (TypeError, "resets: expected dtype bool", lambda: lstm_ext.lstm(x, None, w_ih, w_hh, resets=x[..., 0])),
        (ValueError, "strategy: expected 'block'", lambda: lstm_ext.plan(4, 3, 5, strategy="tree")),
    ):
        with pytest.raises(error, match=message):
            call()
