"""How a layer would run on a device, and why so."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, overload

from . import _native, gpus, measured
from .cell import make_cell
from .engines import backends


@dataclass(frozen=True)
class Plan:
    """The way in which one pass of a layer runs on a GPU.

    Attributes:
        strategy: "block" (one block for some sequences), "cluster" (a thread-block cluster for some), "grid" (blocks
            all over the GPU for some), all of which keep the recurrent weights on chip; or "step" (a launch
            a step, two with a projection, and one more with layer normalisation).
        blocks: blocks in the launch, or the first of a step.
        team: blocks that share the work on the same sequences.
        registers: of a thread; None for a GPU by name, since the GPU's own driver tells them.
        shared_bytes: shared memory of a block.
        microseconds_per_step: for one step of the whole batch: measured on this GPU, or predicted by the cost model
            (csrc/cuda/COST_MODEL.md), whose constants are fitted to bfloat16 on an H100.
        source: of the time, and of the choice: "model", or "measured at" which shape, the nearest of those that `tune`
            has timed, and when.
        sm_margin: multiprocessors that are left to others: see `set_sm_margin`.
        kernel: the name of the kernel, as profilers and self-checks have it; None for a GPU by name.
        refused: why each other strategy was not taken.

    Example:
        >>> plan = lstm_ext.plan(num_steps=512, batch_size=16, hidden_size=256, dtype="bfloat16", device="A100")
        >>> plan.refused["cluster"]
        'no clusters before compute capability 9.0'
    """

    strategy: str
    blocks: int
    team: int
    registers: int | None
    shared_bytes: int
    microseconds_per_step: float
    source: str
    sm_margin: int
    kernel: str | None
    refused: dict[str, str]


class Frozen(Protocol):
    """A module that `freeze` has made."""

    hidden_size: int

    def plans(self, num_steps: int, batch_size: int, num_threads: int) -> list[dict[str, Any]]:
        """How each layer would run."""


@dataclass(frozen=True)
class CpuPlan:
    """The way in which one pass of a layer runs on the CPU; csrc/cpu/plan.cpp decides it, and says what each number is.

    Attributes:
        engine: "vectors", or "tiles" where the processor has tile registers (AMX).
        in_place: whether w_ih, w_hh and w_hr are multiplied as they lie; if not, they are packed into panels first.
        one_sum: whether x W_ih' and h W_hh' of a step are one sum.
        alone: whether it is one sequence of a narrow layer, whose steps are computed one by one with several sums for
            each gate: where no lengths or resets are given.
        borrow_x: whether x is multiplied where it lies; if not, its rows are copied.
        chunk_steps: steps whose inputs are multiplied at once.
        depth: of a block of each product, x W_ih' and h W_hh', in elements of a row.
        threads: that work on it.
        by_rows: whether they share out the rows of the batch; if not, the units.
        why: of engine, chunk_steps and threads.
    """

    engine: str
    in_place: tuple[bool, bool, bool]
    one_sum: bool
    alone: bool
    borrow_x: bool
    chunk_steps: int
    depth: tuple[int, int]
    threads: int
    by_rows: bool
    why: dict[str, str]


@overload
def plan(  # type: ignore[overload-overlap]
    num_steps: int,
    batch_size: int,
    hidden_size: int,
    *,
    input_size: int | None = None,
    proj_size: int = 0,
    dtype: Any = "float32",
    bidirectional: bool = False,
    backward: bool = False,
    num_threads: int = 0,
    device: Literal["cpu"],
) -> CpuPlan: ...
@overload
def plan(num_steps: int, batch_size: int, hidden_size: Frozen, *, num_threads: int = 0) -> list[CpuPlan]: ...
@overload
def plan(
    num_steps: int,
    batch_size: int,
    hidden_size: int,
    *,
    input_size: int | None = None,
    proj_size: int = 0,
    dtype: Any = "float32",
    bidirectional: bool = False,
    backward: bool = False,
    tf32: bool = True,
    strategy: str | None = None,
    options: Mapping[str, Any] | None = None,
    device: int | str = 0,
) -> Plan: ...
def plan(
    num_steps: int,
    batch_size: int,
    hidden_size: int | Frozen,
    *,
    input_size: int | None = None,
    proj_size: int = 0,
    dtype: Any = "float32",
    bidirectional: bool = False,
    backward: bool = False,
    tf32: bool = True,
    strategy: str | None = None,
    num_threads: int = 0,
    options: Mapping[str, Any] | None = None,
    device: int | str = 0,
) -> Plan | CpuPlan | list[CpuPlan]:
    """How one pass over a layer runs on a device.

    Args:
        num_steps: T.
        batch_size: B.
        hidden_size: H; or a module that `freeze` has made, of which nothing but `num_threads` need be told more.
        input_size: I; None is H. On a GPU x W_ih' is no part of the plan.
        proj_size: P, the width of h with a projection; 0 is none.
        dtype: of torch or NumPy, or its name.
        bidirectional: both directions, which run in one launch or call.
        backward: the backward pass instead of the forward one.
        tf32: whether float32 may be multiplied as TF32 on a GPU (`torch.backends.cudnn.rnn.fp32_precision`).
        strategy: of a GPU: asks about one; None for the one that would be chosen.
        num_threads: of the CPU: how many there are at most; 0 is what torch uses if it is imported, else
            OMP_NUM_THREADS or the usable processors.
        options: of a GPU: those of the cell, as `LSTM` takes them, such as {"peephole": True}; None for the plain LSTM.
        device: "cpu"; "cuda", "cuda:1" and so on, or the number of the GPU; or the name of one that need not be
            there, such as "H100", "A100" or "RTX 4090".

    Returns:
        `CpuPlan` for device="cpu", else `Plan`. Of a frozen module a list, for each of its layers.

    Raises:
        RuntimeError: the backend is not available, the strategy cannot run this, or sizes are beyond any computer.
        ValueError: a size out of range; a dtype, a strategy, an option or a device unknown; `strategy` or `options`
            for the CPU, `num_threads` for a GPU.

    Example:
        >>> lstm_ext.plan(50, 1, 32, device="cpu", num_threads=2).threads  # so few units are faster on one of two
        1
        >>> lstm_ext.plan(1, 16, 768, dtype="bfloat16", device="H100").strategy
        'step'
    """
    frozen = None if isinstance(hidden_size, int) else hidden_size
    units = hidden_size if isinstance(hidden_size, int) else hidden_size.hidden_size
    sizes = {"num_steps": num_steps, "batch_size": batch_size, "hidden_size": units}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    for name, size in {"proj_size": proj_size, "input_size": input_size or 0, "num_threads": num_threads}.items():
        if size < 0:
            raise ValueError(f"{name}: expected at least 0, got {size}")
    if frozen is not None:
        return [CpuPlan(**each) for each in frozen.plans(num_steps, batch_size, num_threads or _torchs_threads())]
    kind, _, number = str(device).partition(":")
    named = None if isinstance(device, int) else gpus.named(str(device))
    if not isinstance(device, int) and not named and (kind not in ("cpu", "cuda") or not (number or "0").isdigit()):
        names = f"'cpu', 'cuda', 'cuda:N', the number of a GPU or one of {', '.join(gpus.GPUS)}"
        raise ValueError(f"device: expected {names}, got {device!r}")
    if kind == "cpu" and strategy is not None:
        raise ValueError(f"strategy: only plans of a GPU have one, got {strategy!r} with device='cpu'")
    if kind == "cpu" and options is not None:
        raise ValueError(f"options: only plans of a GPU differ with them, got {options!r} with device='cpu'")
    if kind != "cpu" and num_threads:
        raise ValueError(f"num_threads: only plans of the CPU have them, got {num_threads} with device={device!r}")
    backend = backends()["cpu" if kind == "cpu" or named else "cuda"]
    if not backend.available:
        hint = "" if kind == "cpu" or named else "; a GPU that is not here goes by its name, as in device='H100'"
        what = "needs the compiled module" if named else f"the backend {backend.name!r} is not available"
        raise RuntimeError(f"plan: {what}: {backend.reason}{hint}")
    projected, dtype_name, D = proj_size > 0, str(dtype).removeprefix("torch."), 2 if bidirectional else 1
    if kind == "cpu":
        width = units if input_size is None else input_size
        num_threads = num_threads or _torchs_threads()
        layer = (num_steps, batch_size, width, units, proj_size, projected, dtype_name, D, backward)
        return CpuPlan(**_native.C.cpu_plan(*layer, num_threads))
    steps = (num_steps, batch_size, units, proj_size, projected, dtype_name, tf32, D, backward, strategy or "")
    cell = None if options is None else make_cell(**options, projected=projected).simplified()
    if named:
        limits = (named.compute_capability, named.sms, named.gpcs, named.shared_bytes, named.boost_mhz * 1000)
        return Plan(**_native.C.gpu_plan(*steps, *limits, cell), registers=None, kernel=None)
    index = device if isinstance(device, int) else int(number or 0)
    measured.hand_over(index)
    return Plan(**_native.C.cuda_plan(*steps, index, cell))


def _torchs_threads() -> int:
    """As many as torch uses; 0 if it is not imported."""
    return sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 0


class set_sm_margin:  # a function to its users, as torch.set_grad_enabled is
    """Leaves some multiprocessors (SMs) of each GPU to other kernels, such as NCCL's, from now on.

    A layer that keeps its weights on the chip has its multiprocessors until its last step. Where it has all of them, a
    reduction of gradients that DistributedDataParallel or FSDP has started on another stream waits for its end, and
    nothing overlaps. With a margin no launch for all steps has more blocks than there are multiprocessors besides it.
    NCCL takes one for each of its channels: NCCL_MAX_CTAS bounds them, and is what to give here. The strategy "step"
    needs no margin: its launches are short.

    It counts for the whole process, also for backward passes on autograd's threads. The default is what
    LSTM_EXT_SM_MARGIN says, else 0: fewer multiprocessors make a layer slower, how many NCCL takes depends on its
    version and on the machine, and a margin that came with a process group would let the bits of a result depend on it.
    As a context manager it restores the former value.

    Args:
        margin: how many.

    Raises:
        ValueError: less than 0.

    Example:
        >>> with lstm_ext.set_sm_margin(16):
        ...     lstm_ext.plan(512, 64, 1024, dtype="bfloat16", device="H100", strategy="grid").blocks <= 132 - 16
        True
    """

    def __init__(self, margin: int):
        if margin < 0:
            raise ValueError(f"margin: expected at least 0, got {margin}")
        self._former = 0 if _native.reason else _native.C.sm_margin()
        if not _native.reason:
            _native.C.set_sm_margin(margin)

    def __enter__(self) -> None:
        """The value is set already."""

    def __exit__(self, *_: object) -> None:
        if not _native.reason:
            _native.C.set_sm_margin(self._former)
