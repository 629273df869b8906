"""Times several calls against each other: short blocks in turn, A B A B, so that what drifts hits all alike."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, supported_activities
from torch.utils.benchmark import Measurement, Timer

from .cases import Case, usable_cores

Call = Callable[[], Any]

ROUNDS, MIN_ROUNDS = 5, 3
PATIENCE = 10  # fewer rounds do where they take this many times as long as planned
SETTLING = 0.2  # s, at most, before a block


def settle() -> None:
    """Waits until no thread of this process runs: OpenMP's spin for some ms after a call, ONNX Runtime's for forty."""
    end, quiet = time.perf_counter() + SETTLING, 0.01  # two ticks of a clock that counts the time of running threads
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(quiet)
        if time.process_time() - used < quiet / 10:
            return


def time_cpu(calls: Mapping[str, Call], threads: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Median and interquartile range of each call [µs]; each is measured for `seconds` in all.

    A block begins with calls that do not count (the timer finds out how many to time at once).
    """
    blocks: dict[str, list[Measurement]] = {name: [] for name in calls}
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in calls.items()}
    end = time.perf_counter() + PATIENCE * seconds * len(calls)
    for done in range(ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name, timer in timers.items():
            settle()
            blocks[name].append(timer.blocked_autorange(min_run_time=seconds / ROUNDS))
    merged = {name: Measurement.merge(measured)[0] for name, measured in blocks.items()}
    return {name: (1e6 * m.median, 1e6 * m.iqr) for name, m in merged.items()}


PERCENTILES = (50.0, 99.0, 99.9)


def time_each(calls: Mapping[str, Call], number: int) -> dict[str, dict[str, float]]:
    """Percentiles of the times of so many calls, each timed by itself [µs]; the clock's own time counts."""
    samples: dict[str, list[Any]] = {name: [] for name in calls}
    clock = time.perf_counter_ns
    for _ in range(ROUNDS):
        for name, call in calls.items():
            settle()
            took = np.empty(number // ROUNDS)
            for n in range(len(took)):
                start = clock()
                call()
                took[n] = clock() - start
            samples[name].append(took)
    names = [f"{percent:g}" for percent in PERCENTILES]
    return {
        name: dict(zip(names, np.percentile(np.concatenate(taken) / 1e3, PERCENTILES).tolist(), strict=True))
        for name, taken in samples.items()
    }


def time_cuda(calls: Mapping[str, Call], seconds: float) -> dict[str, tuple[float, float]]:
    """As `time_cpu`, by events on the current stream around each call."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            torch.cuda.synchronize()
            end = time.perf_counter() + seconds / ROUNDS
            events: list[list[torch.cuda.Event]] = []
            while not events or time.perf_counter() < end:
                pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                pair[0].record()
                call()
                pair[1].record()
                pair[1].synchronize()
                events.append(pair)
            samples[name] += [1e3 * start.elapsed_time(stop) for start, stop in events]
    quartiles = {name: np.percentile(values, [25, 50, 75]) for name, values in samples.items()}
    return {name: (float(q[1]), float(q[2] - q[0])) for name, q in quartiles.items()}


def kernels(call: Call, most: int = 6) -> dict[str, int]:
    """The launches of each kernel in a call, those that take longest first; none where the profiler cannot see them."""
    if ProfilerActivity.CUDA not in supported_activities():
        return {}
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    ran = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    ran.sort(key=lambda event: event.self_device_time_total, reverse=True)
    return {event.key: event.count for event in ran[:most]}


def once(calls: Mapping[str, Call]) -> None:
    """Calls each where a profiler sees it that begins and ends where cudaProfilerStart and -Stop say."""
    for call in calls.values():
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def captured(call: Call) -> Call:
    """The call as a CUDA graph that is replayed; what it returns is the same memory each time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is done once only must not be in the graph
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


# For as long as its parent lives.
SPIN = """
import os, sys
parent, core = map(int, sys.argv[1:])
os.sched_setaffinity(0, [core])
print("spinning", flush=True)
while os.getppid() == parent: pass
"""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keeps the first `count` cores busy with another process each."""
    command = [sys.executable, "-c", SPIN, str(os.getpid())]
    cores = usable_cores()[:count]
    processes = [subprocess.Popen([*command, str(core)], stdout=subprocess.PIPE) for core in cores]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def latencies(case: Case, calls: Mapping[str, Call], number: int) -> dict[str, dict[str, float]]:
    """As `time_each`, beside as many busy processes as the case has."""
    torch.set_num_threads(case.threads)
    with neighbours(case.busy):
        return time_each(calls, number)


def measure(case: Case, calls: Mapping[str, Call], seconds: float) -> dict[str, tuple[float, float]]:
    """Median and interquartile range [µs] of the calls of a case."""
    with neighbours(case.busy):
        return time_cuda(calls, seconds) if case.device == "cuda" else time_cpu(calls, case.threads, seconds)
