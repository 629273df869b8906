"""`freeze`: frozen modules against those they came from, streams, narrow weights, and that nothing changes them."""

from __future__ import annotations

import copy
import io
import json
import pickle
import threading
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import lstm_ext
from lstm_ext import _native, frozen_stack
from lstm_ext.frozen import Frozen, Stream
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
            assert isinstance(of_arrays[0], np.ndarray) and isinstance(of_arrays[1][1], np.ndarray)
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

    def integers(a: Any, largest: Any, K: int) -> tuple[Any, Any]:
        scale = np.float32(largest) / np.float32(min(32766, (2**31 - 1) // (127 * K)))
        return np.rint(a.astype(np.float32) / scale), scale

    qx, sx = integers(x, np.abs(x).max(-1, keepdims=True), x.shape[-1])
    qh, sh = integers(h, largest_h, h.shape[-1])
    gates = (qx @ w_ih.T.astype(float)) * sx * s_ih + (qh @ w_hh.T.astype(float)) * sh * s_hh + b_ih + b_hh
    i, f, g, o = np.split(gates, 4, -1)
    i, f, o = (1 / (1 + np.exp(-a)) for a in (i, f, o))
    c = f * c + i * np.tanh(g)
    return o * np.tanh(c), c


@needs_native
@pytest.mark.parametrize(("I", "H"), [(1, 1), (3, 17), (40, 100), (7, 600)])  # noqa: E741
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
for I, H, P in ((3, 5, 0), (17, 33, 9), (40, 130, 0)):
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
        assert torch.equal(y.batch_sizes, ry.batch_sizes) and torch.equal(y.unsorted_indices, ry.unsorted_indices)
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


# Streams -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_a_stream_goes_on(weights: str, batch_first: bool, backend: str) -> None:
    module = lstm_ext.LSTM(6, 21, 2, batch_first=batch_first, proj_size=5)
    frozen, axis = lstm_ext.freeze(module, weights), 1 if batch_first else 0
    x = torch.randn((3, 10, 6) if batch_first else (10, 3, 6))
    resets = torch.rand(x.shape[:2]) < 0.2
    with lstm_ext.use_backend(backend):
        y, state = frozen(x, resets=resets)
        stream, arrays = frozen.stream(3), frozen.stream(3)
        pieces, of_arrays = [], []
        for piece, new in zip(x.split([1, 4, 2, 3], axis), resets.split([1, 4, 2, 3], axis), strict=True):
            pieces.append(stream(piece, resets=new))
            out = np.full(pieces[-1].shape, np.nan, np.float32)
            assert arrays(piece.numpy(), out=out, resets=new.numpy()) is out
            of_arrays.append(out)
        exact = {"rtol": 0, "atol": 0} if backend == "cpu" else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(torch.cat(pieces, axis), y, **exact)
        torch.testing.assert_close(stream.state, state, **exact)
        torch.testing.assert_close(torch.from_numpy(np.concatenate(of_arrays, axis)), y, **exact)
        stream.reset()
        torch.testing.assert_close(stream(x, resets=resets), y, **exact)


def test_the_state_of_a_stream() -> None:
    frozen = lstm_ext.freeze(lstm_ext.LSTM(3, 8, 2))
    stream, x = frozen.stream(4), torch.randn(5, 4, 3)
    stream(x)
    h, c = stream.state
    assert h.shape == c.shape == (2, 4, 8) and h.any()
    h.zero_()  # a copy
    assert stream.state[0].any()
    for rows in (1, [0, 3], torch.tensor([False, False, True, False])):
        before = stream.state
        stream.reset(rows)
        picked = torch.zeros(4, dtype=torch.bool)
        picked[rows] = True
        for old, new in zip(before, stream.state, strict=True):
            assert not new[:, picked].any() and torch.equal(new[:, ~picked], old[:, ~picked])
    stream.state = (torch.ones(2, 4, 8), np.ones((2, 4, 8), np.float32))
    expected, _ = frozen(x, (torch.ones(2, 4, 8), torch.ones(2, 4, 8)))
    assert torch.equal(stream(x), expected)
    y = stream(x, lengths=torch.tensor([0, 2, 5, 1]))
    assert not y[2:, 1].any() and y[1, 1].any()
    one = frozen.stream()
    assert one(x[:, 0]).shape == (5, 8)
    assert "batch_size=4" in repr(stream)


def test_a_stream_of_a_cell() -> None:
    cell = lstm_ext.LSTMCell(3, 8)
    frozen, state = lstm_ext.freeze(cell), None
    stream = frozen.stream(2)
    for x in torch.randn(4, 2, 3):
        state = cell(x, state)
        torch.testing.assert_close(stream(x), state[0].detach())


@needs_native
def test_a_stream_allocates_nothing() -> None:
    stream = lstm_ext.freeze(lstm_ext.LSTM(1, 24, 2)).stream()
    x, out = np.zeros((64, 1, 1), np.float32), np.empty((64, 1, 24), np.float32)
    for _ in range(3):
        stream(x, out=out)
    tracemalloc.start()
    try:
        stream(x, out=out)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(50):
            stream(x, out=out)
        assert tracemalloc.get_traced_memory()[1] - before < 512  # an int or a frame of Python's own
    finally:
        tracemalloc.stop()


def stream_of(weights: Any = None, batch_size: int = 2, **options: Any) -> Stream:
    stream: Stream = lstm_ext.freeze(lstm_ext.LSTM(3, 4, **options), weights).stream(batch_size)
    return stream


def test_what_a_stream_refuses() -> None:
    stream = stream_of()
    x, memory = np.zeros((5, 2, 3), np.float32), np.zeros((5, 2, 6), np.float32)
    out = np.zeros((5, 2, 4), np.float32)
    with pytest.raises(RuntimeError, match="batch of 2 as the stream has, got 3"):
        stream(np.zeros((5, 3, 3), np.float32))
    with pytest.raises(RuntimeError, match=r"out: expected shape \[5, 2, 4\], got \[5, 2, 3\]"):
        stream(x, out=out[..., :3])
    with pytest.raises(RuntimeError, match="out: expected dtype float32 as x has, got float64"):
        stream(x, out=out.astype(float))
    with pytest.raises(TypeError, match=r"out: expected numpy.ndarray as x is, got torch.Tensor"):
        stream(x, out=torch.zeros(5, 2, 4))
    with pytest.raises(ValueError, match="out: expected memory apart from that of x"):
        stream(memory[..., :3], out=memory[..., 2:])
    with pytest.raises(ValueError, match="out: expected rows of adjacent"):
        stream(x, out=np.lib.stride_tricks.as_strided(out, (5, 2, 4), (0, 16, 4)))
    with pytest.raises(ValueError, match="out: expected rows of adjacent"):
        stream(x, out=np.zeros((5, 2, 8), np.float32)[..., ::2])
    out.setflags(write=False)
    with pytest.raises(ValueError, match="out: expected a writable array"):
        stream(x, out=out)
    with pytest.raises(RuntimeError, match="x: expected dtype float32 as the frozen weights have, got float64"):
        stream(x.astype(float))
    with pytest.raises(RuntimeError, match="3 dimensions in a stream of 2 sequences"):
        stream(x[:, 0])
    with pytest.raises(TypeError, match="x: expected a torch.Tensor or numpy.ndarray"):
        stream([1.0])  # type: ignore[type-var]
    with pytest.raises(RuntimeError, match=r"state, h: expected shape \[1, 2, 4\]"):
        stream.state = torch.zeros(1, 3, 4), torch.zeros(1, 2, 4)
    with pytest.raises(TypeError, match="state: expected a pair"):
        stream.state = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="one direction"):
        stream_of(bidirectional=True)
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        stream_of(batch_size=0)
    assert not stream.state[1].any()  # nothing of all that has counted


@needs_native
def test_a_stream_is_one_callers() -> None:
    stream, x = stream_of(), torch.zeros(5, 2, 3)
    stream._native.hold()
    for use in (lambda: stream(x), stream.reset, lambda: stream.state):
        with pytest.raises(RuntimeError, match="another thread is using it"):
            use()
    stream._native.release()
    stream(x)
    with pytest.raises(RuntimeError, match="batch of 2"):  # and an error leaves it
        stream(torch.zeros(5, 1, 3))
    stream(x)


def test_many_threads_use_one_module() -> None:
    frozen, x = lstm_ext.freeze(lstm_ext.LSTM(16, 48, 3)), torch.randn(40, 3, 16)
    expected, wrong = frozen(x), []

    def serve() -> None:
        stream = frozen.stream(3)
        for _ in range(10):
            stream.reset()
            if not torch.equal(stream(x), expected[0]) or not torch.equal(frozen(x)[1][1], expected[1][1]):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Nothing changes it --------------------------------------------------------------------------------------------------


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
    assert not list(frozen.parameters()) and not list(frozen.buffers())
    changes = [
        lambda: frozen.train(),
        lambda: setattr(frozen, "weight_ih_l0", torch.zeros(36, 5)),
        lambda: setattr(frozen, "hidden_size", 3),
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
    assert isinstance(model["lstm"], lstm_ext.LSTM) and isinstance(frozen["lstm"], lstm_ext.FrozenLSTM)
    expected, file = frozen["lstm"](x), io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (loaded, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert_same(other["lstm"](x), expected)
        assert other["lstm"].error == frozen["lstm"].error and repr(other) == repr(frozen)
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

    def run() -> torch.Tensor:
        y: torch.Tensor = frozen_stack.frozen_forward(x, None, None, weights, None, None, None, False, frozen._text)[0]
        return y

    assert torch.equal(run(), frozen(x)[0])
    weights[1].mul_(2)
    other = lstm_ext.LSTM(5, 9)
    other.load_state_dict(dict(zip(frozen._spec.names(), weights, strict=True)))
    torch.testing.assert_close(run(), other(x)[0].detach())
    assert not torch.equal(run(), frozen(x)[0])
    count = len(frozen_stack._known)
    del weights
    assert len(frozen_stack._known) == count - 1


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


# Of a model ----------------------------------------------------------------------------------------------------------


def test_a_model_is_copied() -> None:
    shared = torch.nn.LSTM(4, 4)
    model = torch.nn.ModuleDict({"a": shared, "b": shared, "c": lstm_ext.LSTMCell(4, 4), "d": torch.nn.GRU(4, 4)})
    frozen = lstm_ext.freeze(model)
    assert frozen["a"] is frozen["b"] and isinstance(frozen["a"], lstm_ext.FrozenLSTM)
    assert isinstance(frozen["c"], lstm_ext.FrozenLSTMCell) and isinstance(frozen["d"], torch.nn.GRU)
    assert model["a"] is shared and frozen["d"].weight_ih_l0 is not model["d"].weight_ih_l0

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


def test_parametrized_and_replaced_modules() -> None:
    module = lstm_ext.replace_lstm(torch.nn.LSTM(5, 9))
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = torch.randn(4, 2, 5)
    assert_close(lstm_ext.freeze(module)(x), module(x))


# Accuracy and bad input ----------------------------------------------------------------------------------------------


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
        with pytest.raises(RuntimeError, match="T = 0"):
            frozen(x[:0])
    with pytest.raises(ValueError, match="input: expected 1 or 2 dimensions"):
        lstm_ext.freeze(lstm_ext.LSTMCell(3, 4))(torch.zeros(1, 2, 3))


@needs_native
def test_a_row_with_nan_stays_by_itself() -> None:
    """int8 rows that meet NaN or infinity are NaN from there on; the others do not see it."""
    frozen, x = lstm_ext.freeze(lstm_ext.LSTM(3, 20), "int8"), torch.randn(6, 4, 3)
    expected = frozen(x)[0]
    for spoiler in (float("nan"), float("inf")):
        spoilt = x.clone()
        spoilt[2, 1, 0] = spoiler
        y = frozen(spoilt)[0]
        assert torch.equal(y[:, [0, 2, 3]], expected[:, [0, 2, 3]]) and torch.equal(y[:2], expected[:2])
        assert y[2:, 1].isnan().all()


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
