"""Run by `torchrun` in tests/test_distributed.py: trains `Model` in every process and saves what came out of it.

torchrun … distributed_training.py FOLDER STRATEGY …
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lstm_ext

B, T, I, H, STEPS = 8, 6, 5, 9, 3  # noqa: E741


class Model(nn.Module):
    """Nothing in it depends on the number of threads."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(I, H, 2, batch_first=True, bidirectional=True)
        self.cell = lstm_ext.LSTMCell(2 * H, H)

    def forward(self, x: Any) -> Any:
        y, (h_n, c_n) = self.lstm(x)
        h, c = self.cell(y[:, 2], (h_n[0], c_n[1]))
        return h + c


def make() -> tuple[Model, Any]:
    """The first weights and the whole batch."""
    torch.manual_seed(0)
    return Model(), torch.randn(B, T, I)


def loss_of(model: Any, x: Any) -> Any:
    return model(x).square().mean()


def distribute(model: Model, strategy: str) -> Any:
    if strategy.startswith("ddp"):
        return DistributedDataParallel(model, gradient_as_bucket_view=strategy == "ddp-views")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if strategy == "fsdp-bfloat16" else MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.lstm, model.cell, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def train(strategy: str) -> list[Any]:
    """The parameters that come out."""
    model, x = make()
    model, x = distribute(model, strategy), x.chunk(dist.get_world_size())[dist.get_rank()]
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    parameters = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return [p.detach().clone() for p in parameters]


def main() -> None:
    folder, *strategies = sys.argv[1:]
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    trained = {strategy: train(strategy) for strategy in strategies}
    torch.save(trained, Path(folder, f"rank-{dist.get_rank()}.pt"))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads have been seen to abort a process that had done its work


if __name__ == "__main__":
    main()
