"""A small server: many sessions, some threads, one frozen model.

Each session is a stream of its own and has its own state; the weights are packed once and shared. Frames arrive in any
order, a frame of a session never before the one before it. The kernels let other threads run, so that they share the
cores.

    python examples/serve_threads.py              # 3 s of two cores
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

import lstm_ext

FEATURES, UNITS, FRAMES = 64, 256, 10  # of a frame, of each of two layers, frames in a request


class Session:
    """What one client has: its state, where its answers are written, and its requests, of which one runs at a time."""

    def __init__(self, model: lstm_ext.FrozenLSTM, requests: np.ndarray) -> None:
        self.stream = model.stream(batch_size=1)
        self.requests = requests  # [number, FRAMES, 1, FEATURES]
        self.answers = np.empty((*requests.shape[:-1], UNITS), np.float32)
        self.done = 0

    def serve(self) -> bool:
        """Answers the next request; whether there is another."""
        self.stream(self.requests[self.done], out=self.answers[self.done])
        self.done += 1
        return self.done < len(self.requests)


def serve(sessions: Sequence[Session], threads: int) -> float:
    """Answers all requests of all sessions; seconds taken."""
    ready: queue.SimpleQueue[Session | None] = queue.SimpleQueue()
    bar = tqdm(total=sum(len(session.requests) for session in sessions), desc=f"{threads} threads", disable=None)
    left, lock = len(sessions), threading.Lock()

    def work() -> None:
        nonlocal left
        while (session := ready.get()) is not None:
            more = session.serve()
            with lock:
                bar.update()
                left -= not more
                last = left == 0
            if more:
                ready.put(session)
            elif last:
                for _ in range(threads):
                    ready.put(None)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    start = time.perf_counter()
    for session in sessions:
        ready.put(session)
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    bar.close()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> dict[int, float]:
    """Requests a second by the number of threads."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", type=int, default=20, help="default: 20")
    parser.add_argument("--requests", type=int, default=100, help="of each session; default: 100")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # in a call; the server has threads of its own
    torch.manual_seed(0)
    lstm = lstm_ext.LSTM(FEATURES, UNITS, num_layers=2)
    model = lstm_ext.freeze(lstm)
    print(model)
    shape = (arguments.sessions, arguments.requests, FRAMES, 1, FEATURES)
    requests = np.random.default_rng(0).standard_normal(shape, np.float32)

    rates = {}
    for threads in (1, 2):
        sessions = [Session(model, each) for each in requests]
        rates[threads] = requests[..., 0, 0, 0].size / serve(sessions, threads)
    with torch.inference_mode():  # all requests of the first session in one call
        expected, _ = lstm(torch.from_numpy(requests[0].reshape(-1, 1, FEATURES)))
    difference = np.abs(sessions[0].answers.reshape(expected.shape) - expected.numpy()).max()

    print("threads   requests a second")
    for threads, rate in rates.items():
        print(f"{threads:7} {rate:14.0f}")
    print(f"largest difference of a session's answers from one call over all its frames: {difference:.1e}")
    return rates


if __name__ == "__main__":
    main()
