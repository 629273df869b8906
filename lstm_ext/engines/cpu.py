"""The compiled kernels on the CPU, for NumPy arrays and, from `take_tensors` on, for plain tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .. import _native
from ..call import LayerCall
from ..checks import is_tensor

if not _native.reason:
    forward, backward = _native.C.layer_forward, _native.C.layer_backward


def take_tensors(types: tuple[type, ...], num_threads: Callable[[], int], library: str) -> None:
    """From now on the core takes tensors.

    Args:
        types: exactly these; their subclasses mean more than their memory.
        num_threads: tells how many threads a call with tensors uses.
        library: what shares its OpenMP threads with the core, if it has any.
    """
    _native.C.take_tensor_types(types, num_threads)
    _native.C.share_openmp_threads(library)


def way(call: LayerCall, backward: bool) -> str:
    """How a pass runs, and why so, in words."""
    if call.cell is not None and call.cell.tensorflow:
        return "weights as TensorFlow lays them out"
    tensors = is_tensor(call.x)
    dtype = str(call.x.dtype).removeprefix("torch.") if tensors else call.x.dtype.newbyteorder("=").name
    threads = sys.modules["torch"].get_num_threads() if tensors else 0
    layer = (*call.sizes(), call.projected, dtype, call.num_directions, backward)
    plan = _native.C.cpu_plan(*layer, threads)
    why, by = plan["why"], "rows" if plan["by_rows"] else "units"
    threads_said = f"{plan['threads']} by {by}" if plan["threads"] > 1 else "1"
    return (
        f"engine={plan['engine']} ({why['engine']}), chunk_steps={plan['chunk_steps']} ({why['chunk_steps']}), "
        f"threads={threads_said} ({why['threads']}), in_place={plan['in_place']}"
    )


_forced: dict[str, Any] = {}


@contextmanager
def use_plan(**way: Any) -> Iterator[None]:
    """Runs the layers inside the `with` block by a plan of which some is forced; the rest is as planned.

    For tests and benchmarks. It counts for the whole process: autograd runs backward passes on threads of its own. A
    block inside another forces more.

    Args:
        way: engine ("vectors", "tiles"), in_place (one bool, or those of w_ih, w_hh and w_hr), one_sum, chunk_steps,
            depth, threads, by_rows, as `lstm_ext.plan(…, device="cpu")` names them.

    Raises:
        ValueError: no layer could do that at the SIMD level in use; in the block, a layer cannot.
    """
    global _forced
    former, _forced = _forced, _forced | way
    try:
        _native.C.force_cpu_plan(**_forced)
        yield
    finally:
        _forced = former
        _native.C.force_cpu_plan(**_forced)
