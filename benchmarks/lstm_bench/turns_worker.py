"""A process of `turns.py`: answers each line of its input with a line, both JSON.

A case is made ready, held against torch, and answered with []; a number of seconds with the times of that many [µs];
any error with its text. It knows no more of lstm_ext than its modules, so that older builds can be timed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.benchmark import Timer

import lstm_ext

TOLERANCE = {
    "float32": 1e-3,
    "float64": 1e-9,
    "bfloat16": 0.2,
    "float16": 0.05,
}  # of a wrong order of gates, not of digits


def tensors(results: Any) -> list[torch.Tensor]:
    """All that there are, in order."""
    if isinstance(results, torch.Tensor):
        return [results]
    return [a for each in results if each is not None for a in tensors(each)]


def call_of(modules: Any, case: dict[str, Any]) -> Callable[[], Any]:
    """What is timed; of lstm_ext and torch.nn with the same numbers."""
    torch.manual_seed(0)
    T, B, I, H, dtype = *(case[name] for name in "TBIH"), getattr(torch, case["dtype"])  # noqa: E741
    if case["mode"] == "cell":
        cell, x = modules.LSTMCell(I, H, dtype=dtype), torch.randn(B, I, dtype=dtype)
        state = torch.randn(B, H, dtype=dtype), torch.randn(B, H, dtype=dtype)
        return lambda: cell(x, state)
    options = {"num_layers": case["layers"], "bidirectional": case["directions"] == 2, "proj_size": case["P"]}
    lstm = modules.LSTM(I, H, dtype=dtype, **options)
    x: Any = torch.randn(T, B, I, dtype=dtype)
    if case["mode"] == "packed":
        lengths = sorted(torch.randint((T + 3) // 4, T + 1, (B,)).tolist(), reverse=True)
        x = pack_sequence([x[:length, b] for b, length in enumerate(lengths)])
    elif case["mode"] == "training":
        leaves = [x.requires_grad_(), *lstm.parameters()]

        def train() -> Any:
            y, _ = lstm(x)
            return y, torch.autograd.grad(y.sum(), leaves)

        return train
    elif case["mode"] != "inference":
        raise ValueError(f"not timed in turn: {case['mode']}")
    return lambda: lstm(x)


def ready(case: dict[str, Any]) -> Callable[[], Any]:
    """The call of a case that is right."""
    torch.set_num_threads(case["threads"])
    call = call_of(lstm_ext, case)
    tolerance = TOLERANCE[case["dtype"]]
    for ours, theirs in zip(tensors(call()), tensors(call_of(torch.nn, case)()), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().max().clamp(min=1))
        )
    return call


def main() -> None:
    call: Callable[[], Any] = lambda: None  # noqa: E731
    case: dict[str, Any] = {}
    for line in sys.stdin:
        question, answer = json.loads(line), []
        try:
            with torch.set_grad_enabled(True):
                if isinstance(question, dict):
                    case, call = question, ready(question)
                else:
                    timer = Timer("call()", globals={"call": call}, num_threads=case["threads"])
                    with torch.inference_mode(case["mode"] != "training"):
                        measured = timer.blocked_autorange(min_run_time=question)
                    answer = [1e6 * seconds for seconds in measured.times]
        except Exception as error:  # of whatever the build does; the other process shows it
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
