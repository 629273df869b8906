"""`freeze`: frozen modules against those they came from, narrow weights, and what is refused."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import lstm_ext
from lstm_ext import _native
from lstm_ext.frozen import Frozen
from lstm_ext.frozen_stack import dequantized, quantized

from .conftest import needs_native
from .test_process import run_python

TOLERANCES = {
    "float32": {"rtol": 1e-5, "atol": 2e-6},
    "float64": {"rtol": 1e-12, "atol": 1e-13},
    "bfloat16": {"rtol": 2e-2, "atol": 1e-2},
    "float16": {"rtol": 2e-3, "atol": 1e-3},
}

# One line an option, and all together; of those that have no bound int8 is not packed.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hard": {"recurrent_activation": "hard_sigmoid", "activation": "softsign"},
    "relu": {"activation": "relu", "cell_clip": 0.5},
    "forget_bias": {"forget_bias": 1.0},
    "peephole": {"peephole": True, "coupled": True},
    "norm": {"layer_norm": True, "forget_bias": 0.5},
    "zoneout": {"zoneout": (0.2, 0.3), "recurrent_dropout": 0.5, "weight_drop": 0.5, "candidate_dropout": 0.5},
    "clips": {"cell_clip": 0.2, "proj_clip": 0.05},
}


def draw_module(rng: np.random.Generator, dtype: str = "float32", **fixed: Any) -> Any:
    """An LSTM of random sizes and options, its weights larger than torch draws them."""
    options = {
        "input_size": int(rng.choice([1, 3, 8, 17, 40])),
        "hidden_size": int(rng.choice([1, 2, 5, 8, 15, 16, 17, 33, 64, 130])),
        "num_layers": int(rng.integers(1, 4)),
        "bias": bool(rng.random() < 0.7),
        "batch_first": bool(rng.random() < 0.5),
        "dropout": 0.5,
        "bidirectional": bool(rng.random() < 0.4),
    }
    options["proj_size"] = (
        int(rng.integers(1, options["hidden_size"])) if options["hidden_size"] > 2 and rng.random() < 0.4 else 0
    )
    options |= fixed
    if not options["proj_size"]:
        options.pop("proj_clip", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dropout of one layer
        module = lstm_ext.LSTM(**options, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(1.5)
    return module.eval()


def draw_call(rng: np.random.Generator, module: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """An input for it, a state and masks."""
    T, B = int(rng.integers(1, 9)), int(rng.choice([0, 1, 1, 2, 4, 7, 19]))
    dtype, sizes = module.weight_hh_l0.dtype, (B, T) if module.batch_first else (T, B)
    x = torch.from_numpy(rng.standard_normal((*sizes, module.input_size))).to(dtype)
    call: dict[str, Any] = {}
    if rng.random() < 0.6:
        states = module.num_layers * (2 if module.bidirectional else 1)
        widths = module.proj_size or module.hidden_size, module.hidden_size
        call["hx"] = tuple(torch.from_numpy(rng.standard_normal((states, B, n))).to(dtype) for n in widths)
    if rng.random() < 0.4:
        call["lengths"] = torch.from_numpy(rng.integers(0, T + 1, B))
    if rng.random() < 0.4:
        call["resets"] = torch.from_numpy(rng.random(sizes) < 0.3)
    return x, call


def flat(outputs: Any) -> list[torch.Tensor]:
    y, (h, c) = outputs
    return [torch.as_tensor(a) for a in (y, h, c)]


def assert_close(actual: Any, expected: Any, dtype: str = "float32", **tolerance: float) -> None:
    for ours, theirs in zip(flat(actual), flat(expected), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), **(tolerance or TOLERANCES[dtype]))


def assert_same(actual: Any, expected: Any) -> None:
    for ours, theirs in zip(flat(actual), flat(expected), strict=True):
        assert torch.equal(ours, theirs)


# The same as the module ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_frozen_computes_what_the_module_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dtype = rng.choice(["float32"] * 5 + ["float64", "bfloat16", "float16"])
    name = list(OPTIONS)[seed % len(OPTIONS)] if seed % 2 else "plain"
    module = draw_module(rng, dtype, **OPTIONS[name])
    frozen = lstm_ext.freeze(module)
    assert (frozen.weights, frozen.dtype) == (dtype, module.weight_hh_l0.dtype)
    assert frozen.engine == (f"cpu, packed {dtype}" if _native.C else frozen.engine)
    for _ in range(3):
        x, call = draw_call(rng, module)
        with torch.no_grad():
            expected = module(x, **call)
        assert_close(frozen(x, **call), expected, dtype)
        if dtype != "bfloat16":
            arrays = {k: tuple(a.numpy() for a in v) if k == "hx" else v.numpy() for k, v in call.items()}
            of_arrays = frozen(x.numpy(), **arrays)
            assert isinstance(of_arrays[0], np.ndarray)
            assert isinstance(of_arrays[1][1], np.ndarray)
            assert_same(of_arrays, frozen(x, **call))


def with_weights(module: Any, frozen: Frozen) -> Any:
    """A copy of the module with the weights that the frozen one has stored."""
    stored = copy.deepcopy(module)
    names = [name for own in module._all_weights for name in own]
    for name, a in zip(names, dequantized(frozen._tensors, frozen._spec), strict=True):
        getattr(stored, name).data.copy_(a)
    return stored


@needs_native
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("seed", range(24))
def test_narrow_weights_are_multiplied_as_they_are_stored(seed: int, weights: str) -> None:
    """Against the module with the same weights: floats times bfloat16 are exact; integers of h and x round them."""
    rng = np.random.default_rng(seed)
    name = list(OPTIONS)[seed % len(OPTIONS)]
    options = {k: v for k, v in OPTIONS[name].items() if k != "forget_bias"}  # it is part of the bias
    module = draw_module(rng, **options)
    frozen = lstm_ext.freeze(module, weights)
    packed = weights == "bfloat16" or name != "relu"
    assert frozen.engine.startswith("cpu, packed" if packed else "cpu, not packed: int8 needs activations with a bound")
    stored = with_weights(module, frozen)
    for _ in range(3):
        x, call = draw_call(rng, module)
        with torch.no_grad():
            expected = stored(x, **call)
        tolerance = TOLERANCES["float32"] if weights == "bfloat16" else {"rtol": 1e-3, "atol": 1e-3}
        if weights == "int8" and name == "norm":  # small sums are made large
            tolerance = {"rtol": 0, "atol": 0.06}
        assert_close(frozen(x, **call), expected, **tolerance)


def int8_step(x: Any, h: Any, c: Any, largest_h: float, weights: list[Any]) -> tuple[Any, Any]:
    """A step as narrow.h has it, in float64."""
    (w_ih, s_ih, w_hh, s_hh, b_ih, b_hh) = weights

    def integers(a: Any, largest: Any, most: int) -> tuple[Any, Any]:
        K = a.shape[-1]
        scale = np.float32(largest) / np.float32(min(most, (2**31 - 1) // (127 * K)))
        return np.rint(a.astype(np.float32) / scale), scale

    qx, sx = integers(x, np.abs(x).max(-1, keepdims=True), 127 if x.shape[-1] >= 128 else 32766)
    qh, sh = integers(h, largest_h, 32766)
    gates = (qx @ w_ih.T.astype(float)) * sx * s_ih + (qh @ w_hh.T.astype(float)) * sh * s_hh + b_ih + b_hh
    i, f, g, o = np.split(gates, 4, -1)
    i, f, o = (1 / (1 + np.exp(-a)) for a in (i, f, o))
    c = f * c + i * np.tanh(g)
    return o * np.tanh(c), c


@needs_native
@pytest.mark.parametrize(("I", "H"), [(1, 1), (3, 17), (40, 100), (7, 600), (127, 20), (128, 20), (301, 130)])
def test_int8_is_the_arithmetic_that_is_told(I: int, H: int) -> None:  # noqa: E741
    module = lstm_ext.LSTM(I, H)
    frozen = lstm_ext.freeze(module, "int8")
    x = torch.randn(6, 3, I)
    y, (_, c_n) = frozen(x)
    h = c = np.zeros((3, H))
    weights = [a.double().numpy() for a in frozen._tensors]
    for t, step in enumerate(x.numpy()):
        h, c = int8_step(step, h, c, 1.0, weights)
        np.testing.assert_allclose(y[t], h, rtol=0, atol=1e-5)
    np.testing.assert_allclose(c_n[0], c, rtol=0, atol=2e-5)


LEVELS = """
import json, numpy as np, torch, lstm_ext
rng, found = np.random.default_rng(7), []
torch.manual_seed(0)
for I, H, P in ((3, 5, 0), (17, 33, 9), (40, 130, 0), (203, 20, 0)):
    module = lstm_ext.LSTM(I, H, 2, proj_size=P, bidirectional=True)
    x = torch.from_numpy(rng.standard_normal((5, 4, I)).astype("float32"))
    for weights in ("float32", "bfloat16", "int8"):
        found.append(lstm_ext.freeze(module, weights)(x)[0].flatten().tolist())
print(json.dumps(found))
"""


@needs_native
def test_simd_levels_agree() -> None:
    """Of int8 the sums have the same bits; what follows them rounds as each level does."""
    levels = lstm_ext.build_info()["simd_available"]
    results = {}
    for level in levels:
        done = run_python("-c", LEVELS, LSTM_EXT_SIMD=level)
        assert done.returncode == 0, done.stderr
        results[level] = json.loads(done.stdout)
    for level in levels:
        for ours, theirs in zip(results[level], results[levels[0]], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=level)


def test_forms_of_input() -> None:
    module = lstm_ext.LSTM(5, 9, 2, bidirectional=True)
    frozen = lstm_ext.freeze(module)
    rows = [torch.randn(n, 5) for n in (3, 6, 1)]
    packed = pack_sequence(rows, enforce_sorted=False)
    state = torch.randn(4, 3, 9), torch.randn(4, 3, 9)
    for hx in (None, state):
        (y, (h, c)), (ry, (rh, rc)) = frozen(packed, hx), module(packed, hx)
        assert torch.equal(y.batch_sizes, ry.batch_sizes)
        assert torch.equal(y.unsorted_indices, ry.unsorted_indices)
        torch.testing.assert_close(y.data, ry.data)
        torch.testing.assert_close((h, c), (rh, rc))
    x, hx = torch.randn(6, 5), (torch.randn(4, 9), torch.randn(4, 9))
    assert_close(frozen(x, hx), module(x, hx))
    resets = torch.tensor([False, True, False, False, True, False])
    assert_close(frozen(x, hx, resets=resets), module(x, hx, resets=resets))
    padded = torch.randn(6, 3, 5)
    assert_close(frozen(padded, lengths=[6, 2, 0]), module(padded, lengths=[6, 2, 0]))
    with pytest.raises(ValueError, match="lengths, resets: expected a padded input"):
        frozen(pack_padded_sequence(padded, torch.tensor([6, 2, 1])), lengths=torch.tensor([1, 1, 1]))


@pytest.mark.parametrize("weights", [None, "bfloat16", "int8"])
def test_cells(weights: str | None) -> None:
    x = torch.randn(4, 7)
    for cls in (torch.nn.LSTMCell, lstm_ext.LSTMCell):
        cell = cls(7, 19)
        frozen = lstm_ext.freeze(cell, weights)
        hx = torch.randn(4, 19), torch.randn(4, 19)
        tolerance = {} if weights is None else {"rtol": 0, "atol": 2e-2}
        for state in (None, hx):
            torch.testing.assert_close(frozen(x, state), cell(x, state), **tolerance)
        torch.testing.assert_close(frozen(x[0]), cell(x[0]), **tolerance)
    resets = torch.tensor([True, False, True, False])
    assert torch.equal(frozen(x, hx, resets=resets)[0][::2], frozen(x)[0][::2])


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"state_is_tuple": False}])
def test_tensorflow_cells(options: dict[str, Any]) -> None:
    cells: list[Any] = [lstm_ext.BasicLSTMCell(19, input_size=7, **options)]
    if "state_is_tuple" not in options:
        cells += [lstm_ext.LayerNormBasicLSTMCell(19, input_size=7, layer_norm=n, **options) for n in (True, False)]
    x = torch.randn(4, 7)
    for cell in cells:
        cell.eval()
        frozen, state = lstm_ext.freeze(cell), None
        for _ in range(3):
            with torch.no_grad():
                expected, new = cell(x, state)
            output, ours = frozen(x, state)
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close(ours, new)
            assert type(ours) is type(new)
            state = new
    with pytest.raises(TypeError, match="weights are not made yet"):
        lstm_ext.freeze(lstm_ext.BasicLSTMCell(4))
    with pytest.raises(TypeError, match="function of its own"):
        lstm_ext.freeze(lstm_ext.BasicLSTMCell(4, input_size=3, activation=torch.sin))


@pytest.mark.parametrize("weights", [None, "bfloat16", "int8"])
def test_plans_change_little(weights: str | None) -> None:
    """Chunks, threads and rows of their own; a plan that reads in place is for others."""
    module = lstm_ext.LSTM(20, 70, 2, bidirectional=True)
    frozen, x = lstm_ext.freeze(module, weights), torch.randn(9, 11, 20)
    expected = frozen(x)
    ways: list[dict[str, Any]] = [{"chunk_steps": 2}, {"chunk_steps": 1, "threads": 1}, {"threads": 2, "by_rows": True}]
    for way in [*ways, {"threads": 3, "by_rows": False}, {"depth": 16}, {"in_place": True}]:
        with lstm_ext.engines.cpu.use_plan(**way):
            assert_same(frozen(x), expected)


@needs_native
@pytest.mark.parametrize("H", [1, 4, 5, 8, 9, 16, 17, 24, 33, 64, 96])
@pytest.mark.parametrize("I", [1, 4, 5])
def test_one_sequence_of_a_narrow_layer(I: int, H: int) -> None:  # noqa: E741
    """Steps with several sums for each gate: as the module has them, and the same bits in whatever blocks they come."""
    module = draw_module(
        np.random.default_rng(H),
        input_size=I,
        hidden_size=H,
        num_layers=2,
        proj_size=0,
        batch_first=False,
        bidirectional=False,
    )
    frozen, x = lstm_ext.freeze(module), torch.randn(50, 1, I)
    assert all(each.alone for each in lstm_ext.plan(50, 1, frozen))
    with torch.no_grad():
        x[3] *= 100  # gates far from 0
        assert_close(frozen(x), module(x))
    stream = frozen.stream()
    assert torch.equal(torch.cat([stream(piece) for piece in x.split([1, 7, 42])]), frozen(x)[0])
    with lstm_ext.engines.cpu.use_plan(threads=3, by_rows=False, chunk_steps=4):
        assert_same(frozen(x), (frozen(x)[0], stream.state))
    both = draw_module(
        np.random.default_rng(H), input_size=I, hidden_size=H, bidirectional=True, proj_size=0, batch_first=False
    )
    with torch.no_grad():
        assert_close(lstm_ext.freeze(both)(x), both(x))
    spoilt = x.clone()
    spoilt[20] = float("nan")
    assert frozen(spoilt)[0][20:].isnan().all()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("num_layers", [2, 3])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("T", "B", "H", "options"),
    [
        (200, 1, 24, {}),
        (77, 1, 64, {"batch_first": True}),
        (61, 2, 33, {"proj_size": 20}),
        (90, 2, 40, {"peephole": True, "activation": "softsign"}),
    ],
)
def test_layers_at_work_at_the_same_time_change_no_bit(
    T: int, B: int, H: int, options: dict[str, Any], weights: str, num_layers: int
) -> None:
    module = lstm_ext.LSTM(11, H, num_layers, **options)
    frozen = lstm_ext.freeze(module, weights)
    first = options.get("batch_first", False)
    x, resets = (
        (torch.randn(B, T, 11), torch.rand(B, T) < 0.1) if first else (torch.randn(T, B, 11), torch.rand(T, B) < 0.1)
    )
    state = torch.randn(num_layers, B, options.get("proj_size") or H), torch.randn(num_layers, B, H)
    plans = lstm_ext.plan(T, B, frozen, num_threads=2)
    assert all("beside other layers" in each.why["threads"] and each.threads == 1 for each in plans)
    for given in ({}, {"resets": resets}):
        with threads(1):
            expected = frozen(x, state, **given)
        for count in (2, 5):
            with threads(count):
                assert_same(frozen(x, state, **given), expected)
    with threads(2):
        stream = frozen.stream(B)
        stream.state = state
        pieces = [stream(piece) for piece in x.split([1, T - 1 - T // 3, T // 3], 1 if first else 0)]
    with threads(1):
        assert_same((torch.cat(pieces, 1 if first else 0), stream.state), frozen(x, state))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_threads_change_no_bit_of_layers_of_other_dtypes(dtype: torch.dtype) -> None:
    frozen, x = lstm_ext.freeze(lstm_ext.LSTM(11, 24, 2, dtype=dtype)), torch.randn(200, 1, 11, dtype=dtype)
    with threads(1):
        expected = frozen(x)
    with threads(2):
        assert_same(frozen(x), expected)


@needs_native
def test_layers_that_do_not_work_at_the_same_time() -> None:
    def said(T: int, *module: Any, weights: str | None = None, num_threads: int = 2, **options: Any) -> str:
        frozen = lstm_ext.freeze(lstm_ext.LSTM(*module, **options), weights)
        return str(lstm_ext.plan(T, 1, frozen, num_threads=num_threads)[0].why["threads"])

    assert "beside other layers" in said(100, 11, 40, 2)
    for other in (said(100, 11, 40), said(2, 11, 40, 2), said(100, 11, 40, 2, num_threads=1), said(100, 11, 300, 2)):
        assert "beside other layers" not in other
    assert "beside other layers" not in said(100, 11, 40, 2, weights="int8")
    assert "beside other layers" not in said(100, 11, 40, 2, bidirectional=True)
    assert "beside other layers" not in said(100, 11, 40, 2, dtype=torch.bfloat16)  # c would be rounded between blocks
    assert "beside other layers" not in said(1000, 1000, 64, 2)  # the first layer has nearly all of the work


def test_the_plan_of_a_frozen_module() -> None:
    frozen = lstm_ext.freeze(lstm_ext.LSTM(20, 300, 2))
    plans = lstm_ext.plan(100, 4, frozen, num_threads=1)
    assert [each.in_place for each in plans] == [(False,) * 3] * 2
    assert not any(each.alone for each in plans)
    with pytest.raises(RuntimeError, match=r"expected at most 2\*\*52 numbers in an array"):
        lstm_ext.plan(2**40, 2**40, frozen)
    with pytest.raises(RuntimeError, match="plan: FrozenLSTM is not packed: int8 needs activations with a bound"):
        lstm_ext.plan(1, 1, lstm_ext.freeze(lstm_ext.LSTM(3, 4, activation="relu"), "int8"))


# Accuracy and bad input ----------------------------------------------------------------------------------------------


def learned_text(units: int) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """Layers and a head that have learned to tell the next character of a text: x [T, B, units] and ids [T, B]."""
    text = ("the state of a cell goes on from step to step and the gates say what is kept of it. " * 4)[:256]
    ids = torch.tensor([ord(letter) % 32 for letter in text]).reshape(8, 32).T  # [T, B]
    torch.manual_seed(0)
    x = torch.randn(32, units)[ids]
    lstm, head = lstm_ext.LSTM(units, units, 2), torch.nn.Linear(units, 32)
    optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], 0.5 / units)
    with threads(1):  # many small steps: more threads wait for each other where the cores are busy
        for _ in range(100):
            loss = torch.nn.functional.cross_entropy(head(lstm(x[:-1])[0]).flatten(0, 1), ids[1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss < 1
    return lstm, head, x, ids


@needs_native
@pytest.mark.filterwarnings("ignore")  # torch means to move quantize_dynamic elsewhere
@pytest.mark.parametrize("units", [48, 136])  # whose inputs have 16 bits, and 8
def test_int8_is_no_less_accurate_than_torchs(units: int) -> None:
    lstm, head, x, _ = learned_text(units)
    with torch.no_grad():
        exact = copy.deepcopy(lstm).double()(x.double())[0]
        stock = lstm_ext.to_torch(copy.deepcopy(lstm))
        theirs = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(stock), {torch.nn.LSTM})(x)[0]
        frozen = lstm_ext.freeze(lstm, "int8")
        ours = frozen(x)[0]
        same = (head(ours).argmax(-1) == head(exact.float()).argmax(-1)).float().mean()
    error, torchs = (ours - exact).abs(), (theirs - exact).abs()
    assert error.max() <= torchs.max()
    assert error.mean() <= torchs.mean()
    assert same > 0.99


def test_quantized_weights() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-3, 0.0, 3e-4]])
    integers, scale = quantized("w", weight)
    assert integers.tolist() == [[64, -127, 32], [0, 0, 0], [127, 0, 38]]
    torch.testing.assert_close(scale[[0, 2]], torch.tensor([2 / 127, 1e-3 / 127]))
    for spoilt in (float("nan"), float("inf")):
        module = lstm_ext.LSTM(3, 4)
        module.weight_hh_l0.data[3, 1] = spoilt
        with pytest.raises(ValueError, match="weight_hh_l0: expected finite weights for int8"):
            lstm_ext.freeze(module, "int8")


def test_bad_arguments() -> None:
    module = lstm_ext.LSTM(3, 4, 2)
    with pytest.raises(ValueError, match="weights: expected None, 'float32', 'bfloat16', 'int8', got 'int4'"):
        lstm_ext.freeze(module, "int4")
    for weights in (None, "int8"):
        frozen = lstm_ext.freeze(module, weights)
        x = torch.zeros(5, 2, 3)
        with pytest.raises(RuntimeError, match="x: expected dtype float32 as the frozen weights have, got float64"):
            frozen(x.double())
        with pytest.raises(RuntimeError, match=r"x: expected shape \[T, B, I\] = \[5, 2, 3\], got \[5, 2, 4\]"):
            frozen(torch.zeros(5, 2, 4))
        with pytest.raises(RuntimeError, match=r"h0: expected shape \[L\*D, B, P\] = \[2, 2, 4\], got \[2, 3, 4\]"):
            frozen(x, (torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)))
        with pytest.raises(RuntimeError, match=r"c0: expected shape \[L\*D, B, H\] = \[2, 2, 4\], got \[1, 2, 4\]"):
            frozen(x, (torch.zeros(2, 2, 4), torch.zeros(1, 2, 4)))
        with pytest.raises(TypeError, match="hx: expected a pair"):
            frozen(x, torch.zeros(2, 2, 4))
        with pytest.raises(ValueError, match="lengths: expected values from 0 to T = 5"):
            frozen(x, lengths=torch.tensor([1, 6]))
        with pytest.raises(TypeError, match="resets: expected dtype bool"):
            frozen(x, resets=torch.zeros(5, 2))
        with pytest.raises(ValueError, match="input: expected 2 or 3 dimensions"):
            frozen(x[None])
        with pytest.raises(TypeError, match=r"input: expected a numpy.ndarray or torch.Tensor, got list"):
            frozen([1.0])
        with pytest.raises(TypeError, match=r"h0: expected a torch.Tensor as x is, got list"):
            frozen(x, ([0.0], [0.0]))
        with pytest.raises(TypeError, match=r"resets: expected a torch.Tensor as x is, got object"):
            frozen(x, resets=object())
        with pytest.raises(RuntimeError, match="h0: expected 2 dimensions beside an input without a batch, got 3"):
            frozen(x[:, 0], (torch.zeros(2, 1, 4), torch.zeros(2, 1, 4)))
        with pytest.raises(RuntimeError, match="T = 0"):
            frozen(x[:0])
    with pytest.raises(ValueError, match="input: expected 1 or 2 dimensions"):
        lstm_ext.freeze(lstm_ext.LSTMCell(3, 4))(torch.zeros(1, 2, 3))
    with pytest.raises(TypeError, match=r"input: expected a numpy.ndarray or torch.Tensor, got list"):
        lstm_ext.freeze(lstm_ext.LSTMCell(3, 4))([1.0])
    joined = lstm_ext.freeze(lstm_ext.BasicLSTMCell(4, input_size=3, state_is_tuple=False))
    for state, kind in (
        (torch.zeros(2, 7), r"\[B, 2\*num_units\] with 8, got \[2, 7\]"),
        ([1.0], "a torch.Tensor as x is"),
    ):
        with pytest.raises((RuntimeError, TypeError), match=f"state: expected (shape )?{kind}"):
            joined(torch.zeros(2, 3), state)


@needs_native
@pytest.mark.parametrize("options", [{}, {"proj_size": 7}, {"layer_norm": True}], ids=["plain", "projection", "norm"])
def test_a_row_with_nan_stays_by_itself(options: dict[str, Any]) -> None:
    """int8 rows that meet NaN or infinity are NaN from there on, until a reset; the others do not see it."""
    torch.manual_seed(0)
    frozen, x = lstm_ext.freeze(lstm_ext.LSTM(3, 20, **options), "int8"), torch.randn(6, 4, 3)
    h0, c0 = torch.zeros(1, 4, options.get("proj_size", 20)), torch.zeros(1, 4, 20)
    expected, others = frozen(x, (h0, c0))[0], [0, 2, 3]
    resets = torch.zeros(6, 4, dtype=torch.bool)
    resets[4, 1] = True
    spoilt_x, spoilt_h0, spoilt_c0 = x.clone(), h0.clone(), c0.clone()
    for spoiler in (float("nan"), float("inf")):
        spoilt_x[2, 1, 0] = spoilt_h0[0, 1, 2] = spoiler
        spoilt_c0[0, 1, 3] = float("nan")  # of an infinite c the output is finite
        for first, given in (
            (2, (spoilt_x, (h0, c0))),
            (0, (x, (spoilt_h0, c0))),
            (1, (x, (h0, spoilt_c0))),  # of step 0 one unit
        ):
            y = frozen(*given)[0]
            assert torch.equal(y[:, others], expected[:, others])
            assert y[first:, 1].isnan().all()
            if first == 2:
                assert torch.equal(y[:2], expected[:2])
            y = frozen(*given, resets=resets)[0]
            assert y[first:4, 1].isnan().all()
            assert y[4:].isfinite().all()


@needs_native
def test_the_core_refuses_what_does_not_fit() -> None:
    w, s = [np.zeros((8, 3), np.int8), np.zeros((8, 2), np.int8)], [np.zeros(8, np.float32)] * 2
    C = _native.C
    directions = lstm_ext.call.FORWARD
    C.Frozen([(w, s, None)], directions, "float32", "int8")
    for layers, dtype, storage, message in (
        ([], "float32", "plain", "at least one"),
        ([(w, s, None)], "float32", "int4", "storage: expected plain, bfloat16 or int8"),
        ([(w, s, None)], "float64", "int8", "another dtype than float32"),
        ([(w, s[:1], None)], "float32", "int8", "scales: expected 2"),
        ([(w, [s[0], s[0][:7]], None)], "float32", "int8", "scales: expected shape"),
        ([(w, s, None)], "float32", "plain", "w_ih: expected dtype float32"),
        ([(w, s, None), (w, s, None)], "float32", "int8", "what the one before gives"),
        ([([], [], None)], "float32", "plain", "weights: expected some"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            C.Frozen(layers, directions, dtype, storage)
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        C.Stream(None, ())
