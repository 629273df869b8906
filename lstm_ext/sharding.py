"""What our operators do with DTensors, over a mesh of devices: imported once there are any.

Each device runs the operator on what it has. A mesh dimension over which the batch is sharded stays so, with whole
weights on each device: forward nothing is sent, and the gradients of the weights are partial sums. Over any other,
every device computes all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ._torch_private import implicit_replication_allowed


def _batch_axes(batch_first: bool) -> dict[str, int]:
    """The axis of the batch in each argument that has one."""
    sequence = 0 if batch_first else 1
    return {
        **dict.fromkeys(("x", "y", "dy", "resets"), sequence),
        **dict.fromkeys(("h0", "c0", "dh_n", "dc_n"), 1),
        **dict.fromkeys(("cells", "gates", "dcells"), 2),
        "lengths": 0,
    }


def _run(op: Any, arguments: Sequence[Any]) -> list[Any]:
    """The operator on DTensors; plain tensors beside them count as replicated where torch allows it."""
    # torch leaves out those at the end that are None by default.
    named: dict[str, Any] = {a.name: None for a in op._schema.arguments}
    named |= zip(named, arguments, strict=False)
    axes = _batch_axes(named["batch_first"])
    given = [a for value in named.values() for a in (value if isinstance(value, list) else [value])]
    mesh = next(a.device_mesh for a in given if isinstance(a, DTensor))
    sharded = [False] * mesh.ndim  # whether by the batch, for each dimension of the mesh
    if named["batch_sizes"] is None and named["seed"] is None:  # masks are drawn by the number of a row
        for name, axis in axes.items():
            if isinstance(a := named.get(name), DTensor):
                sharded = [s or p.is_shard(axis) for s, p in zip(sharded, a.placements, strict=True)]

    def local(a: Any, axis: int | None) -> Any:
        if isinstance(a, list):
            return [local(each, axis) for each in a]
        if not isinstance(a, Tensor):
            return a
        if not isinstance(a, DTensor):
            if not implicit_replication_allowed():
                raise RuntimeError(f"{op}: expected DTensors alone, got a torch.Tensor among them")
            a = DTensor.from_local(a, mesh, [Replicate()] * mesh.ndim, run_check=False)
        placed = [Shard(axis) if s and axis is not None and axis < a.dim() else Replicate() for s in sharded]
        # detached, as all is below autograd: in a backward pass torch 2.11 redistributes none that asks for a gradient
        return a.detach().redistribute(mesh, placed).to_local()

    x, sequence = named["x"], axes["x"]
    results = op(*(local(a, axes.get(name)) for name, a in named.items()))

    def whole(a: Any, axis: int) -> Any:
        if isinstance(a, list):  # gradients of the weights, each over the rows that a device has
            return [DTensor.from_local(d, mesh, [Partial() if s else Replicate() for s in sharded]) for d in a]
        if a.dim() == 1:  # an output that was not asked for
            return DTensor.from_local(a, mesh, [Replicate()] * mesh.ndim, run_check=False)
        shape = list(a.shape)
        if any(sharded):
            shape[axis] = x.shape[sequence]
        stride = torch.empty(shape, device="meta").stride()
        placed = [Shard(axis) if s else Replicate() for s in sharded]
        return DTensor.from_local(a, mesh, placed, run_check=False, shape=torch.Size(shape), stride=stride)

    return [whole(a, axis) for a, axis in zip(results, (sequence, 1, 1, 2, 2), strict=False)]


def register(op: Any) -> None:
    """Gives an operator its rule."""

    def rule(cls: Any, func: Any, types: Any, arguments: Any = (), options: Any = None) -> tuple[Any, ...]:
        return tuple(_run(func, arguments))

    torch.library.register_torch_dispatch(op.name(), DTensor, rule)
