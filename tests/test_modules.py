"""`LSTM`, `LSTMCell` against torch's, option by option; `BasicLSTMCell`; the functions; bad input."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import lstm_ext
from lstm_ext import engines, reference, route
from lstm_ext.call import REVERSE
from lstm_ext.testing import CASES, Case, assert_close, make_inputs, round_to, run_oracle

from .conftest import BACKENDS
from .drop_in import TERMS, B, H, I, T, assert_same, pair, run, tensors
from .test_process import run_python

DTYPES = ["float32", "float64", "bfloat16", "float16"]


def options_grid() -> list[dict[str, Any]]:
    """Every value of five options with all values of any three others: half of all combinations."""
    flags = ("bidirectional", "batch_first", "bias", "proj_size", "num_layers")
    values = [(False, True), (False, True), (True, False), (0, 3), (1, 2)]
    half = [each for each in itertools.product((0, 1), repeat=5) if sum(each) % 2 == 0]
    return [{flag: v[n] for flag, v, n in zip(flags, values, each, strict=True)} for each in half]


OPTIONS = pytest.mark.parametrize(
    "options", options_grid(), ids=lambda o: "-".join(f"{k}{int(v)}" for k, v in o.items())
)


def make_state(options: dict[str, Any], batch: tuple[int, ...] = (B,)) -> tuple[Any, Any]:
    LD = options["num_layers"] * (2 if options["bidirectional"] else 1)
    return torch.randn(LD, *batch, options["proj_size"] or H), torch.randn(LD, *batch, H)


@OPTIONS
def test_equals_stock(options: dict[str, Any], backend: str) -> None:
    stock, ours = pair(I, H, **options)
    x, state = torch.randn((B, T, I) if options["batch_first"] else (T, B, I)), make_state(options)
    assert_same(run(ours, x), run(stock, x))
    assert_same(run(ours, x, state), run(stock, x, state))
    with torch.no_grad():
        assert_same(tensors(ours(x, state)), tensors(stock(x, state)))
    x, state = torch.randn(T, I), make_state(options, ())
    assert_same(run(ours, x, state), run(stock, x, state))
    assert_same(run(ours, x), run(stock, x))


@OPTIONS
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_equals_stock(options: dict[str, Any], enforce_sorted: bool, backend: str) -> None:
    stock, ours = pair(I, H, **options)
    lengths = [6, 4, 1] if enforce_sorted else [4, 6, 1]
    packed = pack_sequence([torch.randn(n, I) for n in lengths], enforce_sorted=enforce_sorted)
    assert_same(run(ours, packed), run(stock, packed))
    state = make_state(options)
    assert_same(run(ours, packed, state), run(stock, packed, state))


def test_no_rows_have_no_lengths() -> None:
    """Nor resets; and a list without numbers has no dtype."""
    module, x = lstm_ext.LSTM(I, H), torch.randn(T, 0, I)
    assert module(x, lengths=[], resets=[[]] * T)[0].shape == (T, 0, H)
    assert lstm_ext.dynamic_rnn(lstm_ext.BasicLSTMCell(H), x, [], time_major=True)[0].shape == (T, 0, H)


@OPTIONS
def test_lengths_resets_and_cells(options: dict[str, Any], backend: str) -> None:
    """`lengths` is what packing does; a reset is a fresh start; the cells' last row is c_n."""
    stock, ours = pair(I, H, **options)
    time = 1 if options["batch_first"] else 0
    x = torch.randn((B, T, I) if options["batch_first"] else (T, B, I))
    lengths = torch.tensor([6, 2, 4], dtype=torch.int32)
    packed = pack_padded_sequence(x, lengths.long(), options["batch_first"], enforce_sorted=False)

    def stock_padded(x: Any) -> Any:
        y, state = stock(pack_padded_sequence(x, lengths.long(), options["batch_first"], enforce_sorted=False))
        return pad_packed_sequence(y, options["batch_first"])[0], state

    stock_padded.parameters = stock.parameters  # type: ignore[attr-defined]
    assert_same(run(ours, x, lengths=lengths), run(stock_padded, x))
    _, (_, c_n), cells = ours(x, lengths=lengths, return_cells=True)
    _, _, packed_cells = ours(packed, return_cells=True)
    assert_same([cells], [pad_packed_sequence(packed_cells, options["batch_first"])[0]])
    last = cells.movedim(time, 0)[lengths.long() - 1, torch.arange(B)]
    assert torch.equal(last[:, :H], c_n[-2 if options["bidirectional"] else -1])

    if options["num_layers"] == 1:  # a deeper layer of a reverse direction sees the whole output below
        cut = 2
        resets = torch.zeros(x.shape[:2], dtype=torch.bool)
        resets.select(time, cut)[:] = True
        y, (h_n, c_n) = ours(x, resets=resets)
        forward = slice(0, options["proj_size"] or H)
        tail, (h_tail, c_tail) = stock(x.narrow(time, cut, T - cut))
        assert_same(
            [y.narrow(time, cut, T - cut)[..., forward], h_n[0], c_n[0]], [tail[..., forward], h_tail[0], c_tail[0]]
        )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_draws_as_stock(batch_first: bool, packed: bool) -> None:
    stock, ours = pair(I, H, 3, dropout=0.4, bidirectional=True, batch_first=batch_first)
    x: Any = torch.randn(4, 5, I)
    if packed:
        x = pack_sequence([torch.randn(n, I) for n in (5, 3)])
    results = []
    for module in (stock, ours, ours):
        torch.manual_seed(3)
        results.append(run(module, x))
    assert_same(results[1], results[0])
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))
    torch.manual_seed(4)
    assert not torch.equal(tensors(ours(x))[0], results[1][0])
    for module in (stock, ours):
        module.eval()
    assert_same(run(ours, x), run(stock, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_against_the_oracle(dtype: str, backend: str) -> None:
    """torch's own half types round at every step, so the float64 oracle judges."""
    module = lstm_ext.LSTM(I, H, dtype=getattr(torch, dtype))
    cell = lstm_ext.LSTMCell(I, H, dtype=getattr(torch, dtype))
    x = torch.randn(T, B, I).to(getattr(torch, dtype))
    exact, exact_cell = nn.LSTM(I, H).double(), nn.LSTMCell(I, H).double()
    exact.load_state_dict(module.double().state_dict())
    exact_cell.load_state_dict(cell.double().state_dict())
    results = run(module.to(x.dtype), x), run(cell.to(x.dtype), x[0])
    expected = run(exact, x.double()), run(exact_cell, x[0].double())
    for actual, oracle in zip(results, expected, strict=True):
        for n, (a, e) in enumerate(zip(actual, oracle, strict=True)):
            assert a.dtype == x.dtype
            assert_close(a, e, dtype, terms=TERMS, name=f"result {n}")


@pytest.mark.filterwarnings("ignore:lstm_ext runs torch's own LSTM cell")
@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_a_cell_forgets_where_it_is_reset(
    batched: bool, served: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As stock does from a state with zeros there; where there is no kernel too, and in torch's own cell."""
    if not served:
        monkeypatch.setattr(route, "has_kernel", lambda *_: False)
        monkeypatch.setattr(route, "is_eager", lambda: False)
    stock, ours = pair(I, H, cell=True)
    shape = (B,) if batched else ()
    x, state = torch.randn(*shape, I), (torch.randn(*shape, H), torch.randn(*shape, H))
    for resets in (torch.rand(shape) < 0.5, torch.zeros(shape).bool(), torch.ones(shape).bool()):

        def masked(x: Any, state: Any, resets: Any = resets) -> Any:
            return stock(x, tuple(a.masked_fill(resets[..., None], 0) for a in state))

        masked.parameters = stock.parameters  # type: ignore[attr-defined]
        assert_same(run(ours, x, state, resets=resets), run(masked, x, state))
        assert_same(run(ours, x, resets=resets), run(stock, x))
    if batched and served:
        wide = state[0], state[1].double()
        assert_same(tensors(ours(x, wide, resets=resets)), tensors(masked(x, wide)))
        with pytest.raises(RuntimeError, match=r"resets: expected shape \[B\] = "):
            ours(x, resets=resets[1:])
        with pytest.raises(TypeError, match=r"resets: expected dtype bool, got float32: use resets\.bool\(\)"):
            ours(x, resets=resets.float())


def test_a_loop_of_cells_is_a_layer_with_resets(backend: str) -> None:
    """A rollout, one step at a time, and the training pass over what it left: bit for bit on the compiled kernels."""
    layer, cell = lstm_ext.LSTM(I, H), lstm_ext.LSTMCell(I, H)
    cell.load_state_dict({name.removesuffix("_l0"): w for name, w in layer.state_dict().items()})
    x, resets, state, outputs = torch.randn(T, B, I), torch.rand(T, B) < 0.4, None, []
    with torch.no_grad():
        for step, new in zip(x, resets, strict=True):
            state = cell(step, state, resets=new)
            outputs.append(state[0])
    torch.testing.assert_close(layer(x, resets=resets)[0], torch.stack(outputs))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_cell_equals_stock(bias: bool, batched: bool, backend: str) -> None:
    stock, ours = pair(I, H, bias, cell=True)
    shape = (B,) if batched else ()
    x, state = torch.randn(*shape, I), (torch.randn(*shape, H), torch.randn(*shape, H))
    for args in ((x,), (x, state)):
        assert_same(run(ours, *args), run(stock, *args))
        with torch.no_grad():
            assert_same(tensors(ours(*args)), tensors(stock(*args)))
    assert_same(tensors(ours(input=x, hx=state)), tensors(stock(input=x, hx=state)))


# State, copies, devices ----------------------------------------------------------------------------------------------

CONSTRUCTIONS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((5, 7), {}),
    ((5, 7, 2, False, True, 0.5, True, 3), {}),
    ((5, 7), {"num_layers": 3, "dropout": 0.1, "dtype": torch.float64}),
]


@pytest.mark.parametrize(("args", "options"), CONSTRUCTIONS)
def test_constructs_as_stock(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(5)
    stock = nn.LSTM(*args, **options)
    torch.manual_seed(5)
    ours = lstm_ext.LSTM(*args, **options)
    assert repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [len(w) for w in ours.all_weights] == [len(w) for w in stock.all_weights]
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.dtype == theirs.dtype
    stock.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(stock.state_dict(), strict=True)
    assert repr(lstm_ext.LSTMCell(3, 4, bias=False)) == repr(nn.LSTMCell(3, 4, bias=False))


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((0, 4), {}),
        ((3, 0), {}),
        ((3.0, 4), {}),
        ((3, "4"), {}),
        ((3, 4, 0), {}),
        ((3, 4), {"bias": 1}),
        ((3, 4), {"batch_first": 1}),
        ((3, 4), {"dropout": 1.5}),
        ((3, 4), {"dropout": True}),
        ((3, 4), {"dropout": "x"}),
        ((3, 4), {"proj_size": 4}),
        ((3, 4), {"proj_size": -1}),
        ((3,), {}),
        ((3, 4), {"unknown": 1}),
    ],
)
def test_refuses_arguments_as_stock(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011
        nn.LSTM(*args, **options)
    with pytest.raises(expected.type):
        lstm_ext.LSTM(*args, **options)


def through_torch_save(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def to_and_back(module: Any) -> Any:
    return module.double().half().float()


COPIES: list[Callable[[Any], Any]] = [
    copy.deepcopy,
    copy.copy,
    lambda m: pickle.loads(pickle.dumps(m)),
    through_torch_save,
    to_and_back,
    lambda m: m.share_memory(),
    lambda m: m.to("meta").to_empty(device="cpu"),
]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("cell", [False, True])
def test_copies_work(copied: Callable[[Any], Any], cell: bool) -> None:
    stock, ours = pair(I, H, cell=cell)
    state = {name: value.half().float() for name, value in stock.state_dict().items()}
    twin = copied(ours)
    for module in (stock, twin):
        module.load_state_dict(state)
    x = torch.randn(B, I) if cell else torch.randn(T, B, I)
    assert_same(run(twin, x), run(stock, x))
    if not cell:
        twin.flatten_parameters()
        assert_same(run(twin, x), run(stock, x))


def test_meta_device() -> None:
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True, device="meta")
    y, (h_n, c_n) = module(torch.randn(T, B, I, device="meta"))
    assert (y.is_meta, y.shape, h_n.shape, c_n.shape) == (True, (T, B, 2 * H), (4, B, H), (4, B, H))
    h, _ = lstm_ext.LSTMCell(I, H, device="meta")(torch.randn(B, I, device="meta"))
    assert (h.is_meta, h.shape) == (True, (B, H))


def test_functional_call_uses_the_given_weights() -> None:
    stock, ours = pair(I, H, 2)
    x, weights = torch.randn(T, B, I), {n: torch.randn_like(p) for n, p in stock.named_parameters()}
    actual, expected = (tensors(torch.func.functional_call(m, weights, (x,))) for m in (ours, stock))
    assert_same(actual, expected)


def test_without_a_kernel_torch_runs_and_says_so_once() -> None:
    stock, ours = pair(I, H, 2, dtype=torch.complex64)
    stock_cell, cell = pair(I, H, dtype=torch.complex64, cell=True)
    x = torch.randn(T, B, I, dtype=torch.complex64)
    engines.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="complex64") as caught:
        results = [tensors(module(x)) for module in (ours, ours)]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for a, e in zip(results[0] + results[1], tensors(stock(x)) * 2, strict=True):
        torch.testing.assert_close(a, e)
    with pytest.warns(UserWarning, match="complex64"):
        torch.testing.assert_close(cell(x[0]), stock_cell(x[0]))
    mixed = (torch.randn(B, H), torch.randn(B, H, dtype=torch.float64))
    stock_cell, cell = pair(I, H, cell=True)
    with pytest.warns(UserWarning, match="float64"):
        torch.testing.assert_close(cell(x[0].real, mixed), stock_cell(x[0].real, mixed))


# Bad input -----------------------------------------------------------------------------------------------------------

X, STATE = torch.zeros(5, 2, 3), torch.zeros(1, 2, 4)
PACKED = pack_sequence([torch.zeros(3, 3), torch.zeros(2, 3)])
EVEN = pack_sequence([torch.zeros(3, 3)] * 2)
BAD_CALLS: dict[str, tuple[Any, ...]] = {
    "T=0": (X[:0],),
    "4-D": (X[None],),
    "1-D": (X[0, 0],),
    "input size": (torch.zeros(5, 2, 4),),
    "integer": (X.long(),),
    "float64": (X.double(),),
    "half": (X.half(),),
    "meta": (X.to("meta"),),
    "sparse": (X.to_sparse(),),
    "NumPy": (X.numpy(),),
    "None": (None,),
    "h_0 float64": (X, (STATE.double(), STATE)),
    "c_0 float64": (X, (STATE, STATE.double())),
    "h_0 batch": (X, (torch.zeros(1, 3, 4), STATE)),
    "h_0 batch 1": (X, (STATE[:, :1], STATE[:, :1])),
    "c_0 batch": (X, (STATE, torch.zeros(1, 3, 4))),
    "h_0 layers": (X, (torch.zeros(2, 2, 4), STATE)),
    "h_0 meta": (X, (STATE.to("meta"), STATE)),
    "2-D state": (X, (STATE[0], STATE[0])),
    "3-D state unbatched": (X[:, 0], (STATE[:, :1], STATE[:, :1])),
    "packed, one of a state": (EVEN, [STATE]),
    "state tensor": (X, torch.zeros(2, 1, 2, 4)),
    "state of one": (X, (STATE,)),
    "state of three": (X, (STATE, STATE, STATE)),
    "state of None": (X, (None, None)),
    "packed input size": (pack_sequence([torch.zeros(3, 4), torch.zeros(2, 4)]),),
    "packed float64": (PACKED._replace(data=PACKED.data.double()),),
    "packed state": (PACKED, (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))),
    "packed state float64": (PACKED, (STATE.double(), STATE.double())),
}
Y, H0 = X[0], STATE[0]
BAD_CELL_CALLS: dict[str, tuple[Any, ...]] = {
    "3-D": (X,),
    "0-D": (torch.tensor(1.0),),
    "input size": (torch.zeros(2, 4),),
    "float64": (Y.double(),),
    "integer": (Y.long(),),
    "meta": (Y.to("meta"),),
    "NumPy": (Y.numpy(),),
    "3-D state": (Y, (STATE, STATE)),
    "1-D state": (Y, (H0[0], H0[0])),
    "h_0 batch": (Y, (H0[:1], H0)),
    "c_0 batch": (Y, (H0, H0[:1])),
    "h_0 width": (Y, (torch.zeros(2, 5), H0)),
    "c_0 width": (Y, (H0, torch.zeros(2, 5))),
    "h_0 float64": (Y, (H0.double(), H0)),
    "h_0 meta": (Y, (H0.to("meta"), H0)),
    "2-D state unbatched": (Y[0], (H0, H0)),
    "state tensor": (Y, torch.zeros(2, 2, 4)),
    "state of one": (Y, (H0,)),
    "state of three": (Y, (H0, H0, H0)),
    "state of None": (Y, (None, None)),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("cell", "name"), [*((False, name) for name in BAD_CALLS), *((True, name) for name in BAD_CELL_CALLS)]
)
def test_bad_calls_raise_as_stock_word_for_word(cell: bool, name: str, grad: bool, backend: str) -> None:
    stock, ours = pair(3, 4, cell=cell)
    args = (BAD_CELL_CALLS if cell else BAD_CALLS)[name]
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where torch's own cell is asked
        with pytest.raises(Exception) as expected:  # noqa: PT011
            stock(*args)
        with pytest.raises(expected.type, match=rf"\A{re.escape(str(expected.value))}\Z"):
            ours(*args)


MASKS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too long": ({"lengths": torch.tensor([5, 6])}, ValueError, "lengths.*0 to T = 5, got 5 to 6"),
    "negative": ({"lengths": torch.tensor([5, -1])}, ValueError, "lengths.*0 to T = 5, got -1 to 5"),
    "another batch": ({"lengths": torch.tensor([5])}, RuntimeError, r"lengths.*\[B\] = \[2\], got \[1\]"),
    "float lengths": ({"lengths": torch.tensor([5.0, 1.0])}, TypeError, "lengths.*integer.*float32"),
    "list of floats": ({"lengths": [5.0, 1.0]}, TypeError, "lengths.*integer.*float32"),
    "integer resets": ({"resets": torch.zeros(5, 2).long()}, TypeError, "resets.*bool.*int64"),
    "resets shape": ({"resets": torch.zeros(2, 5).bool()}, RuntimeError, r"resets.*\[5, 2\], got \[2, 5\]"),
    "float resets, NumPy": ({"resets": np.zeros((5, 2))}, TypeError, "resets.*bool.*float64"),
}


@pytest.mark.parametrize("name", MASKS)
def test_bad_masks(name: str, backend: str) -> None:
    options, error, message = MASKS[name]
    module = lstm_ext.LSTM(3, 4)
    with pytest.raises(error, match=message):
        module(X, **options)
    with pytest.raises(ValueError, match="PackedSequence"):
        module(PACKED, lengths=torch.tensor([3, 2]))


# Functions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if not (c.packed or c.batch_first) and c.num_directions == 1], ids=str
)
def test_lstm_against_the_oracle(case: Case, framework: str, backend: str) -> None:
    inputs = make_inputs(case, "float32")
    outputs, _ = run_oracle(inputs)
    convert = torch.from_numpy if framework == "torch" else np.asfortranarray
    arrays = inputs.map(convert).map_masks(convert)
    w_ih, w_hh, *others = arrays.weights
    b_ih, b_hh = others[:2] if case.bias else (None, None)
    state = (arrays.h0[0], arrays.c0[0]) if case.state else None
    masks = {"lengths": arrays.lengths, "resets": arrays.resets, "w_hr": others[-1] if case.P else None}
    reverse = case.directions == REVERSE
    actual = lstm_ext.lstm(arrays.x, state, w_ih, w_hh, b_ih, b_hh, reverse=reverse, return_cells=True, **masks)
    expected = outputs["y"], outputs["h_n"][0], outputs["c_n"][0], outputs["cells"][0]
    for a, e in zip((actual[0], *actual[1], actual[2]), expected, strict=True):
        assert isinstance(a, torch.Tensor if framework == "torch" else np.ndarray)
        assert str(a.dtype).removeprefix("torch.") == "float32"
        assert_close(a, e, "float32", terms=case.output_terms)


ODD_ARRAYS: dict[str, Callable[[Any], Any]] = {
    "float16": lambda a: a.astype(np.float16),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "Fortran": np.asfortranarray,
    "reversed": lambda a: a[::-1].copy()[::-1],
    "misaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
}


@pytest.mark.parametrize("odd", ODD_ARRAYS)
def test_odd_arrays(odd: str, backend: str) -> None:
    rng = np.random.default_rng(0)
    plain = [round_to(rng.standard_normal(s), "float16").astype(np.float32) for s in [(4, 3, 5), (8, 5), (8, 2), (8,)]]
    arrays = [ODD_ARRAYS[odd](a) for a in plain]
    for a in arrays:
        a.flags.writeable = False
    x, w_ih, w_hh, b = arrays
    dtype = "float16" if odd == "float16" else "float32"
    lengths = np.array([4, 0, 2], ">i2")
    expected, _ = lstm_ext.lstm(plain[0].astype(float), None, *(a.astype(float) for a in plain[1:]), lengths=lengths)
    y, (h, c) = lstm_ext.lstm(x, None, w_ih, w_hh, b, lengths=lengths)
    assert y.dtype == np.dtype(dtype)
    assert_close(y, expected, dtype, terms=7)
    h, c = lstm_ext.lstm_cell(x[0], None, w_ih, w_hh, b_hh=b)
    assert_close(h[0], expected[0, 0], dtype, terms=7)
    assert h.dtype == c.dtype == np.dtype(dtype)


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list": ({"x": [[[1.0]]]}, TypeError, "x: expected a numpy.ndarray or torch.Tensor, got list"),
    "kinds": ({"w_ih": torch.zeros(8, 3)}, TypeError, "w_ih: expected a numpy.ndarray as x is, got torch.Tensor"),
    "integer": ({"x": np.zeros((4, 2, 3), int)}, RuntimeError, "x: expected dtype.*float32.*got int64"),
    "mixed": ({"w_hh": np.zeros((8, 2), "f4")}, RuntimeError, "w_hh: expected dtype float64 as x has, got float32"),
    "rank": ({"x": np.zeros((4, 3))}, RuntimeError, r"x: expected 3 dimensions, got 2: shape \[4, 3\]"),
    "width": (
        {"w_ih": np.zeros((8, 4))},
        RuntimeError,
        r"x: expected shape \[T, B, I\] = \[4, 2, 4\], got \[4, 2, 3\]",
    ),
    "gates": ({"b_ih": np.zeros(7)}, RuntimeError, r"b_ih: expected shape \[4\*H\] = \[8\], got \[7\]"),
    "no steps": ({"x": np.zeros((0, 2, 3))}, RuntimeError, "x: expected at least one time step"),
    "state": (
        {"state": np.zeros((2, 2))},
        TypeError,
        r"state: expected None or a pair \(h, c\), got one numpy.ndarray",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name: str, backend: str) -> None:
    arguments: dict[str, Any] = {"x": np.zeros((4, 2, 3)), "state": None}
    arguments |= {"w_ih": np.zeros((8, 3)), "w_hh": np.zeros((8, 2)), "b_ih": np.zeros(8)}
    lstm_ext.lstm(**arguments)
    changes, error, message = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        lstm_ext.lstm(**(arguments | changes))


# Backends ------------------------------------------------------------------------------------------------------------


def test_use_backend_nests_and_names_what_is_available() -> None:
    x, w = np.zeros((2, 1, 1), np.int64), np.zeros((4, 1))
    with lstm_ext.use_backend("numpy"):
        assert engines.choose("cpu", torch.float32).name == "numpy"
        for name in BACKENDS:
            with lstm_ext.use_backend(name):
                assert engines.choose("cpu", np.dtype("float32")).name == name
        assert engines.choose("cpu", torch.float32).name == "numpy"
        with pytest.raises(RuntimeError, match="numpy: serves cpu tensors, not cuda"):
            engines.choose("cuda", torch.float32)
    with pytest.raises(ValueError, match="'numpy', got 'gpu'"), lstm_ext.use_backend("gpu"):
        pass
    if not lstm_ext.backends()["cuda"].available:
        assert lstm_ext.backends()["cuda"].reason
        with pytest.raises(RuntimeError, match=r"'cuda' is not available.*'numpy'"), lstm_ext.use_backend("cuda"):
            pass
    with pytest.raises(RuntimeError, match="int64"):
        lstm_ext.lstm(x, None, w, w)


@pytest.mark.parametrize("name", ["numpy", "nonsense"])
def test_environment_chooses_at_first_use(name: str) -> None:
    code = "import numpy as np, lstm_ext; w = np.zeros((4, 1)); lstm_ext.lstm(np.zeros((2, 1, 1)), None, w, w)"
    done = run_python("-c", code, LSTM_EXT_BACKEND=name)
    assert (done.returncode == 0) == (name == "numpy"), done.stderr
    assert name == "numpy" or "LSTM_EXT_BACKEND: expected one of the available backends" in done.stderr


def test_import_leaves_torch_alone_and_says_what_needs_it() -> None:
    code = """
import sys, lstm_ext
assert "torch" not in sys.modules
sys.modules["torch"] = None
try:
    lstm_ext.LSTM
except AttributeError as error:
    assert "needs PyTorch" in str(error)
else:
    raise AssertionError
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("without", ["_C", "torch"])
def test_report(without: str) -> None:
    code = f"import sys; sys.modules['{without}' if '{without}' == 'torch' else 'lstm_ext._C'] = None\n"
    done = run_python("-c", code + "from lstm_ext.__main__ import main; sys.exit(main())")
    assert done.returncode == (without == "_C"), done.stdout + done.stderr
    assert ("the CPU kernels are not in use" in done.stdout) == (without == "_C")
    assert "FAIL" not in done.stdout
    assert "pass  numpy, float32" in done.stdout


def test_modules_without_the_native_core_warn_once_and_are_right() -> None:
    code = """
import sys, warnings
sys.modules["lstm_ext._C"] = None
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lstm_ext
    stock, ours = torch.nn.LSTM(3, 4), lstm_ext.LSTM(3, 4)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(5, 2, 3)
    for _ in range(2):
        for a, b in ((m(x)[0].sum(), m) for m in (stock, ours)):
            a.backward()
assert ["lstm_ext computes in NumPy, slowly" in str(w.message) for w in caught] == [True], caught
for a, b in zip(stock.parameters(), ours.parameters()):
    torch.testing.assert_close(a.grad, b.grad)
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


# BasicLSTMCell -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forget_bias", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("state_is_tuple", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", torch.sin])
def test_basic_lstm_cell(forget_bias: float, state_is_tuple: bool, activation: Any) -> None:
    """Against the formula of TensorFlow 1 written in NumPy."""
    cell = lstm_ext.BasicLSTMCell(H, forget_bias, state_is_tuple, activation, dtype=torch.float64)
    x, c, h = torch.randn(B, I).double(), torch.randn(B, H).double(), torch.randn(B, H).double()
    h_new, state = cell(x, (c, h) if state_is_tuple else torch.cat([c, h], 1))
    assert cell.kernel.shape == (I + H, 4 * H)
    assert float(cell.kernel.detach().abs().max()) <= (6 / (I + H + 4 * H)) ** 0.5
    assert not cell.bias.any()

    function = {None: np.tanh, "relu": lambda a: np.maximum(a, 0), torch.sin: np.sin}[activation]
    z = np.concatenate([x, h], 1) @ cell.kernel.detach().numpy()
    i, j, f, o = np.split(z, 4, axis=1)
    new_c = c.numpy() * reference.sigmoid(f + forget_bias) + reference.sigmoid(i) * function(j)
    new_h = function(new_c) * reference.sigmoid(o)
    assert_close(h_new, new_h, "float64", terms=I + H)
    joined = torch.cat(state, 1) if state_is_tuple else state
    assert_close(joined, np.concatenate([new_c, new_h], 1), "float64", terms=I + H)
    assert torch.equal(cell(x)[0], cell(x, cell.zero_state(B))[0])
    with pytest.raises(ValueError, match="state"):
        cell(x, torch.zeros(B, 2 * H) if state_is_tuple else (c, h))
    with pytest.raises(ValueError, match=f"I = {I}"):
        cell(torch.randn(B, I + 1).double())


def test_basic_lstm_cell_is_lazy_about_its_input() -> None:
    """As torch's lazy modules: saved and loaded before or after it knows its input size."""
    cell, x = lstm_ext.BasicLSTMCell(H), torch.randn(B, I)
    fresh = pickle.loads(pickle.dumps(cell))
    known = lstm_ext.BasicLSTMCell(H, input_size=I)
    known.load_state_dict(cell.state_dict() | {"kernel": torch.randn(I + H, 4 * H)})
    fresh.load_state_dict(known.state_dict())
    assert torch.equal(fresh(x)[0], known(x)[0])
    cell.load_state_dict(known.state_dict())
    assert torch.equal(copy.deepcopy(cell)(x)[0], known(x)[0])
    cell(x)[0].sum().backward()
    assert cell.kernel.grad.shape == cell.kernel.shape
    assert cell.bias.grad.abs().sum() > 0
    assert str(lstm_ext.BasicLSTMCell(3, 0.5, name="cell")) == "BasicLSTMCell(3, forget_bias=0.5, name=cell)"
    assert str(lstm_ext.BasicLSTMCell(3, input_size=2)) == "BasicLSTMCell(3, input_size=2)"
    assert str(lstm_ext.BasicLSTMCell(3, activation=torch.relu)) == "BasicLSTMCell(3, activation=relu)"
    assert str(lstm_ext.BasicLSTMCell(3, activation="sigmoid")) == "BasicLSTMCell(3, activation=sigmoid)"
    assert (
        str(lstm_ext.BasicLSTMCell(3, activation=nn.ELU())) == "BasicLSTMCell(\n  3\n  (activation): ELU(alpha=1.0)\n)"
    )
    assert str(cell) == f"BasicLSTMCell({H}, input_size={I})"  # told once the first input has come
    with pytest.raises(ValueError, match="num_units"):
        lstm_ext.BasicLSTMCell(0)


def test_basic_lstm_cell_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"activation: expected a callable, one of tanh, .*in torch, got 'nope'"):
        lstm_ext.BasicLSTMCell(H, activation="nope")
    cell, x = lstm_ext.BasicLSTMCell(H), torch.randn(B, I)
    with pytest.raises(ValueError, match=r"input: expected shape \[B, I\], got \[3\]"):
        cell(torch.randn(3))
    assert cell.has_uninitialized_params()  # the refused input left no trace
    h, (c, _) = cell(x)
    with pytest.raises(ValueError, match=rf"input: expected shape \[B, I\] with I = {I}"):
        cell(torch.randn(B, I + 1))
    with pytest.raises(ValueError, match=rf"state\.c: expected shape \[B, num_units\] = \[{B}, {H}\], got \[1, {H}\]"):
        cell(x, (c[:1], h))
    with pytest.raises(ValueError, match=r"state: expected the pair \(c, h\), got Tensor"):
        cell(x, c)
    for name, args in {
        "input": (x.double(),),
        "input: ": (torch.ones(B, I, dtype=torch.int64),),
        "state.c": (x, (c.double(), h)),
        "state.h": (x, (c, h.double())),
    }.items():
        with pytest.raises(ValueError, match=rf"{name}.*expected dtype torch.float32 as the kernel has"):
            cell(*args)
    with pytest.raises(
        NotImplementedError, match=r"BasicLSTMCell: TorchScript cannot compile it; .* torch\.jit\.trace"
    ):
        torch.jit.script(cell)


@pytest.mark.parametrize("state_is_tuple", [True, False])
def test_basic_lstm_cell_has_what_tensorflows_has(state_is_tuple: bool) -> None:
    cell, x = lstm_ext.BasicLSTMCell(H, state_is_tuple=state_is_tuple), torch.randn(B, I)
    output, state = cell(x, cell.zero_state(B, torch.float32))
    assert cell.output_size == output.shape[1] == H
    if not state_is_tuple:
        assert cell.state_size == state.shape[1] == 2 * H
        assert cell.zero_state(B, torch.float64).dtype == torch.float64
        return
    assert isinstance(state, lstm_ext.LSTMStateTuple)
    assert state.h is output
    assert (state.c.shape[1], state.h.shape[1]) == cell.state_size == lstm_ext.LSTMStateTuple(c=H, h=H)
    assert {a.dtype for a in cell.zero_state(B, torch.float64)} == {torch.float64}
    traced = torch.jit.trace(cell, (x, state))
    assert_same(tensors(traced(x, state)), tensors(cell(x, state)))


# What is rare --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [False, True])
def test_shapes_alone_go_backward(cell: bool, backend: str) -> None:
    _, module = pair(I, H, cell=cell, device="meta")
    x = torch.randn(*(() if cell else (T,)), B, I, device="meta", requires_grad=True)
    tensors(module(x))[0].sum().backward()
    assert x.grad.is_meta
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("grad", [False, True])
def test_a_cell_takes_what_only_torch_takes(grad: bool) -> None:
    """A c of another dtype, and a sparse input; with gradients and without."""
    stock, ours = pair(I, H, cell=True)
    x, h, c = torch.randn(B, I), torch.randn(B, H), torch.randn(B, H)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for arguments in ((x, (h, c.double())), (x.to_sparse(), (h, c)), (x.to_sparse(), None)):
            for actual, expected in zip(ours(*arguments), stock(*arguments), strict=True):
                assert actual.dtype == expected.dtype
                torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_state_of_another_rank_is_refused_as_by_stock(rank: int, mapped: bool) -> None:
    x, state = torch.randn(2, B, I), torch.randn([1, B, H][3 - rank :])
    for module in pair(I, H, cell=True):
        call = torch.vmap(module, in_dims=(0, None)) if mapped else module
        with pytest.raises(RuntimeError if rank == 1 else ValueError):
            call(x if mapped else x[0], (state, state))


def test_compiled_autograd_takes_eager_calls() -> None:
    from torch._dynamo import compiled_autograd

    stock, ours = pair(I, H)
    x = torch.randn(T, B, I)
    for module in (stock, ours):
        loss = module(x)[0].square().sum()
        with compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in stock.parameters()])


def test_a_compiled_function_warns_of_nothing() -> None:
    weights = [torch.randn(4 * H, width) for width in (I, H)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(lambda x: lstm_ext.lstm(x, None, *weights)[0], backend="eager", fullgraph=True)
        assert compiled(torch.randn(T, B, I)).shape == (T, B, H)
