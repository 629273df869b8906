"""DDP and FSDP2 on two processes against one process, and the distributed example with its checkpoints."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lstm_ext.testing import assert_close

from . import distributed_training
from .distributed_training import B, T, loss_of, make

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without torch.distributed or gloo",
)

STRATEGIES = ["ddp", "ddp-views", "fsdp", "fsdp-bfloat16"]
EXAMPLE = Path(__file__).parents[1] / "examples" / "train_distributed.py"


def torchrun(script: str, *arguments: str, processes: int = 2, timeout: float = 180) -> str:
    """What the processes print; when the time is up, all of them are killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with subprocess.Popen(
        [*command, script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).anchor,  # away from the sources, which would hide the package that is installed
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"not done after {timeout} s:\n{output}")
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The parameters that each of two processes has after as many steps, by strategy; to start them takes longest."""
    folder = tmp_path_factory.mktemp("trained")
    torchrun(distributed_training.__file__, str(folder), *STRATEGIES)
    first, second = (torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1))
    return {strategy: [first[strategy], second[strategy]] for strategy in STRATEGIES}


def train_in_one_process(parts: int) -> list[Any]:
    """The parameters after as many steps; the batch in one call, or in parts whose gradients add up."""
    model, x = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(distributed_training.STEPS):
        optimizer.zero_grad()
        for part in x.chunk(parts):
            (loss_of(model, part) / parts).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("strategy", STRATEGIES[:3])
def test_two_processes_train_as_one(strategy: str, trained: dict[str, list[Any]]) -> None:
    """Bit for bit as one process that adds up the gradients of the same two halves.

    The whole batch in one call adds the same products in another order, and is as near as rounding allows.
    """
    first, second = trained[strategy]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, train_in_one_process(2), strict=True))
    for a, b in zip(first, train_in_one_process(1), strict=True):
        assert_close(a, b, "float32", terms=B * T)
    assert not any(torch.equal(a, b) for a, b in zip(first, make()[0].parameters(), strict=True))


def test_fsdp_in_mixed_precision(trained: dict[str, list[Any]]) -> None:
    """bfloat16 in the modules; the parameters, kept in float32, are the same in both processes and near to exact."""
    first, second = trained["fsdp-bfloat16"]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = train_in_one_process(1)
    for a, b in zip(first, exact, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, "bfloat16", terms=B * T)
    assert not all(torch.equal(a, b) for a, b in zip(first, exact, strict=True))


def test_tensors_over_a_mesh() -> None:
    """DTensors: replicated, and sharded by the batch, also unevenly, with masks and states."""
    assert "all agree" in torchrun(str(Path(__file__).with_name("distributed_tensors.py")))


# The example ---------------------------------------------------------------------------------------------------------


def losses_of_example(folder: Path, strategy: str, steps: int, processes: int = 2) -> dict[int, str]:
    output = torchrun(
        str(EXAMPLE),
        *("--strategy", strategy, "--steps", str(steps), "--checkpoints", str(folder), "--batch", "8"),
        *("--hidden-size", "8", "--log-every", "1", "--save-every", "3"),
        processes=processes,
    )
    assert f"{processes} processes, cpu, {strategy}" in output
    return {int(step): loss for step, loss in re.findall(r"step +(\d+)  loss ([\d.]+)", output)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, str], Path]:
    """The losses of six steps, and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    losses = losses_of_example(folder, "ddp", 6)
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert len(set(losses.values())) == 6
    assert {path.name for path in folder.iterdir()} == {"step-000003", "step-000006"}
    return losses, folder


def test_the_example_goes_on_from_its_checkpoint(uninterrupted: tuple[dict[int, str], Path], tmp_path: Path) -> None:
    """From that of step 3, as if the six steps had ended before the next one."""
    losses, folder = uninterrupted
    shutil.copytree(folder / "step-000003", tmp_path / "step-000003")
    after = losses_of_example(tmp_path, "ddp", 6)
    assert after == {step: losses[step] for step in (4, 5, 6)}
    assert {path.name for path in tmp_path.iterdir()} == {"step-000003", "step-000006"}


def test_shards_of_two_processes_are_read_by_one(uninterrupted: tuple[dict[int, str], Path], tmp_path: Path) -> None:
    """Another number of processes adds in another order."""
    losses, _ = uninterrupted
    before = losses_of_example(tmp_path, "fsdp", 3)
    assert list(before) == [1, 2, 3]
    after = losses_of_example(tmp_path, "ddp", 6, processes=1)
    assert list(after) == [4, 5, 6]
    for step, loss in (before | after).items():
        assert float(loss) == pytest.approx(float(losses[step]), abs=2e-6)
