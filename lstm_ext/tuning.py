"""`lstm_ext.tune`: times every strategy on this GPU, and lets the plans go by what was measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from . import _native, gpu_files, measured
from .call import BOTH, DTYPES, FORWARD, LayerCall, Needs, OutputGrads, Save, Saved
from .engines import backends
from .measured import Times

if TYPE_CHECKING:
    import torch

_STRATEGIES = ("block", "cluster", "grid", "step")
_ROUNDS = 7  # of all strategies in turn
_LEAST_MICROSECONDS = 500.0  # that one measurement takes; shorter passes are repeated
_MOST_REPEATS = 100

Shape = tuple[int, int, int, int]  # T, B, H, P


def tune(
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[Any] = ("float32",),
    *,
    bidirectional: bool = False,
    backward: bool = True,
    tf32: bool | None = None,
    device: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> list[Times]:
    """Times every strategy that can run these layers on this GPU, and plans by that from now on.

    Each pass, forward and backward, is run by all strategies in turn, several times; the median counts, by the clock
    of the GPU. What is one product over all steps, the same for all strategies, is left out. Afterwards a layer runs by
    the strategy that was fastest for the nearest shape (`lstm_ext.plan` says which), unless none is near: the distance
    |log2 T/T'| / 4 + |log2 B/B'| + 2 |log2 H/H'| + 2 |log2 P/P'| must be at most 1, which is twice the batch, 1.4 times
    the units or 16 times the steps. There the cost model goes on deciding. Other work on the GPU spoils the times;
    a margin (`set_sm_margin`) that is set now is part of them.

    Args:
        shapes: (T, B, H) or (T, B, H, P) each: steps, sequences, units, and the width of a projection.
        dtypes: of torch, or their names.
        bidirectional: layers that run in both directions.
        backward: the backward pass too.
        tf32: whether float32 is multiplied as TF32; None as torch is set now.
        device: the number of the GPU.
        path: the file to write; None for the one in the cache that later processes look for by themselves. They read
            another one where LSTM_EXT_TIMES names it. Shapes in the file that are not timed now are kept.

    Returns:
        The table that was written, which has a row for each pass over each shape.

    Raises:
        RuntimeError: there is no GPU to run on.
        ValueError: a shape or a dtype that no layer has.
        OSError: the file cannot be written.

    Example:
        >>> if lstm_ext.backends()["cuda"].available:
        ...     table = lstm_ext.tune([(512, 16, 768), (512, 64, 768)], ["bfloat16"])
    """
    layers = [_shape(shape) for shape in shapes]
    names = [_dtype(dtype) for dtype in dtypes]
    if not layers or not names:
        raise ValueError(f"shapes, dtypes: expected at least one of each, got {len(layers)} and {len(names)}")
    backend = backends()["cuda"]
    if not backend.available:
        raise RuntimeError(f"tune: the backend 'cuda' is not available: {backend.reason}")
    cuda = import_module(f"{__package__}.engines.cuda")
    import_module(f"{__package__}.torch_op")  # from its import on the native module takes tensors
    as_tf32 = cuda.tf32_allowed() if tf32 is None else tf32
    file = measured.path_of(device) if path is None else Path(path)
    passes = [(name, shape, back) for name in names for shape in layers for back in (False, True)[: 1 + backward]]
    table = []
    for name, shape, back in _progress(passes):
        narrow = as_tf32 and name == "float32"
        times = _times(name, shape, 2 if bidirectional else 1, back, narrow, device)
        today = date.today().isoformat()
        steps, rows, units, projection = shape
        table.append(Times(name, narrow, 2 if bidirectional else 1, back, steps, rows, units, projection, today, times))
    table += [row for row in _written(file, device) if row[:8] not in {new[:8] for new in table}]
    gpu_files.write(file, measured.content_of(table, device))
    measured.take(device, table)
    return table


def _shape(shape: Sequence[int]) -> Shape:
    sizes = tuple(shape)
    if len(sizes) not in (3, 4) or not all(isinstance(size, int) and size > 0 for size in sizes[:3]):
        raise ValueError(f"shapes: expected (T, B, H) or (T, B, H, P), each at least 1, got {shape!r}")
    steps, rows, units, projection = (*sizes, 0)[:4]
    if not isinstance(projection, int) or not 0 <= projection < units:
        raise ValueError(f"shapes: expected P from 0 (none) to H - 1, got {shape!r}")
    return steps, rows, units, projection


def _dtype(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtypes: expected {', '.join(sorted(DTYPES))}, got {dtype!r}")
    return name


def _progress(passes: list[Any]) -> Iterable[Any]:
    """With a bar on a terminal, where tqdm is installed."""
    if find_spec("tqdm") is None or not sys.stderr.isatty():
        return passes
    return import_module("tqdm").tqdm(passes, desc="lstm_ext.tune", unit="pass")


def _written(file: Path, device: int) -> list[Times]:
    """What a file says of this GPU; nothing where there is none, or one about another."""
    try:
        about, table = measured.read(file)
    except (OSError, ValueError):
        return []
    return table if about == gpu_files.identity(device) else []


# The measurement -----------------------------------------------------------------------------------------------------


def _device(number: int) -> torch.device:
    import torch

    return torch.device("cuda", number)


def _passes(
    name: str, shape: Shape, directions: int, backward: bool, tf32: bool, device: torch.device
) -> Callable[[str], Any]:
    """What runs one pass by a strategy, on inputs that are made here."""
    import torch

    T, B, H, P = shape
    dtype, width = getattr(torch, name), P or H
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int, of: torch.dtype = dtype, bound: float = 1.0) -> torch.Tensor:
        return torch.empty(sizes, device=device).uniform_(-bound, bound, generator=generator).to(of)

    weights = []
    for _ in range(directions):
        weights += [draw(4 * H, width, bound=H**-0.5), draw(4 * H), draw(4 * H)]
        weights += [draw(P, H, bound=H**-0.5)] if P else []
    both = BOTH if directions == 2 else FORWARD
    xw = draw(directions, T, B, 4 * H, of=wide)
    call = LayerCall(xw, None, None, weights, None, None, None, both, False)
    if not backward:  # gates may take the place of xw: the next run has other numbers, and takes as long
        return lambda strategy: _native.C.cuda_layer_forward(call, Save.ALL, tf32, strategy)
    gates, cells = draw(directions, T, B, 4 * H).abs_(), draw(directions, T, B, H, of=wide)
    grads = OutputGrads(draw(T, B, directions * width), None, None, None)
    steps, saved, needs = call._replace(x=gates), Saved(cells, gates), Needs.ALL
    return lambda strategy: _native.C.cuda_layer_backward(steps, saved, grads, needs, tf32, strategy)


def _times(name: str, shape: Shape, directions: int, backward: bool, tf32: bool, device: int) -> dict[str, float]:
    """Microseconds of a step by each strategy that can run the pass: the median of several rounds of all of them."""
    T, B, H, P = shape
    run = _passes(name, shape, directions, backward, tf32, _device(device))
    repeats = {}
    for strategy in _STRATEGIES:
        try:
            _native.C.cuda_plan(T, B, H, P, P > 0, name, tf32, directions, backward, strategy, device)
        except RuntimeError:  # it cannot run this, or not rightly
            continue
        ran = run(strategy)
        if isinstance(ran, str):  # as its self-check has just found
            continue
        if ran is NotImplemented:
            raise RuntimeError("tune: the compiled module takes no tensors of torch, so that there is nothing to time")
        once = _elapsed(run, strategy, 1, device)
        repeats[strategy] = min(_MOST_REPEATS, 1 + int(_LEAST_MICROSECONDS / max(once, 1.0)))
    rounds: dict[str, list[float]] = {strategy: [] for strategy in repeats}
    for _ in range(_ROUNDS):
        for strategy, times in repeats.items():
            us = _elapsed(run, strategy, times, device)
            rounds[strategy].append(us / times / T)
    return {strategy: median(each) for strategy, each in rounds.items()}


def _elapsed(run: Callable[[str], Any], strategy: str, times: int, device: int) -> float:
    """Microseconds that the GPU takes to run it so often."""
    import torch

    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run(strategy)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3
