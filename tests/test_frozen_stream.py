"""Streams of frozen modules: they go on, allocate nothing, and are one caller's."""

from __future__ import annotations

import copy
import pickle
import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

import lstm_ext
from lstm_ext.frozen import Stream

from .conftest import needs_native


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
    assert h.shape == c.shape == (2, 4, 8)
    assert h.any()
    h.zero_()  # a copy
    assert stream.state[0].any()
    for rows in (1, [0, 3], torch.tensor([False, False, True, False])):
        before = stream.state
        stream.reset(rows)
        picked = torch.zeros(4, dtype=torch.bool)
        picked[rows] = True
        for old, new in zip(before, stream.state, strict=True):
            assert not new[:, picked].any()
            assert torch.equal(new[:, ~picked], old[:, ~picked])
    stream.state = (torch.ones(2, 4, 8), np.ones((2, 4, 8), np.float32))
    expected, _ = frozen(x, (torch.ones(2, 4, 8), torch.ones(2, 4, 8)))
    assert torch.equal(stream(x), expected)
    y = stream(x, lengths=torch.tensor([0, 2, 5, 1]))
    assert not y[2:, 1].any()
    assert y[1, 1].any()
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
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor or numpy.ndarray"):
        stream([1.0])  # type: ignore[type-var]
    with pytest.raises(RuntimeError, match=r"state, h: expected shape \[1, 2, 4\]"):
        stream.state = torch.zeros(1, 3, 4), torch.zeros(1, 2, 4)
    with pytest.raises(TypeError, match="state: expected a pair"):
        stream.state = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="one direction"):
        stream_of(bidirectional=True)
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        stream_of(batch_size=0)
    for wrong in (1.5, "a", None, True):
        with pytest.raises(TypeError, match=f"batch_size: expected an integer, got {wrong!r}"):
            stream_of(batch_size=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"rows: expected integers, or bool \[B\], got \[1.5\]"):
        stream_of().reset([1.5])
    stream_of().reset([])
    assert not stream.state[1].any()  # nothing of all that has counted


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_out_is_refused_whoever_computes(backend: str) -> None:
    with lstm_ext.use_backend(backend):
        memory, tensors = np.zeros(5 * 2 * 7, np.float32), torch.zeros(5 * 2 * 7)
        for flat in (memory, tensors):
            stream = stream_of()
            x, out = flat[:30].reshape(5, 2, 3), flat[30:].reshape(5, 2, 4)
            assert stream(x, out=out) is out
            before = stream.state
            with pytest.raises(ValueError, match="out: expected memory apart from that of x"):
                stream(x, out=flat[29:69].reshape(5, 2, 4))
            with pytest.raises(RuntimeError, match="out: expected"):
                stream(x, out=out[:4])
            with pytest.raises((RuntimeError, ValueError)):  # torch's or NumPy's own words where these write
                stream(
                    x, out=torch.zeros(1).expand(5, 2, 4) if flat is tensors else np.broadcast_to(memory[:1], (5, 2, 4))
                )
            assert torch.equal(stream.state[0], before[0])
        memory.setflags(write=False)
        with pytest.raises(ValueError, match="out: expected a writable array"):
            stream_of()(memory[:30].reshape(5, 2, 3), out=memory[30:].reshape(5, 2, 4))
        with pytest.raises(RuntimeError, match="x: expected"):
            stream_of()(torch.zeros(3))
        with pytest.raises(TypeError, match=r"state, h: expected a numpy.ndarray or torch.Tensor, got list"):
            stream_of().state = [0.0], [0.0]
        # A step of a cell without a batch, in a stream of one.
        cell = lstm_ext.freeze(lstm_ext.LSTMCell(3, 4)).stream()
        with pytest.raises(ValueError, match="lengths: expected"):
            cell(torch.zeros(1, 3), lengths=torch.ones(1, dtype=torch.int64))
        x, out = torch.randn(3), torch.zeros(4)
        assert cell(x, out=out, resets=torch.tensor(True)) is out
        assert torch.equal(cell.state[0][0, 0], out)
        with pytest.raises(RuntimeError, match="resets: expected 1 dimensions beside an input without a batch, got 2"):
            stream_of(batch_size=1)(torch.zeros(5, 3), resets=torch.zeros(5, 1, dtype=torch.bool))


def test_arrays_however_they_lie() -> None:
    """Other byte orders, strides and unwritable memory, with packed weights and without."""
    x = np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    fixed = x.copy()
    fixed.setflags(write=False)
    for weights, options in (("float32", {}), ("int8", {"activation": "relu"})):
        stream = stream_of(weights, **options)
        expected = stream(x)
        for other in (x.astype(">f4"), x[::-1].copy()[::-1], fixed):
            stream.reset()
            np.testing.assert_array_equal(stream(other), expected)


def test_copies_of_a_stream_go_on_by_themselves() -> None:
    stream, x = stream_of("int8"), torch.randn(5, 2, 3)
    stream(x)
    others = copy.copy(stream), copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))
    assert others[0].frozen is stream.frozen
    expected = stream(x)
    for other in others:
        assert torch.equal(other(x), expected)
    assert not torch.equal(stream(x), expected)


def test_the_mode_in_which_a_stream_is_made() -> None:
    """Its state is written to in inference mode and outside, and by tensors that ask for gradients."""
    with torch.inference_mode():
        stream = stream_of()
        stream(torch.zeros(5, 2, 3))
    stream.reset()
    stream.state = torch.ones(1, 2, 4, requires_grad=True), torch.ones(1, 2, 4)
    assert not stream(torch.zeros(5, 2, 3)).requires_grad
    with pytest.raises(RuntimeError, match=r"torch.func, compilers and modes do not see its state: call the frozen"):
        torch.func.vmap(stream)(torch.zeros(3, 5, 2, 3))


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
