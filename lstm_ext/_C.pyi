"""The compiled module. Arrays are NumPy arrays or tensors of the types taken; outputs are of their kind.

dtypes float32, float64, bfloat16, float16. An operation on a layer answers NotImplemented where something in the call
is no plain array. It raises RuntimeError (dtype, device, shape, T = 0), TypeError (dtype of a mask) and ValueError
(range) naming the argument, what was expected and what came. `num_threads` 0 is what `take_tensor_types` was told for
tensors, and OMP_NUM_THREADS or the usable processors for NumPy arrays. Arguments and results are described in
`lstm_ext.call`, and those on a GPU in csrc/ops/ops.h.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict

from .call import Array, CallTuple, Directions, GradsTuple, Needs, OutputsTuple, Save
from .cell import Cell

class BuildInfo(TypedDict, total=False):
    version: str
    compiler: str
    simd_built: tuple[str, ...]
    simd_available: tuple[str, ...]
    simd: str
    cuda: bool
    cuda_reason: str  # why not, where cuda is False
    cuda_archs: str
    cudart: int

class CpuPlan(TypedDict):
    engine: Literal["vectors", "tiles"]
    in_place: tuple[bool, bool, bool]
    one_sum: bool
    alone: bool
    chunk_steps: int
    depth: tuple[int, int]
    borrow_x: bool
    threads: int
    by_rows: bool
    why: dict[str, str]

_Saved = tuple[Array, Array, Array | None]
_OutputGrads = tuple[Array | None, Array | None, Array | None, Array | None]

def layer_forward(call: CallTuple, save: Save, num_threads: int = 0) -> OutputsTuple: ...
def layer_backward(
    call: CallTuple, saved: _Saved, grads: _OutputGrads, needs: Needs, num_threads: int = 0
) -> GradsTuple: ...

# Where CUDA was built
_Some = Array | None
_BackwardSteps = tuple[Array, Array, _Some, _Some, _Some, _Some, _Some, _Some, _Some, _Some, _Some, _Some]

def cuda_layer_forward(steps: CallTuple, save: Save, tf32: bool, strategy: str) -> OutputsTuple | str: ...
def cuda_layer_backward(
    steps: CallTuple,
    saved: _Saved,
    grads: _OutputGrads,
    needs: Needs,
    tf32: bool,
    strategy: str,
    normed: _Some = None,
    scales: _Some = None,
) -> _BackwardSteps | str: ...
def cuda_h_before(steps: CallTuple, saved: _Saved) -> Array: ...
def cuda_step_forward(call: CallTuple, tf32: bool) -> OutputsTuple | str: ...
def cuda_plan(
    T: int,
    B: int,
    H: int,
    P: int,
    projected: bool,
    dtype: str,
    tf32: bool,
    num_directions: int,
    backward: bool,
    strategy: str,
    device: int,
    cell: Cell | None = None,
) -> dict[str, Any]: ...
def cuda_take_hooks(
    introduce: Callable[[int], None],
    check: Callable[[int, str, str, bool, str, bool, bool, str], str | None],
) -> None: ...
def cuda_set_measured(
    device: int, rows: Sequence[tuple[str, bool, int, bool, int, int, int, int, str, dict[str, float]]]
) -> None: ...
def cuda_device(device: int) -> dict[str, Any]: ...
def cuda_timed_out() -> str: ...
def sm_margin() -> int: ...
def set_sm_margin(margin: int) -> None: ...
def cpu_plan(
    T: int,
    B: int,
    I: int,
    H: int,
    P: int,
    projected: bool,
    dtype: str,
    num_directions: int,
    backward: bool,
    num_threads: int,
) -> CpuPlan: ...
def gpu_plan(
    T: int,
    B: int,
    H: int,
    P: int,
    projected: bool,
    dtype: str,
    tf32: bool,
    num_directions: int,
    backward: bool,
    strategy: str,
    compute_capability: int,
    sms: int,
    gpcs: int,
    shared_bytes: int,
    clock_khz: int,
    cell: Cell | None = None,
) -> dict[str, Any]: ...
def force_cpu_plan(
    engine: Literal["vectors", "tiles"] | None = None,
    in_place: bool | tuple[bool | None, bool | None, bool | None] | None = None,
    one_sum: bool | None = None,
    chunk_steps: int | None = None,
    depth: int | None = None,
    threads: int | None = None,
    by_rows: bool | None = None,
) -> None: ...

class Frozen:
    """Layers packed for inference; many threads may use one at once. csrc/ops/frozen.h tells what goes in."""

    def __init__(
        self,
        layers: list[tuple[list[Array], list[Array], Cell | None]],
        directions: Directions,
        dtype: str,
        storage: Literal["plain", "bfloat16", "int8"],
    ) -> None: ...
    def run(self, call: CallTuple, num_threads: int = 0) -> tuple[Array, Array | None, Array]: ...
    def plans(self, T: int, B: int, num_threads: int) -> list[CpuPlan]: ...
    def bytes(self) -> int: ...

class Stream:
    """The state of some sequences; one thread's at a time."""

    def __init__(self, frozen: Frozen, states: tuple[Array, ...]) -> None: ...
    def step(
        self,
        x: Array,
        batch_first: bool,
        out: Array | None,
        lengths: Array | None,
        resets: Array | None,
        num_threads: int = 0,
    ) -> Array: ...
    def current(self) -> int: ...
    def hold(self) -> None: ...
    def release(self) -> None: ...

def take_tensor_types(types: tuple[type, ...], num_threads: Callable[[], int]) -> None: ...
def share_openmp_threads(library: str) -> bool: ...
def build_info() -> BuildInfo: ...
def gpus() -> tuple[list[str], str]: ...
