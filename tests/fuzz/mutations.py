"""What is done to an argument: it is laid out in another way, which must change nothing, or it is made wrong."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch

HUGE = (2**31, 2**36, 2**45, 2**52, 2**60, 2**61, 2**62)  # sizes that an expanded array may state


class OfTorch(torch.Tensor):
    """A subclass may mean more than its memory."""


class OfNumpy(np.ndarray):
    """The same."""


class Liar:
    """Says that it speaks DLPack."""

    dtype, shape, ndim = "float32", (2, 2, 2), 3

    def __init__(self, device: Any):
        self.device = device

    def __array_namespace__(self) -> Any:
        return np

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self, **_: Any) -> Any:
        return self.device


ODD: tuple[Any, ...] = (
    *(None, 0, 1, 3, -1, 2**31 - 1, 2**63, 1.5, float("nan"), True, "x", "", b"x", [], (), {}, [1.0], (None, None)),
    *(object(), Ellipsis, slice(None), int, np.float32(1), np.array("x"), np.array(None), torch.Size([1])),
    *(torch.tensor(1), torch.zeros(0), np.zeros(0, np.float32), np.ma.masked_array([1.0]), np.zeros(2, "f4,i4")),
    *map(Liar, ((), (1, 0), (2, 0), None, (99, -1), "cpu")),
)


# Laid out in another way ---------------------------------------------------------------------------------------------


def bytes_of(a: torch.Tensor) -> np.ndarray:
    return a.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()


def misaligned(a: Any) -> Any:
    """The same numbers at an odd address."""
    array = bytes_of(a) if isinstance(a, torch.Tensor) else a
    memory = np.zeros(array.nbytes + 1, np.uint8)
    memory[1:] = np.frombuffer(array.tobytes(), np.uint8)
    if isinstance(a, torch.Tensor):
        return torch.frombuffer(memory, dtype=a.dtype, offset=1).reshape(a.shape) if a.numel() else a
    return memory[1:].view(a.dtype).reshape(a.shape)


def read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


OF_NUMPY: tuple[Callable[[Any], Any], ...] = (
    read_only,
    misaligned,
    np.asfortranarray,
    lambda a: np.ascontiguousarray(a[::-1])[::-1],
    lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    lambda a: a.astype(a.dtype.newbyteorder(">")),
)
OF_TORCH: tuple[Callable[[Any], Any], ...] = (
    misaligned,
    lambda a: a.repeat_interleave(2, -1)[..., ::2],
    lambda a: a.mT.contiguous().mT if a.dim() > 1 else a,
    lambda a: torch._neg_view(-a) if a.is_floating_point() else a,
    lambda a: torch.complex(torch.zeros_like(a), -a).conj().imag if a.dtype in (torch.float32, torch.float64) else a,
    lambda a: torch.nn.Parameter(a.resolve_neg(), requires_grad=False),
)


def relaid(rng: Random, a: Any) -> Any:
    """The same numbers, however they lie."""
    return rng.choice(OF_TORCH if isinstance(a, torch.Tensor) else OF_NUMPY)(a)


# Made wrong ----------------------------------------------------------------------------------------------------------


def expanded(rng: Random, a: Any) -> Any:
    """Sizes that no memory stands for."""
    shape = list(a.shape)
    for dim in rng.sample(range(len(shape)), rng.randint(1, len(shape))) if shape else ():
        shape[dim] = rng.choice((*HUGE, *HUGE, 0, 1, 3))
        a = a[tuple(slice(1) if n == dim else slice(None) for n in range(len(shape)))]
    fits = all(own in (1, size) for own, size in zip(a.shape, shape, strict=True))
    if not fits:
        return a[..., :0]
    return a.expand(shape) if isinstance(a, torch.Tensor) else np.broadcast_to(a, shape)


def reshaped(rng: Random, a: Any) -> Any:
    """Another rank, fewer rows, the axes in another order."""
    dim = rng.randrange(max(len(a.shape), 1))
    cut = tuple(slice(rng.randint(0, 2)) if n == dim else slice(None) for n in range(len(a.shape)))
    axes = list(range(len(a.shape)))
    rng.shuffle(axes)
    turned = a.permute(axes) if isinstance(a, torch.Tensor) else a.transpose(axes)
    return rng.choice((a[None], a[cut], a.reshape(-1), turned, a[0] if len(a.shape) and a.shape[0] else a))


TORCH_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
TORCH_DTYPES += [torch.int8, torch.uint8, torch.uint16, torch.uint64, torch.bool, torch.complex64]
NUMPY_DTYPES = ["f4", "f8", "f2", "i8", "i4", "u1", "u8", "?", "c8", "c16", "O", "U4", "M8[s]", ">f4", ">i8", "g"]


def retyped(rng: Random, a: Any) -> Any:
    if isinstance(a, torch.Tensor):
        return a.to(rng.choice(TORCH_DTYPES))
    with np.errstate(all="ignore"):
        return np.nan_to_num(a).astype(rng.choice(NUMPY_DTYPES)) if a.dtype.kind in "fiub" else a


def revalued(rng: Random, a: Any) -> Any:
    """Some numbers are another."""
    a = a.clone() if isinstance(a, torch.Tensor) else a.copy()
    floating = "float" in str(a.dtype)
    values = (float("nan"), float("inf"), -float("inf"), 1e30, 0.0) if floating else (-1, 0, 2**62, -(2**63), 1)
    value = rng.choice(values)
    if a.shape and 0 not in a.shape:
        try:
            a[rng.randrange(a.shape[0])] = value
        except (OverflowError, RuntimeError, TypeError, ValueError):  # the dtype has no such number
            a[0] = 1
    return a


def elsewhere(rng: Random, a: Any) -> Any:
    """Of another kind, on another device, or with another layout."""
    if isinstance(a, np.ndarray):
        return rng.choice(
            (lambda: a.view(OfNumpy), lambda: np.ma.masked_array(a), lambda: a.tolist(), lambda: str(a))
        )()
    ways: list[Callable[[], Any]] = [
        lambda: a.to("meta"),
        lambda: a.detach().to_sparse(),
        lambda: a.detach().as_subclass(OfTorch),
        lambda: a.detach().resolve_neg().tolist(),
        lambda: a.detach().clone().requires_grad_(a.is_floating_point()),
        lambda: torch.complex(a.float(), a.float()).conj(),
    ]
    return rng.choice(ways)()


def overlapping(_: Random, a: Any) -> Any:
    """Rows that share memory."""
    if len(a.shape) < 2 or 0 in a.shape:
        return a
    one = a[:1] if isinstance(a, torch.Tensor) else np.ascontiguousarray(a[:1])
    return one.expand(a.shape) if isinstance(a, torch.Tensor) else np.broadcast_to(one, a.shape)


WRONG = (expanded, expanded, reshaped, reshaped, retyped, revalued, elsewhere, overlapping, relaid)


def spoilt(rng: Random, a: Any) -> Any:
    """`a`, most likely wrong."""
    if not isinstance(a, (np.ndarray, torch.Tensor)) or rng.random() < 0.15:
        return rng.choice(ODD)
    try:
        return rng.choice(WRONG)(rng, a)
    except (RuntimeError, TypeError, ValueError, IndexError):  # torch or NumPy cannot make it of what it is already
        return None
