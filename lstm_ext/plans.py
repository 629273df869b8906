"""How a layer would run on a GPU, and why so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import _native
from .engines import backends


@dataclass(frozen=True)
class Plan:
    """The way in which one pass of a layer runs on a GPU.

    Attributes:
        strategy: "block" (one block for some sequences), "cluster" (a thread-block cluster for some), "grid" (blocks
            all over the GPU for some), all of which keep the recurrent weights on chip; or "step" (a launch a step).
        blocks: blocks in the launch.
        team: blocks that share the work on the same sequences.
        registers: of a thread.
        shared_bytes: shared memory of a block.
        microseconds_per_step: predicted by the cost model (csrc/cuda/COST_MODEL.md), for one step of the whole batch.
        refused: why each other strategy was not taken.
    """

    strategy: str
    blocks: int
    team: int
    registers: int
    shared_bytes: int
    microseconds_per_step: float
    refused: dict[str, str]


def plan(
    num_steps: int,
    batch_size: int,
    hidden_size: int,
    *,
    proj_size: int = 0,
    dtype: Any = "float32",
    bidirectional: bool = False,
    backward: bool = False,
    tf32: bool = True,
    strategy: str | None = None,
    device: int = 0,
) -> Plan:
    """How one pass over a layer runs on a GPU.

    Args:
        num_steps: T.
        batch_size: B.
        hidden_size: H.
        proj_size: P, the width of h with a projection; 0 is none.
        dtype: of torch or NumPy, or its name.
        bidirectional: both directions, which run in one launch.
        backward: the backward pass instead of the forward one.
        tf32: whether float32 may be multiplied as TF32 (as `torch.backends.cudnn.rnn.fp32_precision` says).
        strategy: asks about one; None for the one that would be chosen.
        device: number of the GPU.

    Raises:
        RuntimeError: there is no GPU, or the strategy cannot run this.
        ValueError: a size out of range, a dtype or a strategy unknown.
    """
    sizes = {"num_steps": num_steps, "batch_size": batch_size, "hidden_size": hidden_size}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if proj_size < 0:
        raise ValueError(f"proj_size: expected at least 0, got {proj_size}")
    cuda = backends()["cuda"]
    if not cuda.available:
        raise RuntimeError(f"plan: the backend 'cuda' is not available: {cuda.reason}")
    return Plan(
        **_native.C.cuda_plan(
            *(num_steps, batch_size, hidden_size, proj_size, proj_size > 0, str(dtype).removeprefix("torch."), tf32),
            *(2 if bidirectional else 1, backward, strategy or "", device),
        )
    )
