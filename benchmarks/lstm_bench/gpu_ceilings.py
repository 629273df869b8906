"""What this GPU does at most: `python -m lstm_bench.gpu_ceilings --json FILE`.

By torch, and then by kernels of gpu_ceilings.cu, where nvcc is found. Bandwidths count bytes read and bytes written.
Each figure is the best of several turns, and the file is written as each is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from shutil import which

import torch

from .timing import captured

SOURCE = Path(__file__).with_suffix(".cu")
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


def by_torch() -> Iterator[tuple[str, float]]:
    l2, tiny = torch.cuda.get_device_properties(0).L2_cache_size, torch.zeros(1, device="cuda")
    yield "copy, GB/s", copy_gbs(1 << 30, 5)
    yield f"copy of {l2 >> 23} MiB within L2, GB/s", copy_gbs(l2 >> 3, 200)  # source and target: a quarter of it
    yield "launch in a stream, µs", best_us(launches()) / LAUNCHES
    yield "launch in a stream, µs of the host", host_us()
    yield "launch in a graph, µs", best_us(captured(launches())) / LAUNCHES
    yield "replay of a graph of one kernel, µs", best_us(captured(lambda: tiny.add_(1)), LAUNCHES)
    yield "bfloat16, TFLOP/s", product_tflops(torch.bfloat16, False)
    yield "float16, TFLOP/s", product_tflops(torch.float16, False)
    yield "TF32, TFLOP/s", product_tflops(torch.float32, True)
    yield "float32, TFLOP/s", product_tflops(torch.float32, False, 4096)
    yield "float64, TFLOP/s", product_tflops(torch.float64, False, 4096)


def by_kernels(nvcc: str) -> Iterator[tuple[str, float]]:
    """RuntimeError with the last line of what went wrong."""
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "ceilings")
        arch = f"-arch=sm_{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"
        for command in ([nvcc, "-std=c++20", "-O3", arch, str(SOURCE), "-o", program], [program]):
            done = subprocess.run(command, capture_output=True, text=True)
            for line in done.stdout.splitlines() if command[0] == program else ():
                figure = json.loads(line)
                yield figure["name"], figure["value"]
            if done.returncode:
                raise RuntimeError(f"{command[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the figures are written")
    path = parser.parse_args(arguments).json
    properties = torch.cuda.get_device_properties(0)
    gpu = {"name": properties.name, "multiprocessors": properties.multi_processor_count, "l2": properties.L2_cache_size}
    found: dict[str, float] = {}
    nvcc = which("nvcc")
    try:
        for name, value in chain(by_torch(), by_kernels(nvcc) if nvcc else ()):
            found[name] = value
            print(f"{name}: {value:.4g}")
            content = {"gpu": gpu, "torch": torch.__version__, "ceilings": found}
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except RuntimeError as error:
        print(f"Stopped after {len(found)} figures: {error}")
        return 1
    if not nvcc:
        print("no nvcc: what needs kernels of its own was not measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
