"""Run by `torchrun` in tests/test_distributed.py: modules on DTensors against the same modules on whole tensors.

torchrun … distributed_tensors.py
"""

from __future__ import annotations

import copy
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import lstm_ext

BROUGHT_BY_LSTM_EXT = "torch.distributed.tensor" in sys.modules  # where this file is run

from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor  # noqa: E402
from torch.distributed.tensor.debug import CommDebugMode  # noqa: E402
from torch.distributed.tensor.experimental import implicit_replication  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

T, I, H = 4, 3, 5  # noqa: E741
OPTIONS: list[dict[str, Any]] = [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "proj_size": 2}]


def check(module: Any, arguments: tuple[Any, ...], placements: list[Any], **masks: Any) -> None:
    """Values, gradients, where the outputs are, and that forward nothing is sent."""
    whole = copy.deepcopy(module)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    distribute_module(module, mesh)
    x, *state = (distribute_tensor(a, mesh, [p]) for a, p in zip(arguments, placements, strict=True))
    own_masks = {name: distribute_tensor(a, mesh, [p]) for name, (a, p) in masks.items()}
    with implicit_replication(), CommDebugMode() as sent:
        outputs = tree_leaves(module(x, tuple(state) or None, **own_masks))
    assert not sent.get_comm_counts(), sent.get_comm_counts()
    plain_masks = {name: a for name, (a, _) in masks.items()}
    expected = tree_leaves(whole(arguments[0], arguments[1:] or None, **plain_masks))
    for a, e in zip(outputs, expected, strict=True):
        assert isinstance(a, DTensor)
        assert a.placements[0].is_replicate() == placements[0].is_replicate()
        torch.testing.assert_close(a.full_tensor(), e)
    sum(a.sin().sum() for a in outputs).backward()
    sum(e.sin().sum() for e in expected).backward()
    for a, e in zip(module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), e.grad)


def main() -> None:
    assert not BROUGHT_BY_LSTM_EXT
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    for rows in (4, 5):  # of 5, one process has 3
        for dtype in (torch.float32, torch.float64):
            for options in OPTIONS:
                x, batch = torch.randn(T, rows, I, dtype=dtype), 1
                if options.get("batch_first"):
                    x, batch = x.transpose(0, 1).contiguous(), 0
                for placement in (Replicate(), Shard(batch)):
                    check(lstm_ext.LSTM(I, H, dtype=dtype, **options), (x,), [placement])
            state = tuple(torch.randn(rows, H, dtype=dtype) for _ in range(2))
            for placement in (Replicate(), Shard(0)):
                check(lstm_ext.LSTMCell(I, H, dtype=dtype), (x[:, 0], *state), [placement] * 3)
        lengths = torch.tensor([4, 1, 0, 3, 2][:rows])
        masks = {"lengths": (lengths, Shard(0)), "resets": (torch.rand(T, rows) < 0.3, Shard(1))}
        check(lstm_ext.LSTM(I, H, bidirectional=True), (torch.randn(T, rows, I),), [Shard(1)], **masks)
    dist.barrier()
    if dist.get_rank() == 0:
        print("all agree")
    sys.stdout.flush()
    os._exit(0)  # gloo's threads have been seen to abort a process that had done its work


if __name__ == "__main__":
    main()
