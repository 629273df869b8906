"""A kernel that cannot run says so once: it is not tried again, and its error reaches the user as it was."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lstm_ext
from lstm_ext import engines, route
from lstm_ext.call import FORWARD, LayerCall, Save

from .conftest import count_runs, needs_native
from .test_process import succeed

PACKAGE = Path(__file__).parents[1] / "lstm_ext"
MANY = 2**23  # y [MANY, MANY, 1] is larger than what a process can address, and x one number


# Out of memory -------------------------------------------------------------------------------------------------------


def huge_array() -> np.ndarray:
    return np.broadcast_to(np.zeros((1, 1, 1), np.float32), (MANY, MANY, 1))


def huge_tensor() -> torch.Tensor:
    return torch.zeros(1, 1, 1).expand(MANY, MANY, 1)


def weights(requires_grad: bool = False) -> list[torch.Tensor]:
    return [torch.ones(4, 1, requires_grad=requires_grad) for _ in range(2)]


def without_gradients() -> Any:
    with torch.no_grad():
        return lstm_ext.LSTM(1, 1)(huge_tensor())


HUGE_CALLS: dict[str, Callable[[], Any]] = {
    "arrays": lambda: lstm_ext.lstm(huge_array(), None, *(w.numpy() for w in weights())),
    "tensors": lambda: lstm_ext.lstm(huge_tensor(), None, *weights()),
    "tensors that ask for gradients": lambda: lstm_ext.lstm(huge_tensor(), None, *weights(True)),
    "module in inference": without_gradients,
    "module in training": lambda: lstm_ext.LSTM(1, 1)(huge_tensor()),
    "several layers": lambda: lstm_ext.LSTM(1, 1, 3)(huge_tensor()),
    "route": lambda: route.run(LayerCall(huge_tensor(), None, None, weights(), None, None, None, FORWARD, False)),
    "op": lambda: torch.ops.lstm_ext.layer_forward(huge_tensor(), None, None, weights(), *[None] * 3, 0, False, 0),
    "op that saves": lambda: torch.ops.lstm_ext.layer_forward(
        huge_tensor(), None, None, weights(True), *[None] * 3, 0, False, Save.ALL
    ),
}


@needs_native
@pytest.mark.parametrize("name", HUGE_CALLS)
def test_out_of_memory_is_said_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the allocator says it, and without another try."""
    with lstm_ext.use_backend("cpu"):
        counts = count_runs(engines.choose("cpu", torch.float32).engine, monkeypatch)
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            HUGE_CALLS[name]()
    assert counts == {"forward": 1, "backward": 0}
    allocate = np.empty if name == "arrays" else torch.empty
    with pytest.raises((MemoryError, RuntimeError)) as expected:
        allocate((MANY, MANY, 1), dtype=(np if name == "arrays" else torch).float32)
    assert str(caught.value).splitlines()[0] == str(expected.value).splitlines()[0]
    assert caught.value.__cause__ is caught.value.__context__ is None


BACKWARD_WITHOUT_MEMORY = """
import pathlib, resource, torch, lstm_ext
from lstm_ext import engines
lstm_ext.LSTM(1, 1)(torch.ones(1, 1, 1))[0].sum().backward()  # what is loaded only once
engine, ran = engines.choose("cpu", torch.float32).engine, []
backward = engine.backward
engine.backward = lambda *arguments: ran.append(1) or backward(*arguments)
x = torch.zeros(1, 1, 2**21).expand(16, 16, 2**21).requires_grad_()  # dx takes 2 GiB
weights = torch.zeros(4, 2**21), torch.zeros(4, 1)
y, _ = lstm_ext.lstm(x, None, *weights)
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, resource.RLIM_INFINITY))
try:
    y.sum().backward()
except (MemoryError, RuntimeError) as error:
    print(type(error).__name__, str(error).splitlines()[0], len(ran))
"""


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process as Linux does")
def test_a_backward_pass_without_memory_says_so_once() -> None:
    said = succeed(BACKWARD_WITHOUT_MEMORY).strip()
    assert said.startswith(("MemoryError", "RuntimeError")), said
    assert f"tried to allocate {2**31} bytes" in said
    assert said.endswith(" 1"), said


def test_other_errors_of_an_engine_arrive_as_they_are(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any kind: none is taken for a call that another way might serve."""
    engine = engines.choose("cpu", torch.float32).engine
    module, x = lstm_ext.LSTM(2, 3), torch.zeros(2, 2, 2)
    y, _ = module(x)
    for error in (RuntimeError, TypeError, ValueError, AttributeError, KeyError, NotImplementedError, MemoryError):
        ran: list[Exception] = []

        def fail(*_: Any, error: type[Exception] = error, ran: list[Exception] = ran) -> Any:
            ran.append(error("no"))
            raise ran[-1]

        with monkeypatch.context() as patch:
            patch.setattr(engine, "forward", fail)
            patch.setattr(engine, "backward", fail)
            for call in (
                torch.no_grad()(lambda: module(x)),
                lambda: module(x),
                lambda: lstm_ext.lstm(x.numpy(), None, *(w.detach().numpy() for w in list(module.parameters())[:2])),
                lambda: y.sum().backward(retain_graph=True),
            ):
                ran.clear()
                with pytest.raises(error) as caught:
                    call()
                assert [caught.value] == ran


@pytest.mark.parametrize("cell", [False, True])
def test_errors_of_an_engine_arrive_under_autocast_too(
    cell: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the dtypes are mixed before it casts."""
    module = lstm_ext.LSTMCell(2, 3) if cell else lstm_ext.LSTM(2, 3, 2)
    x, h = (torch.zeros(2, 2), torch.zeros(2, 3)) if cell else (torch.zeros(4, 2, 2), torch.zeros(2, 2, 3))

    def fail(*_: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(engines.choose("cpu", torch.float32).engine, "forward", fail)
    for args in ((x,), (x.bfloat16(),), (x, (h.bfloat16(), h.bfloat16()))):
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match=r"\Ano\Z"):
            module(*args)


# In the sources ------------------------------------------------------------------------------------------------------

AROUND_KERNELS = [PACKAGE / f"{name}.py" for name in ("nn", "route", "torch_op", "functional")]
RUNS = {"forward", "backward", "layer_forward", "layer_backward", "run", "differentiable", "apply"}


def runs_a_kernel(node: ast.AST) -> bool:
    """Whether a call in it is one of a function of the core, or of an engine, or of what runs them."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            *owner, name = ast.unparse(call.func).split(".")
            if owner[-1:] == ["C"] or name.lstrip("_") in RUNS or name.startswith(("_run", "cuda_")):
                return True
    return False


def catches(node: ast.AST) -> list[ast.stmt]:
    """The statements whose exceptions it catches, unless it looks whether they were about an argument."""
    if isinstance(node, ast.Try) and node.handlers:
        return [] if any("self._are_wrong(" in ast.unparse(handler) for handler in node.handlers) else node.body
    suppresses = isinstance(node, ast.With) and any("suppress" in ast.unparse(item) for item in node.items)
    return node.body if suppresses and isinstance(node, ast.With) else []


def test_no_except_stands_around_a_kernel() -> None:
    paths = [*AROUND_KERNELS, *sorted((PACKAGE / "engines").glob("*.py"))]
    trees = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    assert all(runs_a_kernel(trees[name]) for name in ("nn.py", "route.py", "torch_op.py", "functional.py", "cuda.py"))
    for name, tree in trees.items():
        for node in ast.walk(tree):
            for statement in catches(node):
                assert not runs_a_kernel(statement), f"{name}:{statement.lineno}: {ast.unparse(statement)}"
