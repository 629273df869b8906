"""Arrays of any framework, checked, copied and laid out as others want them; and layers in all forms of `Layers`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..call import CellWeights, Weights
from ..walk import Array

AnyWeights = Weights | CellWeights
Layer = AnyWeights | tuple[AnyWeights, ...]
Layers = Layer | Sequence[Layer]
Name = Callable[[str, int, int], str]  # what an array is called, from its field in Weights, its layer and direction

EXTRA = {"peephole": "3 H", "gamma": "2 4H", "gamma_h": "H", "beta_h": "H"}  # of CellWeights, with their shapes
_DTYPES = ("float16", "float32", "float64")


# Checks --------------------------------------------------------------------------------------------------------------


def to_array(name: str, a: Any) -> Array:
    """A contiguous copy in NumPy, in native byte order."""
    if getattr(a, "is_meta", False):
        raise TypeError(f"{name}: expected an array with memory, got a meta tensor")
    if hasattr(a, "detach"):  # a tensor, which may need a gradient
        a = a.detach().cpu()
    if not hasattr(a, "dtype") or isinstance(a, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array, got {type(a).__name__}")
    dtype = getattr(a.dtype, "name", str(a.dtype)).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise TypeError(f"{name}: expected dtype {', '.join(_DTYPES)}, got {dtype}")
    return np.asarray(a).astype(dtype, order="C", copy=True)


def _listed(names: Collection[str], optional: Collection[str]) -> str:
    return ", ".join(f"{name} (optional)" if name in optional else name for name in names)


def _check_names(given: Collection[Any], expected: Collection[str], optional: Collection[str]) -> None:
    missing = [name for name in expected if name not in given and name not in optional]
    unknown = [str(name) for name in given if name not in expected]
    if missing or unknown:
        found = [f"{what} {', '.join(which)}" for what, which in (("missing", missing), ("unknown", unknown)) if which]
        hint = ""
        if any(name.endswith((f"/{each}", f".{each}")) for name in unknown for each in missing):
            hint = "; the names are those without the scope before them"
        raise ValueError(f"expected the arrays {_listed(expected, optional)}; {' and '.join(found)}{hint}")


def _check_dtypes(arrays: Mapping[str, Array]) -> None:
    first = next(iter(arrays))
    for name, array in arrays.items():
        if array.dtype != arrays[first].dtype:
            raise TypeError(f"{name}: expected dtype {arrays[first].dtype} as {first} has, got {array.dtype}")


def _check_shapes(arrays: Mapping[str, Array], shapes: Mapping[str, str]) -> None:
    """Shapes are written as "4H I"; a symbol stands for the size that it has in the first array with it."""
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        dims = shapes[name].split()
        symbols = [dim.lstrip("0123456789") for dim in dims]
        named = [symbol for symbol in dict.fromkeys(symbols) if symbol]  # a dimension may be a number alone
        known = ", ".join(f"{symbol} = {sizes[symbol]}" for symbol in named if symbol in sizes)
        fits = array.ndim == len(dims)
        for dim, symbol, size in zip(dims, symbols, array.shape, strict=False):
            factor = int(dim.removesuffix(symbol) or 1)
            fits = fits and factor * sizes.setdefault(symbol, size // factor) == size
        if not fits:
            expected = f"[{', '.join(dims)}]" + (f" with {known}" if known else "")
            raise ValueError(f"{name}: expected shape {expected}, got {list(array.shape)}")


def read(params: Mapping[str, Any], shapes: Mapping[str, str], optional: Collection[str] = ()) -> dict[str, Array]:
    """Copies of the arrays that `shapes` names, in its order, after all checks. None is as good as absent."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"expected a mapping from the names {_listed(shapes, optional)} to arrays, got {type(params).__name__}"
        )
    given = {name: a for name, a in params.items() if a is not None}
    _check_names(given, shapes, optional)
    arrays = {name: to_array(name, given[name]) for name in shapes if name in given}
    _check_dtypes(arrays)
    _check_shapes(arrays, shapes)
    return arrays


def read_layers(
    params: Mapping[str, Any],
    name: Name,
    num_layers: int,
    num_directions: int,
    *,
    biased: bool,
    projected: bool,
    extra: Collection[str] = (),
) -> list[tuple[Any, ...]]:
    """Layers of which each takes what the one before puts out, from arrays called as `name` says."""
    width = "P" if projected else "H"
    shapes: dict[str, str] = {}
    for n in range(num_layers):
        inputs = "I" if n == 0 else width if num_directions == 1 else f"2{width}"
        own = {"w_hh": f"4H {width}", "w_ih": f"4H {inputs}"}
        own |= {"b_ih": "4H", "b_hh": "4H"} if biased else {}
        own |= {"w_hr": "P H"} if projected else {}
        own |= {field: shape for field, shape in EXTRA.items() if field in extra}
        shapes |= {name(field, n, d): shape for d in range(num_directions) for field, shape in own.items()}
    arrays: dict[str, Any] = read(params, shapes)
    made: Any = CellWeights if extra else Weights
    return [
        tuple(made._make(arrays.get(name(field, n, d)) for field in made._fields) for d in range(num_directions))
        for n in range(num_layers)
    ]


def named_arrays(stack: Sequence[Sequence[AnyWeights]], name: Name) -> Iterator[tuple[str, Array]]:
    """The arrays of layers, without the absent ones."""
    for n, layer in enumerate(stack):
        for d, weights in enumerate(layer):
            yield from ((name(field, n, d), a) for field, a in weights._asdict().items() if a is not None)


def _directions(layer: Any) -> tuple[AnyWeights, ...]:
    """Those of one layer."""
    several = isinstance(layer, Sequence) and not isinstance(layer, AnyWeights)
    directions: tuple[Any, ...] = tuple(layer) if several else (layer,)
    for weights in directions:
        if not isinstance(weights, AnyWeights):
            raise TypeError(f"expected Weights for each direction of a layer, got {type(weights).__name__}")
    if len(directions) not in (1, 2):
        raise ValueError(f"expected layers of 1 or 2 directions each, got {len(directions)}")
    return directions


def copy_stack(layers: Any, projections: bool = False, keeps: Collection[str] = ()) -> list[tuple[Any, ...]]:
    """Copies of all forms of `Layers` as a list of layers, once one torch.nn.LSTM could have all of them."""
    if not isinstance(layers, Sequence):
        raise TypeError(f"expected Weights, a tuple of them or a list of layers, got {type(layers).__name__}")
    one = isinstance(layers, AnyWeights)
    alone = one or (isinstance(layers, tuple) and all(isinstance(each, AnyWeights) for each in layers))
    stack = [_directions(layer) for layer in ([layers] if alone else layers)]
    if not stack:
        raise ValueError("layers: expected at least one, got none")

    def name(field: str, n: int, d: int) -> str:
        return f"weights.{field}" if one else f"layer[{d}].{field}" if alone else f"layers[{n}][{d}].{field}"

    everything = [weights for layer in stack for weights in layer]
    biased = any(weights.b_ih is not None or weights.b_hh is not None for weights in everything)
    projected = any(weights.w_hr is not None for weights in everything)
    if projected and not projections:
        raise ValueError("w_hr: expected None, as this format has no projection")
    fields = CellWeights._fields[len(Weights._fields) :]
    extra = {field for field in fields for weights in everything if getattr(weights, field, None) is not None}
    for field in sorted(extra.difference(keeps)):
        raise ValueError(f"{field}: expected None, as this format keeps none")
    sizes = len(stack), len(stack[0])
    return read_layers(dict(named_arrays(stack, name)), name, *sizes, biased=biased, projected=projected, extra=extra)


def copy_layer(layers: Layers, projections: bool = False, keeps: Collection[str] = ()) -> tuple[Any, ...]:
    """Of a format that keeps one layer."""
    stack = copy_stack(layers, projections, keeps)
    if len(stack) > 1:
        raise ValueError(f"expected one layer, as this format keeps no more, got {len(stack)}")
    return stack[0]


def copy_one(layers: Layers, projections: bool = False, keeps: Collection[str] = ()) -> Any:
    """Of a format that keeps one direction of one layer."""
    layer = copy_layer(layers, projections, keeps)
    if len(layer) > 1:
        raise ValueError("expected one direction, as this format keeps no more, got 2")
    return layer[0]


# Layouts -------------------------------------------------------------------------------------------------------------


def reorder(a: Array, order: str, to: str = "ifgo") -> Array:
    """The four blocks of rows of a [4H, ...] from one order of gates to another."""
    blocks = dict(zip(order, np.split(a, 4), strict=True))
    return np.concatenate([blocks[gate] for gate in to])


def transpose(a: Array) -> Array:
    """Contiguous."""
    return np.ascontiguousarray(a.T)


def both_biases(weights: Weights) -> tuple[Array, Array]:
    """b_ih and b_hh, or zeros."""
    if weights.b_ih is None or weights.b_hh is None:
        zeros = np.zeros(len(weights.w_ih), weights.w_ih.dtype)
        return zeros, zeros.copy()
    return weights.b_ih, weights.b_hh


def from_kernels(kernel: Array, recurrent_kernel: Array, bias: Array | None, order: str = "ifgo") -> Weights:
    """From [I, 4H], [P, 4H] and the one bias [4H]."""
    w_ih, w_hh = (reorder(transpose(a), order) for a in (kernel, recurrent_kernel))
    if bias is None:
        return Weights(w_ih, w_hh)
    return Weights(w_ih, w_hh, reorder(bias, order), np.zeros_like(bias))


def to_kernels(weights: Weights, order: str = "ifgo") -> tuple[Array, Array, Array]:
    """To [I, 4H], [P, 4H] and the one bias [4H], zeros if there is none."""
    b_ih, b_hh = both_biases(weights)
    w_ih, w_hh, bias = (reorder(a, "ifgo", order) for a in (weights.w_ih, weights.w_hh, b_ih + b_hh))
    return transpose(w_ih), transpose(w_hh), bias
