"""What this GPU does at most, measured by torch: `python -m lstm_bench.gpu_ceilings --json FILE`.

Bandwidths count bytes read and bytes written. Each figure is the best of several turns, and the file is written as each
is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .timing import captured

TURNS = 5
LAUNCHES = 1000


def best_us(call: Callable[[], object], count: int = 1) -> float:
    """µs of a call, by events around `count` of them."""
    times = []
    for _ in range(TURNS + 1):  # the first warms up
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop) / count)
    return min(times[1:])


def copy_gbs(size: int, count: int) -> float:
    """GB/s between two buffers of `size` bytes, by a kernel, `count` times in a graph so that launches do not count."""
    source = torch.randn(size // 4, device="cuda")
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(count):
            torch.neg(source, out=target)

    return 2e-3 * size * count / best_us(captured(copies))


def product_tflops(dtype: torch.dtype, tf32: bool, n: int = 8192) -> float:
    torch.backends.cuda.matmul.allow_tf32 = tf32
    a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
    return 2e-6 * n**3 / best_us(lambda: a @ b, 5)


def launches() -> Callable[[], None]:
    tiny = torch.zeros(1, device="cuda")

    def run() -> None:
        for _ in range(LAUNCHES):
            tiny.add_(1)

    return run


def host_us() -> float:
    """µs of the host to launch one tiny kernel from torch."""
    run, times = launches(), []
    for _ in range(TURNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - start) / LAUNCHES)
    return min(times)


def measurements() -> dict[str, Callable[[], float]]:
    l2, tiny = torch.cuda.get_device_properties(0).L2_cache_size, torch.zeros(1, device="cuda")
    return {
        "copy, GB/s": lambda: copy_gbs(1 << 30, 5),
        f"copy of {l2 >> 23} MiB within L2, GB/s": lambda: copy_gbs(l2 >> 3, 200),  # source and target: a quarter of it
        "launch in a stream, µs": lambda: best_us(launches()) / LAUNCHES,
        "launch in a stream, µs of the host": host_us,
        "launch in a graph, µs": lambda: best_us(captured(launches())) / LAUNCHES,
        "replay of a graph of one kernel, µs": lambda: best_us(captured(lambda: tiny.add_(1)), LAUNCHES),
        "bfloat16, TFLOP/s": lambda: product_tflops(torch.bfloat16, False),
        "float16, TFLOP/s": lambda: product_tflops(torch.float16, False),
        "TF32, TFLOP/s": lambda: product_tflops(torch.float32, True),
        "float32, TFLOP/s": lambda: product_tflops(torch.float32, False, 4096),
        "float64, TFLOP/s": lambda: product_tflops(torch.float64, False, 4096),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the figures are written")
    path = parser.parse_args(arguments).json
    properties = torch.cuda.get_device_properties(0)
    gpu = {"name": properties.name, "multiprocessors": properties.multi_processor_count, "l2": properties.L2_cache_size}
    found: dict[str, float] = {}
    for name, measure in measurements().items():
        found[name] = measure()
        print(f"{name}: {found[name]:.4g}")
        content = {"gpu": gpu, "torch": torch.__version__, "ceilings": found}
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
