"""The compiled module. Arrays are NumPy arrays or CPU tensors of the types taken; outputs are of their kind.

dtypes float32, float64, bfloat16, float16. Raises TypeError (dtype, not an array), RuntimeError (shape) and
ValueError (range) naming the argument, what was expected and what came. `num_threads` 0 takes OMP_NUM_THREADS or the
usable processors. The interface of a layer is described in `lstm_ext.reference`.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

class BuildInfo(TypedDict, total=False):
    version: str
    compiler: str
    simd_built: tuple[str, ...]
    simd_available: tuple[str, ...]
    simd: str
    cuda: bool
    cuda_archs: str
    cudart: int

class CpuPlan(TypedDict):
    engine: Literal["vectors", "tiles"]
    in_place: tuple[bool, bool, bool]
    one_sum: bool
    chunk_steps: int
    depth: tuple[int, int]
    borrow_x: bool
    threads: int
    by_rows: bool
    why: dict[str, str]

def layer_forward(
    x: Any,
    h0: Any,
    c0: Any,
    weights: Sequence[Any],
    lengths: Any,
    resets: Any,
    batch_sizes: Any,
    directions: int,
    batch_first: bool,
    save: int,
    num_threads: int,
) -> tuple[Any, Any, Any, Any, Any]: ...
def layer_backward(
    dy: Any,
    dh_n: Any,
    dc_n: Any,
    dcells: Any,
    x: Any,
    h0: Any,
    c0: Any,
    weights: Sequence[Any],
    y: Any,
    cells: Any,
    gates: Any,
    lengths: Any,
    resets: Any,
    batch_sizes: Any,
    directions: int,
    batch_first: bool,
    needs: int,
    num_threads: int,
) -> tuple[Any, Any, Any, list[Any] | None]: ...
def cell_forward(
    x: Any, h: Any, c: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, num_threads: int
) -> tuple[Any, Any]: ...
def cuda_layer_forward(
    xw: Any,
    h0: Any,
    c0: Any,
    weights: Sequence[Any],
    lengths: Any,
    resets: Any,
    packed_offset: Any,
    directions: int,
    batch_first: bool,
    save: int,
    tf32: bool,
    strategy: str,
) -> tuple[Any, Any, Any, Any, Any]: ...
def cuda_layer_backward(
    dy: Any,
    dh_n: Any,
    dc_n: Any,
    dcells: Any,
    h0: Any,
    c0: Any,
    weights: Sequence[Any],
    y: Any,
    cells: Any,
    gates: Any,
    lengths: Any,
    resets: Any,
    packed_offset: Any,
    directions: int,
    batch_first: bool,
    needs: int,
    tf32: bool,
    strategy: str,
) -> tuple[Any, Any, Any, Any, Any, Any]: ...
def cuda_cell_forward(
    x: Any, h: Any, c: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, tf32: bool
) -> tuple[Any, Any]: ...
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
) -> dict[str, Any]: ...
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
def force_cpu_plan(
    engine: Literal["vectors", "tiles"] | None = None,
    in_place: bool | tuple[bool | None, bool | None, bool | None] | None = None,
    one_sum: bool | None = None,
    chunk_steps: int | None = None,
    depth: int | None = None,
    threads: int | None = None,
    by_rows: bool | None = None,
) -> None: ...
def take_tensor_types(*types: type) -> None: ...
def share_openmp_threads(library: str) -> bool: ...
def build_info() -> BuildInfo: ...
def gpus() -> tuple[list[str], str]: ...
