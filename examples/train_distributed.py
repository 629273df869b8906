"""Trains an LSTM in several processes, stops, and goes on from a checkpoint, with PyTorch's own distributed tools.

The task is the adding problem: each step of a sequence brings a number and a mark, two of the marks are set, and the
network is asked at the end for the sum of the two marked numbers. Guessing 1 all the time leaves a squared error of
0.167; lower means that the network carries numbers over time.

    torchrun --nproc-per-node 2 examples/train_distributed.py                  # DDP; gloo on CPUs, nccl on GPUs
    torchrun --nproc-per-node 2 examples/train_distributed.py --strategy fsdp  # FSDP2: parameters in shards
    torchrun --nproc-per-node 2 examples/train_distributed.py --steps 400      # goes on from the last checkpoint

The batch is shared out among the processes, so any number of them trains on the same sequences, and a checkpoint taken
by some processes is read by any other number. Every step draws its sequences from its own number, so a resumed run
sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lstm_ext


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it is, and the defaults."""


class Adder(nn.Module):
    """Reads [B, T, 2] and gives one number for each sequence: [B, 1]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(2, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, 1)
        forget = slice(hidden_size, 2 * hidden_size)  # the gates stand in the order i, f, g, o
        nn.init.ones_(self.lstm.bias_ih_l0.data[forget])

    def forward(self, x: Tensor) -> Tensor:
        _, (h_n, _) = self.lstm(x)
        return self.head(h_n[-1])


def draw(step: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """The sequences [B, T, 2] of a step, the same in every process, and their sums [B, 1]."""
    generator = torch.Generator().manual_seed(step)
    numbers = torch.rand(batch, length, generator=generator)
    first = torch.randint(0, length // 2, (batch, 1), generator=generator)
    second = torch.randint(length // 2, length, (batch, 1), generator=generator)
    marks = torch.zeros(batch, length).scatter_(1, first, 1.0).scatter_(1, second, 1.0)
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(1, keepdim=True)


def distribute(model: Adder, strategy: str, device: torch.device) -> nn.Module:
    """The model as DDP, which copies it, or FSDP2, which cuts its parameters in shards, trains it."""
    if strategy == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (model.lstm, model):  # each gathers its own parameters just before it runs
        fully_shard(module, mesh=mesh)
    return model


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Each process writes its part; the folder gets its name when all have, so that what has one is whole."""
    weights, moments = get_state_dict(model, optimizer)
    unfinished = folder / "unfinished"
    dcp.save({"model": weights, "optimizer": moments, "step": step}, checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        unfinished.rename(folder / f"step-{step:06d}")
    dist.barrier()


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Puts the last checkpoint, if there is one, into the model and the optimizer; returns the steps done."""
    checkpoints = sorted(folder.glob("step-*"))
    if not checkpoints:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "step": 0}
    dcp.load(state, checkpoint_id=checkpoints[-1])
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def train(arguments: argparse.Namespace, device: torch.device) -> None:
    """Trains up to `arguments.steps`; the first process prints the losses of the whole batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if arguments.batch % world_size:
        raise SystemExit(f"--batch: expected a multiple of the {world_size} processes, got {arguments.batch}")
    torch.manual_seed(0)  # the same first weights everywhere
    model = distribute(Adder(arguments.hidden_size).to(device), arguments.strategy, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    done = resume(arguments.checkpoints, model, optimizer)
    if rank == 0:
        print(f"{world_size} processes, {device.type}, {arguments.strategy}, from step {done}", flush=True)
        if done >= arguments.steps:
            print(f"All {arguments.steps} steps are done: --steps asks for more, --checkpoints begins anew elsewhere.")

    for step in range(done + 1, arguments.steps + 1):
        x, target = (a.chunk(world_size)[rank].to(device) for a in draw(step, arguments.batch, arguments.length))
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()  # DDP and FSDP average the gradients of the processes here
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        if step % arguments.log_every == 0:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step:6d}  loss {mean.item() / world_size:.6f}", flush=True)
        if step % arguments.save_every == 0 or step == arguments.steps:
            save(arguments.checkpoints, model, optimizer, step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp", help="who shares out the model")
    parser.add_argument("--steps", type=int, default=300, help="how many steps have been done at the end")
    parser.add_argument("--batch", type=int, default=64, help="sequences of a step, of all processes together")
    parser.add_argument("--length", type=int, default=16, help="steps of a sequence")
    parser.add_argument("--hidden-size", type=int, default=32, help="units of the LSTM")
    parser.add_argument("--log-every", type=int, default=20, help="steps from one line to the next")
    parser.add_argument("--save-every", type=int, default=100, help="steps from one checkpoint to the next")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder of the checkpoints")
    arguments = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=5), device_id=device if cuda else None)
    try:
        train(arguments, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
