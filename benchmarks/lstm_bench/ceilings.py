"""What this machine can do at most, and the floor under each row's time that follows from it.

The floor of a step of one layer is

    max(bytes of the recurrent weights a core reads / bandwidth of the cache levels that hold them, their flops / peak)
    + max(bytes of W / T / the same bandwidth, flops of the input projection / peak)
    + flops of gate math / peak
    + a barrier, where threads must exchange h

n threads share the units (each reads 1/n of the weights, and a barrier ends each step, unless directions or layers give
every thread its own) or the rows of the batch (each reads all weights, no barrier): the faster counts. Training adds
the backward pass: the recurrent term and the barrier again (dh), gate math again, and at peak the products dR, dW, dx.

Peak is the fused multiply-adds of the row's dtype in vector registers (bfloat16: its dot product where the machine has
one; otherwise half types compute in float32). Where the machine has bfloat16 tile registers (AMX) the floor is the
lower of that and of theirs: over how many of their products one of that dtype takes, and as far as the rows of the
product fill tiles of 16; and a call then has to pack the weights, which tiles cannot read as they lie. Vectors can, so
theirs is not counted. Gates are computed in vectors. Left out: reading x, writing y and what the backward pass keeps,
and all that happens once a call. Weights that are larger than a cache are read from it as far as it holds them, and the
rest from the next one: a kernel that walks them forth and back finds that much there.

A ceiling is the best that was measured before the rows, now and then between them, and after them: another process, or
a clock that has not sped up yet, makes one measurement too low, and a time could come out below the floor.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from shutil import which
from typing import Any

from .cases import Case, usable_cores

Ceilings = dict[str, Any]

SOURCE = Path(__file__).with_name("ceilings.cpp")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

# 3 sigmoids and 2 tanhs a unit, each about 11 multiply-adds for the exponential and a division worth 10.
GATE_FLOPS = 2 * 5 * 21
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
TILE_ROWS = 16
# (csrc/cpu/tiles.h) bfloat16 numbers that one of the dtype is, and their products for one product of the dtype
TILE_PLANES = {"float32": 3, "bfloat16": 1, "float16": 2}
TILE_PRODUCTS = {"float32": 6, "bfloat16": 1, "float16": 4}


def cpu_list_length(text: str) -> int:
    """How many processors "0-3,8" names."""
    spans = [list(map(int, span.split("-"))) for span in text.split(",")]
    return sum(span[-1] - span[0] + 1 for span in spans)


def cache_levels() -> list[tuple[str, int, int]]:
    """Name, bytes and number of sharing processors of each data cache, as the system tells them."""
    levels = []
    for index in sorted(CACHES.glob("index*")):
        level, kind, size, shared = (
            (index / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
        )
        if kind != "Instruction":
            levels.append((f"L{level}", 1024 * int(size.removesuffix("K")), cpu_list_length(shared)))
    return levels


class Meter:
    """Measures the ceilings, each time for each number of threads. `reason` says why it cannot, if it cannot.

    `best` is what was measured so far: for each number of threads, by its text, {"fma_gflops": {dtype: of all threads},
    "barrier_us", "levels": [{"name", "bytes": a thread's share (None for memory), "read_gbs": of each thread}]}.
    """

    def __init__(self, threads: Iterable[int]) -> None:
        self.best: Ceilings = {}
        self._threads = list(threads)
        self._folder = tempfile.TemporaryDirectory()
        self._program = str(Path(self._folder.name) / "ceilings")
        self._caches = cache_levels()
        self.reason = self._compile() if self._caches else f"no cache sizes under {CACHES}"

    def _compile(self) -> str:
        compiler = next((name for name in (os.environ.get("CXX", ""), "g++", "clang++") if which(name)), None)
        if compiler is None:
            return "no C++ compiler (g++, clang++ or CXX)"
        command = [compiler, "-std=c++17", "-O3", "-march=native", "-pthread", str(SOURCE), "-o", self._program]
        built = subprocess.run(command, capture_output=True, text=True)
        return f"{compiler} failed: {built.stderr.strip().splitlines()[-1]}" if built.returncode else ""

    def measure(self) -> None:
        """Measures once more."""
        if self.reason:
            return
        for count in self._threads:
            measured = self._measure(count)
            former = self.best.get(str(count))
            self.best[str(count)] = better(former, measured) if former else measured

    def _measure(self, count: int) -> dict[str, Any]:
        running = min(count, len(usable_cores()))
        shares = [size // min(count, sharing) for _, size, sharing in self._caches]
        buffers = [share // 2 for share in shares] + [4 * shares[-1]]
        command = [self._program, str(running), *map(str, buffers)]
        measured: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        names, sizes = [name for name, _, _ in self._caches] + ["memory"], [*shares, None]
        levels = zip(names, sizes, measured.pop("read_gbs"), strict=True)
        measured["levels"] = [{"name": n, "bytes": size, "read_gbs": gbs} for n, size, gbs in levels]
        return measured


def better(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements of so many threads the better figures."""
    return {
        "fma_gflops": {dtype: max(rate, other["fma_gflops"][dtype]) for dtype, rate in one["fma_gflops"].items()},
        "barrier_us": min(one["barrier_us"], other["barrier_us"]),
        "levels": [
            {**level, "read_gbs": max(level["read_gbs"], again["read_gbs"])}
            for level, again in zip(one["levels"], other["levels"], strict=True)
        ],
    }


def read_us(ceilings: Ceilings, weights: float, volume: float) -> float:
    """µs for a thread to read `volume` bytes of weights that take `weights` bytes in all."""
    us, behind = 0.0, 0.0  # of the weights, what faster levels hold
    for level in ceilings["levels"]:
        held = weights if level["bytes"] is None else min(weights, level["bytes"])
        us += (held - behind) / (1e3 * level["read_gbs"])
        behind = held
    return us * volume / weights if weights else 0.0


def vector_gflops(ceilings: Ceilings, dtype: str) -> float:
    """Of products in vector registers, by all threads together."""
    peaks = ceilings["fma_gflops"]
    return float(peaks.get(dtype, peaks["float32"]))


def tile_gflops(ceilings: Ceilings, dtype: str) -> float:
    """Of products in tile registers that are full, by all threads together; 0 without them."""
    products = TILE_PRODUCTS.get(dtype)
    return ceilings["fma_gflops"].get("tiles", 0) / products if products else 0.0


def product_gflops(ceilings: Ceilings, dtype: str) -> float:
    """Of matrix products, at most, by all threads together."""
    return max(vector_gflops(ceilings, dtype), tile_gflops(ceilings, dtype))


def layer_step_us(case: Case, width: int, threads: int, ceilings: Ceilings, active: float, tiles: bool) -> float:
    """The floor of a step of one layer with inputs `width` wide, for so many threads."""
    training, rows, D, item = case.mode == "training", active * case.B, case.directions, ITEM_BYTES[case.stored]
    peak_of = tile_gflops if tiles else vector_gflops
    peak = 1e3 * peak_of(ceilings, case.dtype)  # flops per µs
    step_peak = peak * case.B / (TILE_ROWS * -(-case.B // TILE_ROWS)) if tiles else peak
    gate_peak = 1e3 * vector_gflops(ceilings, "float64" if case.dtype == "float64" else "float32")
    recurrent_weights, input_weights = D * (4 * case.H * case.width + case.P * case.H), D * 4 * case.H * width
    recurrent_flops, input_flops = 2 * rows * recurrent_weights, 2 * rows * input_weights

    def products(parts: int, barrier: float) -> float:
        """Where each thread reads one of so many parts of the weights."""
        held, volume = item * recurrent_weights / parts, item * input_weights / case.T / parts
        recurrent: float = max(read_us(ceilings, held, held), recurrent_flops / step_peak) + barrier
        return (1 + training) * recurrent + max(read_us(ceilings, held, volume), input_flops / peak)

    apart = D * case.layers >= threads
    step = products(threads, 0.0 if apart else ceilings["barrier_us"])
    if threads <= case.B:
        step = min(step, products(1, 0.0))
    if tiles:  # read and written once a call, each part by one thread
        weights = (recurrent_weights + input_weights) / threads
        step += read_us(ceilings, item * weights, (item + 2 * TILE_PLANES[case.dtype]) * weights) / case.T
    gate_flops = (1 + training) * GATE_FLOPS * rows * D * case.H
    return step + training * (recurrent_flops + 2 * input_flops) / peak + gate_flops / gate_peak


def floor_us(case: Case, ceilings: Ceilings, active: float = 1.0) -> float | None:
    """The least time of the call [µs] where the share `active` of all B * T steps is taken; None without ceilings.

    A case may leave threads idle, so the floor of one thread counts as well.
    """
    counts = {1, case.threads}
    if case.device != "cpu" or not all(str(count) in ceilings for count in counts):
        return None
    return case.T * min(
        sum(layer_step_us(case, width, count, ceilings[str(count)], active, tiles) for width in case.layer_inputs)
        for count in counts
        for tiles in (False, True)
        if not tiles or tile_gflops(ceilings[str(count)], case.dtype)
    )
