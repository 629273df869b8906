"""Where the CPU's ways cross on this machine, beside where its plans (csrc/cpu/plan.cpp) change over.

Each tuning sweeps a size across a threshold of plan.cpp, with both ways forced and timed in turn, or forces the size
itself and looks for the fastest. `python benchmarks/tune.py --list` names them; without names all that this machine can
do are run, which takes some minutes. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lstm_bench.report import coloured, make_console, new_table, number
from rich.console import Console

import lstm_ext.torch_op  # noqa: F401 (makes the native module take tensors)
from lstm_ext import _native
from lstm_ext.call import FORWARD, LayerCall, Needs, Save
from lstm_ext.engines.cpu import use_plan

ROUNDS = 9
Way = dict[str, Any]


# ---- a layer, and the two passes over it -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int = 0
    dtype: str = "float32"
    backward: bool = False
    threads: int = 1

    @property
    def width(self) -> int:
        return self.P or self.H

    def __str__(self) -> str:
        sizes = [f"T{self.T} B{self.B} I{self.I} H{self.H}", f"P{self.P}" if self.P else "", self.dtype]
        return " ".join([*(size for size in sizes if size), "backward" if self.backward else "forward"])


def plan_of(layer: Layer) -> dict[str, Any]:
    sizes = (layer.T, layer.B, layer.I, layer.H, layer.P, bool(layer.P))
    return _native.C.cpu_plan(*sizes, layer.dtype, 1, layer.backward, layer.threads)


def pass_over(layer: Layer) -> Callable[[], Any]:
    """A call of the pass, on random tensors."""
    dtype = getattr(torch, layer.dtype)
    torch.manual_seed(0)
    T, B, I, H, P = layer.T, layer.B, layer.I, layer.H, layer.width  # noqa: E741

    def tensor(*shape: int, of: Any = dtype) -> Any:
        return (torch.randn(shape) / 8).to(of)

    weights = [tensor(4 * H, I), tensor(4 * H, P), tensor(4 * H), tensor(4 * H)]
    weights += [tensor(P, H)] if layer.P else []
    call = LayerCall(tensor(T, B, I), None, None, weights, None, None, None, FORWARD, False)
    if not layer.backward:
        return lambda: _native.C.layer_forward(call, Save.NOTHING, layer.threads)
    *_, cells, gates = _native.C.layer_forward(call, Save.ALL, layer.threads)
    saved, grads = (cells, gates), (tensor(T, B, P), None, None, None)
    return lambda: _native.C.layer_backward(call, saved, grads, Needs.ALL, layer.threads)


# ---- timing ----------------------------------------------------------------------------------------------------------


def time_block(call: Callable[[], Any], way: Way, count: int) -> float:
    with use_plan(**way):
        call()
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count


def time_ways(call: Callable[[], Any], ways: Sequence[Way], seconds: float) -> list[float]:
    """The median time [µs] of each way, timed in turn so that what drifts hits all alike; `seconds` for each in all."""
    counts = [max(1, int(seconds / ROUNDS / time_block(call, way, 1))) for way in ways]
    rounds = [[time_block(call, way, count) for way, count in zip(ways, counts, strict=True)] for _ in range(ROUNDS)]
    return [1e6 * statistics.median(times) for times in zip(*rounds, strict=True)]


# ---- tunings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossing:
    """Of two ways, `low` is to be the faster one for small values and `high` for large ones."""

    constants: str  # of plan.cpp
    swept: str  # what the values are
    values: Sequence[int]
    layer: Callable[[int], Layer]
    low: Way
    high: Way

    def plans_high(self, value: int) -> bool:
        plan = plan_of(self.layer(value))
        return all(plan[name] == wanted for name, wanted in plain(self.high, plan).items())


@dataclass(frozen=True)
class Best:
    """One field of the plan, forced to each of the values."""

    constants: str
    field: str
    values: Sequence[int]
    layer: Layer
    way: Way  # what is forced besides

    def planned(self) -> int:
        with use_plan(**self.way):
            value = plan_of(self.layer)[self.field]
        return min(value) if isinstance(value, tuple) else value


def plain(way: Way, plan: Mapping[str, Any]) -> Way:
    """What is forced as a plan says it: in_place of w_ih and w_hh, and no more than what differs."""
    wanted = dict(way)
    if isinstance(wanted.get("in_place"), bool):
        wanted["in_place"] = (wanted["in_place"], wanted["in_place"], plan["in_place"][2])
    return wanted


VECTORS, TILES = {"engine": "vectors"}, {"engine": "tiles"}
IN_PLACE, PACKED = {"in_place": True}, {"in_place": False}
TILE_DTYPES = ("bfloat16", "float16", "float32")


def tile_rows() -> Iterator[Crossing]:
    for backward in (False, True):
        for dtype in TILE_DTYPES:
            name = "kLeastTileRowsBackward" if backward else "kLeastTileRows"
            layer = Layer(20, 1, 256, 256, dtype=dtype, backward=backward)
            values = (1, 2, 3, 4, 6, 8, 12, 16, 24)
            yield Crossing(name, "B", values, lambda B, layer=layer: replace(layer, B=B), VECTORS, TILES)


def tile_columns() -> Iterator[Crossing]:
    for backward, values in ((False, (64, 96, 128, 160, 192, 256)), (True, (256, 320, 384, 448, 512))):
        name = "kFewColumnsBackward" if backward else "kFewColumns"
        layer = Layer(20, 10, 1, 1, backward=backward)
        yield Crossing(name, "I + H", values, lambda n, layer=layer: replace(layer, I=n // 2, H=n // 2), VECTORS, TILES)


def tile_zeros() -> Iterator[Crossing]:
    """Widths just above a multiple of the tiles', and then nearer to the next one."""
    layer, values = Layer(20, 24, 1, 1), (65, 68, 70, 72, 74, 76, 80, 88, 96)
    yield Crossing("kMostFilled", "I = H", values, lambda n, layer=layer: replace(layer, I=n, H=n), VECTORS, TILES)
    layer, values = Layer(20, 10, 1, 1), (97, 100, 104, 108, 112, 120, 128)
    yield Crossing(
        "kMostFilledFewRows", "I = H", values, lambda n, layer=layer: replace(layer, I=n, H=n), VECTORS, TILES
    )
    layer, values = Layer(20, 24, 384, 1, backward=True), (65, 66, 68, 70, 72, 76, 80)
    yield Crossing("kMostFilledBackward", "H", values, lambda n, layer=layer: replace(layer, H=n), VECTORS, TILES)


def tile_packing() -> Iterator[Crossing]:
    layer = Layer(1, 8, 256, 1024, dtype="bfloat16")
    values = (20, 40, 80, 120, 160, 200, 320)
    yield Crossing("kRowsPerPackedColumn", "B", values, lambda B: replace(layer, B=B), VECTORS, TILES)


def tile_transposed() -> Iterator[Crossing]:
    layer = Layer(20, 24, 1, 64, dtype="bfloat16", backward=True)
    values = (96, 128, 160, 192, 224, 256)
    yield Crossing("kLeastTransposedFor", "I + H", values, lambda n: replace(layer, I=n - 64), VECTORS, TILES)


def tile_speed() -> Iterator[Crossing]:
    """How many times as fast tiles are is the last column; kTileSpeed over 1, 4 and 6 products is what plans take."""
    for dtype in TILE_DTYPES:
        layer = Layer(20, 64, 512, 512, dtype=dtype)
        yield Crossing("kTileSpeed", "T", (5, 20), lambda T, layer=layer: replace(layer, T=T), VECTORS, TILES)


def in_place() -> Iterator[Crossing]:
    layer = Layer(1, 1, 256, 256)
    values = (4, 8, 16, 32, 40, 48, 64, 96, 128)
    yield Crossing("kCostOfSum; kCostOfSumFewRows", "T", values, lambda T: replace(layer, T=T), IN_PLACE, PACKED)


def in_place_lines() -> Iterator[Crossing]:
    layer = Layer(1, 1, 250, 250)
    values = (2, 4, 6, 8, 10, 12, 16, 24, 32)
    yield Crossing("kCostOfCrossing", "T", values, lambda T: replace(layer, T=T), IN_PLACE, PACKED)


def in_place_bytes() -> Iterator[Crossing]:
    """Of matrices that fill a second-level cache: w_ih and w_hh have 1 MB each where I and H are 256."""
    layer = Layer(1, 1, 512, 512)
    values = (16, 32, 64, 96, 128, 160, 192, 256)
    yield Crossing(
        "kCostOfSumFar, kNearBytes; kCostOfSumFewRows", "T", values, lambda T: replace(layer, T=T), IN_PLACE, PACKED
    )
    layer_of = lambda n: Layer(18, 1, n, n)  # noqa: E731
    values = (250, 260, 270, 280, 290, 300, 310, 330)
    packed, placed = {"in_place": (True, False, False)}, {"in_place": (True, True, False)}  # w_hh alone
    yield Crossing("kCrossingBytes", "I = H", values, layer_of, packed, placed)


def panel_depth() -> Iterator[Best]:
    for layer in (Layer(8, 12, 1024, 1024), Layer(8, 48, 1024, 1024), Layer(4, 48, 4096, 256)):
        yield Best("packed panels", "depth", (96, 128, 256, 512, 1024, 2048, 4096), layer, VECTORS | PACKED)


def in_place_depth() -> Iterator[Best]:
    way = VECTORS | IN_PLACE | {"one_sum": False}
    yield Best("kInPlaceDepth", "depth", (128, 256, 512, 1024, 2048), Layer(4, 12, 2048, 1024), way)


def chunk_bytes() -> Iterator[Best]:
    for layer in (Layer(64, 16, 64, 128), Layer(64, 8, 512, 256), Layer(64, 8, 1024, 512)):
        yield Best("kLeastChunkBytes, kMostChunkBytes", "chunk_steps", (1, 2, 4, 8, 16, 32, 64), layer, VECTORS)


def chunk_near() -> Iterator[Best]:
    for H in (128, 160, 192):
        name = "kHeldWithVectors, kHeldWithTiles"
        yield Best(name, "chunk_steps", (1, 2, 4, 8, 16, 32, 64), Layer(64, 8, H, H), {})


def backward_chunk_bytes() -> Iterator[Best]:
    values = (2, 4, 8, 16, 32, 64, 128)
    yield Best("kBackwardChunkBytes", "chunk_steps", values, Layer(128, 8, 32, 32, backward=True), {})


def backward_chunk_rows() -> Iterator[Best]:
    values = (2, 4, 8, 16, 32, 64, 128)
    yield Best("kLeastBackwardRows", "chunk_steps", values, Layer(128, 8, 256, 256, backward=True), {})


def sum_depth() -> Iterator[Best]:
    layer = Layer(64, 16, 256, 256, backward=True)
    yield Best("kMostSumDepth (plan.h)", "depth", (64, 128, 256, 512), layer, {})


def threads() -> Iterator[Crossing]:
    layer = Layer(10, 12, 64, 64, threads=2)
    values = (2, 4, 8, 16, 24, 32, 64)
    one, two = {"threads": 1}, {"threads": 2}
    yield Crossing("kLeastFlops", "H", values, lambda H: replace(layer, I=H, H=H), one, two)


def threads_step() -> Iterator[Crossing]:
    layer = Layer(200, 1, 32, 32, threads=2)
    values = (32, 48, 64, 80, 96, 128, 192)
    one, two = {"threads": 1}, {"threads": 2}
    name = "kLeastFlopsPerStepAndMember"
    yield Crossing(name, "I = H", values, lambda H: replace(layer, I=H, H=H), one, two)


def by_rows_tiles() -> Iterator[Crossing]:
    rows, panels = ({"engine": "tiles", "threads": 2, "by_rows": by_rows} for by_rows in (True, False))
    layer = Layer(20, 1, 64, 96, dtype="bfloat16", threads=2)
    values = (4, 8, 12, 16, 20, 24, 32)
    yield Crossing("kLeastTileFilled", "B", values, lambda B: replace(layer, B=B), panels, rows)


def by_rows() -> Iterator[Crossing]:
    rows, panels = {"threads": 2, "by_rows": True}, {"threads": 2, "by_rows": False}
    layer = Layer(20, 12, 64, 64, threads=2)
    values = (64, 128, 160, 192, 256, 384, 512)
    yield Crossing("kHeldByEach", "I = H", values, lambda H: replace(layer, I=H, H=H), rows, panels)
    layer_of = lambda B: Layer(20, B, 128, 144, threads=2)  # noqa: E731 (nine panels of AVX-512: 5 and 4)
    yield Crossing("kEvenPanels, kUnevenRows", "B", (2, 4, 6, 8, 10, 12, 18), layer_of, panels, rows)


TUNINGS: dict[str, Callable[[], Iterator[Crossing | Best]]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(tile_rows, tile_columns, tile_zeros, tile_packing, tile_transposed, tile_speed),
        *(in_place, in_place_lines, in_place_bytes, panel_depth, in_place_depth),
        *(chunk_bytes, chunk_near, backward_chunk_bytes, backward_chunk_rows, sum_depth),
        *(threads, threads_step, by_rows, by_rows_tiles),
    )
}


# ---- tables ----------------------------------------------------------------------------------------------------------


def crossing_of(values: Sequence[int], ratios: Sequence[float]) -> str:
    """Between which values the ratio of low to high passes 1 for good."""
    faster = [ratio > 1 for ratio in ratios]  # high is
    if all(faster) or not any(faster):
        return f"below {values[0]}" if faster[0] else f"above {values[-1]}"
    last_low = max(n for n, high in enumerate(faster) if not high)
    return f"{values[last_low]} to {values[last_low + 1]}" if last_low + 1 < len(values) else f"above {values[-1]}"


def text_of(way: Way) -> str:
    return ", ".join(f"{name} {str(value).lower()}" for name, value in way.items())


def show_crossing(tuning: Crossing, seconds: float, console: Console) -> None:
    title = f"{tuning.constants}: {tuning.swept}, as in {tuning.layer(tuning.values[0])}"
    table = new_table(title, tuning.swept, f"{text_of(tuning.low)} µs", f"{text_of(tuning.high)} µs", "ratio", "plan")
    ratios, planned = [], []
    for value in tuning.values:
        low, high = time_ways(pass_over(tuning.layer(value)), (tuning.low, tuning.high), seconds)
        ratios.append(low / high)
        planned.append(2.0 if tuning.plans_high(value) else 0.5)
        right = (ratios[-1] > 1) == (planned[-1] > 1)
        name = text_of(tuning.high if planned[-1] > 1 else tuning.low)
        table.add_row(str(value), number(low), number(high), f"{ratios[-1]:.2f}", coloured(name, right))
    console.print(table)
    console.print(
        f"Crosses at {tuning.swept} {crossing_of(tuning.values, ratios)}; "
        f"plans change over at {crossing_of(tuning.values, planned)}\n"
    )


def show_best(tuning: Best, seconds: float, console: Console) -> None:
    planned = tuning.planned()
    values = sorted({*tuning.values, planned})
    times = time_ways(pass_over(tuning.layer), [tuning.way | {tuning.field: value} for value in values], seconds)
    table = new_table(f"{tuning.constants}: {tuning.field}, {tuning.layer}", tuning.field, "µs", "to the best", "plan")
    for value, each in zip(values, times, strict=True):
        table.add_row(str(value), number(each), f"{each / min(times):.2f}", "planned" if value == planned else "")
    console.print(table)
    best = values[times.index(min(times))]
    console.print(f"Fastest at {best}; planned is {planned}\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="tunings (default: all)")
    parser.add_argument("--seconds", type=float, default=0.3, help="measured for each way of each value (default: 0.3)")
    parser.add_argument("--list", action="store_true", help="print the names and the constants of plan.cpp, and end")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in TUNINGS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(TUNINGS)}")
    return options


def needs_tiles(tuning: Crossing | Best) -> bool:
    return isinstance(tuning, Crossing) and "engine" in tuning.high and tuning.high["engine"] == "tiles"


def main() -> int:
    options, console = parse(), make_console()
    if options.list:
        for name, tunings in TUNINGS.items():
            console.print(f"{name}: {', '.join(dict.fromkeys(tuning.constants for tuning in tunings()))}")
        return 0
    level = _native.C.build_info()["simd"]
    console.print(f"SIMD level {level}\n")
    for name in options.names or TUNINGS:
        for tuning in TUNINGS[name]():
            if needs_tiles(tuning) and level != "amx":
                console.print(f"{name}: this SIMD level has no tile registers\n")
                break
            show = show_crossing if isinstance(tuning, Crossing) else show_best
            show(tuning, options.seconds, console)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main())
