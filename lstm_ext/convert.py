"""LSTM weights to and from other frameworks, as plain arrays.

The hub is `Weights`, one direction of one layer in torch's layout: w_ih [4H, I], w_hh [4H, P], b_ih and b_hh [4H] or
both None, w_hr [P, H] or None (then P = H); gates in the order i, f, g, o. Of a cell with options it is `CellWeights`,
which has these five and then peephole [3, H] (TensorFlow 1, ONNX), or gamma [2, 4H], gamma_h and beta_h [H] (haste's
LayerNormLSTM); torch's state_dict, of our modules, keeps them all. `from_x` reads what the framework x keeps, `to_x`
writes it. Where x keeps more than one direction the functions take and return several `Weights`:

    one direction      TensorFlow 1, Flax linen, Flax NNX, Equinox, haste
    a layer            Keras, ONNX: (forward,) or (forward, backward)
    a list of layers   torch's state_dict, cuDNN

To write, all functions take the same: one `Weights`; a tuple of them, the directions of one layer; or a list of layers,
each of which is one or the other. A format that keeps less refuses more.

Biases: torch adds two, b_ih + b_hh. What a framework keeps as its one bias becomes b_ih, beside a b_hh of zeros; the
other way their sum goes out. So a framework's weights come back as they were, and so do torch's where the format has
both biases (cuDNN, ONNX); elsewhere only their sum does. Where a format always has biases, absent ones become zeros. A
forget bias that is added at run time, as in TensorFlow 1, becomes b_hh; elsewhere it is part of the bias. torch trains
both biases with the gradient of their sum, which therefore moves twice as far in a step.

Arrays in: NumPy's, torch tensors on any device, or others that NumPy can read (JAX arrays, Keras variables, NNX
parameters), all of one call float16, float32 or float64 (bfloat16 goes to float32 without loss). Arrays out: NumPy's,
of the same dtype, contiguous, and copies; from `to_state_dict`, tensors. What arrays do not show is not converted:
activations other than sigmoid and tanh, clipping, dropout, zoneout.

All functions raise ValueError for missing or unknown names, numbers of arrays and shapes, and TypeError for what is no
array or has another dtype; the message names the array, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from .call import CellWeights, Weights
from .walk import Array, split_gates

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CellWeights",
    "Weights",
    "from_cudnn",
    "from_equinox",
    "from_haste",
    "from_keras",
    "from_linen",
    "from_nnx",
    "from_onnx",
    "from_state_dict",
    "from_tensorflow",
    "from_tensorflow_layer_norm",
    "to_cudnn",
    "to_equinox",
    "to_haste",
    "to_keras",
    "to_linen",
    "to_nnx",
    "to_onnx",
    "to_state_dict",
    "to_tensorflow",
    "to_tensorflow_layer_norm",
]

AnyWeights = Weights | CellWeights
Layer = AnyWeights | tuple[AnyWeights, ...]
Layers = Layer | Sequence[Layer]
Name = Callable[[str, int, int], str]  # what an array is called, from its field in Weights, its layer and direction

_EXTRA = {"peephole": "3 H", "gamma": "2 4H", "gamma_h": "H", "beta_h": "H"}  # of CellWeights, with their shapes
_DTYPES = ("float16", "float32", "float64")
_PEEPHOLES = ("w_i_diag", "w_f_diag", "w_o_diag")  # TensorFlow's, in the order of `peephole`


# Checks --------------------------------------------------------------------------------------------------------------


def _array(name: str, a: Any) -> Array:
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


def _read(params: Mapping[str, Any], shapes: Mapping[str, str], optional: Collection[str] = ()) -> dict[str, Array]:
    """Copies of the arrays that `shapes` names, in its order, after all checks. None is as good as absent."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"expected a mapping from the names {_listed(shapes, optional)} to arrays, got {type(params).__name__}"
        )
    given = {name: a for name, a in params.items() if a is not None}
    _check_names(given, shapes, optional)
    arrays = {name: _array(name, given[name]) for name in shapes if name in given}
    _check_dtypes(arrays)
    _check_shapes(arrays, shapes)
    return arrays


def _read_layers(
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
        own |= {field: shape for field, shape in _EXTRA.items() if field in extra}
        shapes |= {name(field, n, d): shape for d in range(num_directions) for field, shape in own.items()}
    arrays: dict[str, Any] = _read(params, shapes)
    made: Any = CellWeights if extra else Weights
    return [
        tuple(made._make(arrays.get(name(field, n, d)) for field in made._fields) for d in range(num_directions))
        for n in range(num_layers)
    ]


def _items(stack: Sequence[Sequence[AnyWeights]], name: Name) -> Iterator[tuple[str, Array]]:
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


def _copy_stack(layers: Any, projections: bool = False, keeps: Collection[str] = ()) -> list[tuple[Any, ...]]:
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
    return _read_layers(dict(_items(stack, name)), name, *sizes, biased=biased, projected=projected, extra=extra)


def _copy_layer(layers: Layers, projections: bool = False, keeps: Collection[str] = ()) -> tuple[Any, ...]:
    """Of a format that keeps one layer."""
    stack = _copy_stack(layers, projections, keeps)
    if len(stack) > 1:
        raise ValueError(f"expected one layer, as this format keeps no more, got {len(stack)}")
    return stack[0]


def _copy(layers: Layers, projections: bool = False, keeps: Collection[str] = ()) -> Any:
    """Of a format that keeps one direction of one layer."""
    layer = _copy_layer(layers, projections, keeps)
    if len(layer) > 1:
        raise ValueError("expected one direction, as this format keeps no more, got 2")
    return layer[0]


# Layouts -------------------------------------------------------------------------------------------------------------


def _reorder(a: Array, order: str, to: str = "ifgo") -> Array:
    """The four blocks of rows of a [4H, ...] from one order of gates to another."""
    blocks = dict(zip(order, np.split(a, 4), strict=True))
    return np.concatenate([blocks[gate] for gate in to])


def _transpose(a: Array) -> Array:
    return np.ascontiguousarray(a.T)


def _biases(weights: Weights) -> tuple[Array, Array]:
    """b_ih and b_hh, or zeros."""
    if weights.b_ih is None or weights.b_hh is None:
        zeros = np.zeros(len(weights.w_ih), weights.w_ih.dtype)
        return zeros, zeros.copy()
    return weights.b_ih, weights.b_hh


def _from_kernels(kernel: Array, recurrent_kernel: Array, bias: Array | None, order: str = "ifgo") -> Weights:
    """From [I, 4H], [P, 4H] and the one bias [4H]."""
    w_ih, w_hh = (_reorder(_transpose(a), order) for a in (kernel, recurrent_kernel))
    if bias is None:
        return Weights(w_ih, w_hh)
    return Weights(w_ih, w_hh, _reorder(bias, order), np.zeros_like(bias))


def _to_kernels(weights: Weights, order: str = "ifgo") -> tuple[Array, Array, Array]:
    """To [I, 4H], [P, 4H] and the one bias [4H], zeros if there is none."""
    b_ih, b_hh = _biases(weights)
    w_ih, w_hh, bias = (_reorder(a, "ifgo", order) for a in (weights.w_ih, weights.w_hh, b_ih + b_hh))
    return _transpose(w_ih), _transpose(w_hh), bias


# torch ---------------------------------------------------------------------------------------------------------------


def _parameter(field: str, n: int, d: int) -> str:
    """weight_hh_l0_reverse for w_hh of the first layer, backward."""
    return field.replace("w_", "weight_").replace("b_", "bias_") + f"_l{n}" + ("_reverse" if d else "")


def _cell_parameter(field: str, *_: int) -> str:
    return _parameter(field, 0, 0).removesuffix("_l0")


def from_state_dict(state_dict: Mapping[str, Any]) -> list[tuple[Weights, ...]]:
    """From the `state_dict` of an `LSTM` or an `LSTMCell`, torch's or ours.

    Args:
        state_dict: weight_ih_l0 [4H, I], weight_hh_l0 [4H, P], bias_ih_l0 and bias_hh_l0 [4H] or neither, weight_hr_l0
            [P, H] with a projection; then _l1 …, each followed by its _reverse if bidirectional. The names of a cell
            have no _l0. Gates in the order i, f, g, o.

    Returns:
        From the input up, (forward,) or (forward, backward) for each layer.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html

    Example:
        >>> ((layer,), _) = convert.from_state_dict(torch.nn.LSTM(3, 4, num_layers=2).state_dict())
        >>> layer.w_ih.shape
        (16, 3)
        >>> sorted(convert.to_state_dict(layer))
        ['bias_hh_l0', 'bias_ih_l0', 'weight_hh_l0', 'weight_ih_l0']
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping from names to arrays, got {type(state_dict).__name__}")
    names = list(map(str, state_dict))
    biased = any(name.startswith("bias_") for name in names)
    if "weight_hh" in names:
        extra = _EXTRA.keys() & set(names)
        return _read_layers(state_dict, _cell_parameter, 1, 1, biased=biased, projected=False, extra=extra)
    num_layers = 1
    while f"weight_hh_l{num_layers}" in names:
        num_layers += 1
    num_directions = 2 if any(name.endswith("_reverse") for name in names) else 1
    projected = any(name.startswith("weight_hr_") for name in names)
    extra = {field for field in _EXTRA if any(name.startswith(f"{field}_l") for name in names)}
    sizes = num_layers, num_directions
    return _read_layers(state_dict, _parameter, *sizes, biased=biased, projected=projected, extra=extra)


def to_state_dict(layers: Layers, *, cell: bool = False) -> dict[str, Tensor]:
    """To what `load_state_dict` of an `LSTM` takes, or with `cell` that of an `LSTMCell`; see `from_state_dict`.

    Args:
        layers: from the input up, all of them with or without biases, projections and a backward direction.
        cell: for an `LSTMCell`, which has one layer of one direction and no projection.

    Returns:
        Tensors on the CPU by name.

    Raises:
        ImportError: there is no torch.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError("convert.to_state_dict makes tensors, for which it needs PyTorch (torch>=2.11)") from error
    stack = [(_copy(layers, keeps=_EXTRA),)] if cell else _copy_stack(layers, projections=True, keeps=_EXTRA)
    return {name: torch.from_numpy(a) for name, a in _items(stack, _cell_parameter if cell else _parameter)}


# TensorFlow 1 --------------------------------------------------------------------------------------------------------


def from_tensorflow(params: Mapping[str, Any], *, forget_bias: float) -> AnyWeights:
    """From the variables of TensorFlow 1's `BasicLSTMCell` or `LSTMCell`, which our `BasicLSTMCell` has as well.

    Gates in the order i, j, f, o (j is torch's g); the kernel's first I rows are for x, the others for h. The state is
    (c, h), c first. `LSTMBlockCell` and haste's LSTM for TensorFlow (with forget_bias=0) keep the same.

    Args:
        params: kernel [I + P, 4U], bias [4U] and, of an LSTMCell with `num_proj`, "projection/kernel" [U, P]: the
            names of the variables without their scope; with `use_peepholes` w_i_diag, w_f_diag and w_o_diag [U], which
            the result has as `peephole`.
        forget_bias: what the cell adds to f at run time, 1 unless it was made with another. It becomes b_hh, beside
            the cell's bias in b_ih.

    Source: tf_keras/src/layers/rnn/legacy_cells.py, which was tensorflow/python/ops/rnn_cell_impl.py.

    Example:
        >>> variables = {"kernel": np.ones((3 + 4, 16)), "bias": np.zeros(16)}  # input width 3, num_units 4
        >>> weights = convert.from_tensorflow(variables, forget_bias=1.0)
        >>> {name: a.shape for name, a in convert.to_tensorflow(weights, forget_bias=1.0).items()}
        {'kernel': (7, 16), 'bias': (16,)}
    """
    peepholes = dict.fromkeys(_PEEPHOLES, "U") if isinstance(params, Mapping) and _PEEPHOLES[0] in params else {}
    shapes = {"bias": "4U", "projection/kernel": "U P", "kernel": "I+P 4U", **peepholes}
    arrays = _read(params, shapes, optional={"projection/kernel"})
    kernel, bias, projection = arrays["kernel"], arrays["bias"], arrays.get("projection/kernel")
    width = len(bias) // 4 if projection is None else projection.shape[1]
    rows = len(kernel) - width
    if rows < 0:
        raise ValueError(f"kernel: expected shape [I+P, 4U] with P = {width}, got {list(kernel.shape)}")
    weights = _from_kernels(kernel[:rows], kernel[rows:], bias, "igfo")
    b_hh = np.zeros_like(bias)
    split_gates(b_hh)[1][:] = forget_bias
    weights = weights._replace(b_hh=b_hh, w_hr=None if projection is None else _transpose(projection))
    return CellWeights(*weights, np.stack([arrays[name] for name in peepholes])) if peepholes else weights


def to_tensorflow(weights: Layers, *, forget_bias: float) -> dict[str, Array]:
    """To the variables of TensorFlow 1's `LSTMCell` and, without a projection, `BasicLSTMCell`; see `from_tensorflow`.

    Args:
        weights: one direction.
        forget_bias: what that cell will add to f at run time; it is taken off the bias.
    """
    own = _copy(weights, projections=True, keeps={"peephole"})
    b_ih, b_hh = _biases(own)
    split_gates(b_hh)[1][:] -= b_hh.dtype.type(forget_bias)  # before the sum: what from_tensorflow wrote leaves a zero
    kernel, recurrent_kernel, bias = _to_kernels(own._replace(b_ih=b_ih, b_hh=b_hh), "igfo")
    params = {"kernel": np.concatenate([kernel, recurrent_kernel]), "bias": bias}
    if (peephole := getattr(own, "peephole", None)) is not None:
        params |= {name: a.copy() for name, a in zip(_PEEPHOLES, peephole, strict=True)}
    return params if own.w_hr is None else params | {"projection/kernel": _transpose(own.w_hr)}


# Of LayerNormBasicLSTMCell: which variables our parameter is, one after the other.
_NORMS = {
    "gamma": ["input/gamma", "forget/gamma", "transform/gamma", "output/gamma"],
    "beta": ["input/beta", "forget/beta", "transform/beta", "output/beta"],
    "gamma_h": ["state/gamma"],
    "beta_h": ["state/beta"],
}


def _read_layer_norm(params: Mapping[str, Any], norms: Mapping[str, str]) -> dict[str, Array]:
    """The kernel, and the bias or arrays of these shapes."""
    shapes = {"bias": "4U"} if isinstance(params, Mapping) and "bias" in params else norms
    arrays = _read(params, {**shapes, "kernel": "I+U 4U"})
    kernel = arrays.pop("kernel")
    if len(kernel) < (width := kernel.shape[1] // 4):
        raise ValueError(f"kernel: expected shape [I+U, 4U] with U = {width}, got {list(kernel.shape)}")
    return {"kernel": kernel, **arrays}


def from_tensorflow_layer_norm(params: Mapping[str, Any]) -> dict[str, Array]:
    """From the variables of TensorFlow 1's `LayerNormBasicLSTMCell` to the parameters of ours, as NumPy arrays.

    It normalises each gate's whole sum, as no other format does: `Weights` has no place for that.

    Args:
        params: kernel [I + U, 4U] and, from "input/gamma" to "state/beta", gamma and beta [U] of input, forget,
            transform, output and state: the names of the variables without their scope. Of a cell without `layer_norm`
            kernel and bias [4U].

    Source: tensorflow/contrib/rnn/python/ops/rnn_cell.py of TensorFlow 1.15.

    Example:
        >>> variables = convert.to_tensorflow_layer_norm(lstm_ext.LayerNormBasicLSTMCell(4, input_size=3).state_dict())
        >>> {name: a.shape for name, a in convert.from_tensorflow_layer_norm(variables).items()}
        {'kernel': (7, 16), 'gamma': (16,), 'beta': (16,), 'gamma_h': (4,), 'beta_h': (4,)}
    """
    arrays = _read_layer_norm(params, {part: "U" for parts in _NORMS.values() for part in parts})
    if "bias" in arrays:
        return arrays
    norms = {name: np.concatenate([arrays[part] for part in parts]) for name, parts in _NORMS.items()}
    return {"kernel": arrays["kernel"], **norms}


def to_tensorflow_layer_norm(params: Mapping[str, Any]) -> dict[str, Array]:
    """To the variables of TensorFlow 1's `LayerNormBasicLSTMCell`; see `from_tensorflow_layer_norm`.

    Args:
        params: the `state_dict` of our `LayerNormBasicLSTMCell`.
    """
    arrays = _read_layer_norm(params, {name: "4U" if len(parts) == 4 else "U" for name, parts in _NORMS.items()})
    if "bias" in arrays:
        return arrays
    split = {name: np.split(arrays[name], len(parts)) for name, parts in _NORMS.items()}
    variables = {part: a.copy() for name, parts in _NORMS.items() for part, a in zip(parts, split[name], strict=True)}
    return {"kernel": arrays["kernel"], **variables}


# Keras ---------------------------------------------------------------------------------------------------------------


def from_keras(weights: Sequence[Any]) -> tuple[Weights, ...]:
    """From `get_weights()` of Keras's `LSTM`, `LSTMCell` or `Bidirectional(LSTM)`.

    Gates in the order i, f, c, o (c is torch's g). The forget bias is part of the bias: `unit_forget_bias` lets it
    start at 1. The state is [h, c].

    Args:
        weights: kernel [I, 4U], recurrent_kernel [U, 4U] and, with `use_bias`, bias [4U]; of a Bidirectional, then the
            same of the backward layer.

    Returns:
        (forward,) or (forward, backward).

    Source: keras/src/layers/rnn/lstm.py and bidirectional.py.

    Example:
        >>> (forward,) = convert.from_keras([np.ones((3, 16)), np.ones((4, 16)), np.zeros(16)])  # layer.get_weights()
        >>> [a.shape for a in convert.to_keras(forward)]
        [(3, 16), (4, 16), (16,)]
    """
    if not isinstance(weights, Sequence) or len(weights) not in (2, 3, 4, 6):
        got = f"{len(weights)}" if isinstance(weights, Sequence) else type(weights).__name__
        raise ValueError(
            "weights: expected a list of 2 or 3 arrays (kernel, recurrent_kernel, perhaps bias), or of 4 or 6 for a "
            f"Bidirectional, got {got}"
        )
    shapes = {"recurrent_kernel": "U 4U", "kernel": "I 4U", "bias": "4U"}
    per_direction = 2 if len(weights) in (2, 4) else 3
    names = ["kernel", "recurrent_kernel", "bias"][:per_direction]
    prefixes = ["", "backward_"][: len(weights) // per_direction]
    arrays = _read(
        dict(zip([prefix + name for prefix in prefixes for name in names], weights, strict=True)),
        {prefix + name: shapes[name] for prefix in prefixes for name in shapes if name in names},
    )
    return tuple(
        _from_kernels(arrays[prefix + "kernel"], arrays[prefix + "recurrent_kernel"], arrays.get(prefix + "bias"))
        for prefix in prefixes
    )


def to_keras(layer: Layers) -> list[Array]:
    """To what `set_weights` of Keras's `LSTM`, `LSTMCell` or `Bidirectional(LSTM)` takes; see `from_keras`.

    Args:
        layer: one direction or (forward, backward); without biases for a Keras layer with `use_bias=False`.
    """
    arrays: list[Array] = []
    for weights in _copy_layer(layer):
        kernel, recurrent_kernel, bias = _to_kernels(weights)
        arrays += [kernel, recurrent_kernel, *([] if weights.b_ih is None else [bias])]
    return arrays


# Flax ----------------------------------------------------------------------------------------------------------------


_LINEN = ("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho")
_NNX = ("ii", "if_", "ig", "io"), ("hi", "hf", "hg", "ho")


def _flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """{"ii": {"kernel": a}} as {"ii/kernel": a}."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params: expected a mapping from names to mappings, got {type(params).__name__}")
    flat: dict[str, Any] = {}
    for module, own in params.items():
        flat |= {f"{module}/{name}": a for name, a in own.items()} if isinstance(own, Mapping) else {module: own}
    return flat


def _from_gates(flat: Mapping[str, Any], inputs: Sequence[str], hiddens: Sequence[str]) -> Weights:
    """From the dense modules of x, without a bias, and of h, one for each gate."""
    shapes = {f"{name}/kernel": "H H" for name in hiddens} | {f"{name}/bias": "H" for name in hiddens}
    arrays = _read(flat, shapes | {f"{name}/kernel": "I H" for name in inputs})
    kernel, recurrent_kernel = (
        np.concatenate([arrays[f"{name}/kernel"] for name in names], axis=1) for names in (inputs, hiddens)
    )
    return _from_kernels(kernel, recurrent_kernel, np.concatenate([arrays[f"{name}/bias"] for name in hiddens]))


def _to_gates(weights: Weights, inputs: Sequence[str], hiddens: Sequence[str]) -> dict[str, dict[str, Array]]:
    kernel, recurrent_kernel, bias = _to_kernels(weights)
    tree = {name: {"kernel": a.copy()} for name, a in zip(inputs, split_gates(kernel), strict=True)}
    for name, a, b in zip(hiddens, split_gates(recurrent_kernel), split_gates(bias), strict=True):
        tree[name] = {"kernel": a.copy(), "bias": b.copy()}
    return tree


def from_linen(params: Mapping[str, Any]) -> Weights:
    """From the parameters of Flax linen's `OptimizedLSTMCell` or `LSTMCell`, which are the same.

    The one bias is that of h, zeros at the start, and the forget bias is part of it. The carry is (c, h), c first.

    Args:
        params: {"ii": {"kernel" [I, H]}, "if", "ig", "io", "hi": {"kernel" [H, H], "bias" [H]}, "hf", "hg", "ho"},
            a module for each gate, of x (i…) and of h (h…): `variables["params"]` of a cell.

    Source: flax/linen/recurrent.py.

    Example:
        >>> params = convert.to_linen(convert.Weights(np.ones((16, 3)), np.ones((16, 4))))
        >>> params["ii"]["kernel"].shape, params["hi"]["bias"].shape, convert.from_linen(params).w_ih.shape
        ((3, 4), (4,), (16, 3))
    """
    return _from_gates(_flatten(params), *_LINEN)


def to_linen(weights: Layers) -> dict[str, dict[str, Array]]:
    """To the parameters of Flax linen's `OptimizedLSTMCell` or `LSTMCell`; see `from_linen`.

    Args:
        weights: one direction; `cell.apply({"params": to_linen(weights)}, carry, x)` runs it.
    """
    return _to_gates(_copy(weights), *_LINEN)


def from_nnx(params: Mapping[str, Any]) -> Weights:
    """From the parameters of Flax NNX's `OptimizedLSTMCell` or `LSTMCell`.

    The first keeps the gates of x, and of h, side by side in the order i, f, g, o, the second a module for each gate.
    The one bias is that of h, zeros at the start, and the forget bias is part of it. The carry is (c, h), c first.

    Args:
        params: {"dense_i": {"kernel" [I, 4H]}, "dense_h": {"kernel" [H, 4H], "bias" [4H]}}, or as `from_linen` has it
            with "if_" for "if": `nnx.state(cell, nnx.Param)` or `nnx.to_pure_dict` of it.

    Source: flax/nnx/nn/recurrent.py.

    Example:
        >>> params = convert.to_nnx(convert.Weights(np.ones((16, 3)), np.ones((16, 4))))
        >>> params["dense_i"]["kernel"].shape, convert.from_nnx(params).w_ih.shape
        ((3, 16), (16, 3))
    """
    flat = _flatten(params)
    if not any(name.startswith("dense_") for name in flat):
        return _from_gates(flat, *_NNX)
    arrays = _read(flat, {"dense_h/kernel": "H 4H", "dense_h/bias": "4H", "dense_i/kernel": "I 4H"})
    return _from_kernels(arrays["dense_i/kernel"], arrays["dense_h/kernel"], arrays["dense_h/bias"])


def to_nnx(weights: Layers, *, optimized: bool = True) -> dict[str, dict[str, Array]]:
    """To the parameters of Flax NNX's `OptimizedLSTMCell`, or of its `LSTMCell`; see `from_nnx`.

    Args:
        weights: one direction; `nnx.update(cell, to_nnx(weights))` loads it.
        optimized: whether for `OptimizedLSTMCell`.
    """
    own = _copy(weights)
    if not optimized:
        return _to_gates(own, *_NNX)
    kernel, recurrent_kernel, bias = _to_kernels(own)
    return {"dense_i": {"kernel": kernel}, "dense_h": {"kernel": recurrent_kernel, "bias": bias}}


# Equinox -------------------------------------------------------------------------------------------------------------


def from_equinox(params: Mapping[str, Any]) -> Weights:
    """From the arrays of Equinox's `nn.LSTMCell`.

    Gates in the order i, f, g, o, in torch's layout, with one bias; the forget bias is part of it. The state is (h, c).

    Args:
        params: weight_ih [4H, I], weight_hh [4H, H] and bias [4H] (None with `use_bias=False`): the attributes of the
            cell by name.

    Source: equinox/nn/_rnn.py.

    Example:
        >>> params = convert.to_equinox(convert.Weights(np.ones((16, 3)), np.ones((16, 4))))
        >>> params["weight_ih"].shape, params["bias"], convert.from_equinox(params).w_ih.shape
        ((16, 3), None, (16, 3))
    """
    arrays = _read(params, {"weight_hh": "4H H", "weight_ih": "4H I", "bias": "4H"}, optional={"bias"})
    bias = arrays.get("bias")
    return Weights(arrays["weight_ih"], arrays["weight_hh"], bias, None if bias is None else np.zeros_like(bias))


def to_equinox(weights: Layers) -> dict[str, Array | None]:
    """To the attributes of Equinox's `nn.LSTMCell`, to be put in with `eqx.tree_at`; see `from_equinox`.

    Args:
        weights: one direction; without biases for a cell with `use_bias=False`, whose bias is None.
    """
    own = _copy(weights)
    bias = None if own.b_ih is None else np.add(*_biases(own))
    return {"weight_ih": own.w_ih, "weight_hh": own.w_hh, "bias": bias}


# haste ---------------------------------------------------------------------------------------------------------------


def from_haste(params: Mapping[str, Any]) -> AnyWeights:
    """From the `state_dict` of haste's `LSTM` or `LayerNormLSTM` for PyTorch.

    For the variables of its LSTM for TensorFlow take `from_tensorflow`. Gates in the order i, g, f, o, and one bias.
    The forget bias, 1 at the start, is part of it. The state is (h, c).

    Args:
        params: kernel [I, 4H], recurrent_kernel [H, 4H], bias [4H]; of a LayerNormLSTM also gamma [2, 4H], gamma_h and
            beta_h [H], which the result then has too: the module is `LSTM(…, layer_norm=True)`.

    Source: haste 0.5.0rc0, haste_pytorch/lstm.py and layer_norm_lstm.py (frameworks/pytorch/lstm.py in its repository).

    Example:
        >>> params = convert.to_haste(convert.Weights(np.ones((16, 3)), np.ones((16, 4))))
        >>> params["kernel"].shape, convert.from_haste(params).w_ih.shape
        ((3, 16), (16, 3))
    """
    norms = {field: shape for field, shape in _EXTRA.items() if field != "peephole"}
    norms = norms if isinstance(params, Mapping) and "gamma" in params else {}
    arrays = _read(params, {"recurrent_kernel": "H 4H", "kernel": "I 4H", "bias": "4H", **norms})
    weights = _from_kernels(arrays["kernel"], arrays["recurrent_kernel"], arrays["bias"], "igfo")
    if not norms:
        return weights
    gamma = _transpose(_reorder(_transpose(arrays["gamma"]), "igfo"))
    return CellWeights(*weights, gamma=gamma, gamma_h=arrays["gamma_h"], beta_h=arrays["beta_h"])


def to_haste(weights: Layers) -> dict[str, Array]:
    """To the parameters of haste's `LSTM`, or `LayerNormLSTM`, for PyTorch; see `from_haste`.

    Args:
        weights: one direction.
    """
    own = _copy(weights, keeps=_EXTRA.keys() - {"peephole"})
    params = dict(zip(("kernel", "recurrent_kernel", "bias"), _to_kernels(own, "igfo"), strict=True))
    if len(own) > len(Weights._fields):
        gamma = _transpose(_reorder(_transpose(own.gamma), "ifgo", "igfo"))
        params |= {"gamma": gamma, "gamma_h": own.gamma_h, "beta_h": own.beta_h}
    return params


# ONNX ----------------------------------------------------------------------------------------------------------------


def _text(value: Any) -> Any:
    """Strings come from protocol buffers as bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _check_onnx_attributes(attributes: Mapping[str, Any], hidden_size: int, num_directions: int) -> None:
    allowed: dict[str, list[Any]] = {
        "hidden_size": [hidden_size],
        "direction": ["bidirectional"] if num_directions == 2 else ["forward", "reverse"],
        "activations": [["Sigmoid", "Tanh", "Tanh"] * num_directions],
        "input_forget": [0],
        "layout": [0, 1],
    }
    if not isinstance(attributes, Mapping):
        raise TypeError(f"attributes: expected a mapping from names to values, got {type(attributes).__name__}")
    for name, value in attributes.items():
        got = [_text(each) for each in value] if isinstance(value, (list, tuple)) else _text(value)
        if name not in allowed:
            raise ValueError(f"attribute {name}: expected none, as it has no counterpart here, got {got}")
        if got not in allowed[name]:
            raise ValueError(f"attribute {name}: expected {' or '.join(map(str, allowed[name]))}, got {got}")


def from_onnx(inputs: Mapping[str, Any], attributes: Mapping[str, Any] | None = None) -> tuple[AnyWeights, ...]:
    """From the inputs of an ONNX `LSTM` node.

    Gates in the order i, o, f, c (c is torch's g), and both biases, one after the other; the forget bias is part of
    them. initial_h and initial_c [D, B, H] are torch's h_0 and c_0 (with layout=1 [B, D, H]), a state is (h, c).

    Args:
        inputs: W [D, 4H, I], R [D, 4H, H] and perhaps B [D, 8H], D directions; with peepholes P [D, 3H] of i, o and f,
            of which the results have `peephole`.
        attributes: those of the node by name, to refuse what has no counterpart here: clipping, other activations,
            a coupled input and forget gate. None if the node has no such.

    Returns:
        (forward,) or (forward, backward). The one of a node with direction="reverse" goes with `lstm(…, reverse=True)`.

    Source: https://onnx.ai/onnx/operators/onnx__LSTM.html

    Example:
        >>> inputs = convert.to_onnx(convert.Weights(np.ones((16, 3)), np.ones((16, 4))))
        >>> {name: a.shape for name, a in inputs.items()}, len(convert.from_onnx(inputs))
        ({'W': (1, 16, 3), 'R': (1, 16, 4)}, 1)
    """
    arrays = _read(inputs, {"R": "D 4H H", "W": "D 4H I", "B": "D 8H", "P": "D 3H"}, optional={"B", "P"})
    D, _, H = arrays["R"].shape
    if D not in (1, 2):
        raise ValueError(f"R: expected shape [D, 4H, H] with D = 1 or 2, got {list(arrays['R'].shape)}")
    if attributes is not None:
        _check_onnx_attributes(attributes, H, D)
    layer: list[AnyWeights] = []
    for d in range(D):
        biases = np.split(arrays["B"][d], 2) if "B" in arrays else []
        w_ih, w_hh, *both = (_reorder(a, "iofg") for a in (arrays["W"][d], arrays["R"][d], *biases))
        b_ih, b_hh = both or (None, None)
        weights = w_ih, w_hh, b_ih, b_hh
        if "P" in arrays:
            i, o, f = np.split(arrays["P"][d], 3)
            layer.append(CellWeights(*weights, peephole=np.stack([i, f, o])))
        else:
            layer.append(Weights(*weights))
    return tuple(layer)


def to_onnx(layer: Layers) -> dict[str, Array]:
    """To the inputs W, R and B, and with peepholes P, of an ONNX `LSTM` node; see `from_onnx`.

    The node's attribute hidden_size is `R.shape[2]`, its direction "bidirectional" for two.

    Args:
        layer: one direction or (forward, backward). Without biases there is no B, which is optional in ONNX.
    """
    own = _copy_layer(layer, keeps={"peephole"})
    stacks = zip(*(w[:4] if w.b_ih is not None else w[:2] for w in own), strict=True)
    W, R, *biases = (np.stack([_reorder(a, "ifgo", "iofg") for a in arrays]) for arrays in stacks)
    peepholes = [w.peephole[[0, 2, 1]].ravel() for w in own if len(w) > len(Weights._fields)]
    inputs = {"W": W, "R": R} | ({"B": np.concatenate(biases, axis=1)} if biases else {})
    return inputs | ({"P": np.stack(peepholes)} if peepholes else {})


# cuDNN ---------------------------------------------------------------------------------------------------------------


def _cudnn_shapes(
    input_size: int, hidden_size: int, num_layers: int, num_directions: int
) -> dict[Any, tuple[int, ...]]:
    """(layer, direction, field) to shape, in the order of the buffer: all matrices, then all biases."""
    H = hidden_size
    shapes: dict[Any, tuple[int, ...]] = {}
    for fields in (("w_ih", "w_hh"), ("b_ih", "b_hh")):
        for n in range(num_layers):
            inputs = input_size if n == 0 else num_directions * H
            own = {"w_ih": (4 * H, inputs), "w_hh": (4 * H, H), "b_ih": (4 * H,), "b_hh": (4 * H,)}
            shapes |= {(n, d, field): own[field] for d in range(num_directions) for field in fields}
    return shapes


def from_cudnn(
    weights: Any, input_size: int, hidden_size: int, num_layers: int = 1, bidirectional: bool = False
) -> list[tuple[Weights, ...]]:
    """From cuDNN's flat buffer, as `jax.experimental.rnn` has it.

    The matrices of all layers come first, w_ih before w_hh, then the biases of all, b_ih before b_hh; within a layer
    the backward direction follows the forward one. Gates in the order i, f, g, o, in torch's layout, with both biases;
    the forget bias is part of them. States are h_0 and c_0 as torch's, [L * D, B, H].

    Args:
        weights: [N], N being `jax.experimental.rnn.get_num_params_in_lstm` of the other arguments.
        input_size, hidden_size, num_layers, bidirectional: as `LSTM` takes them.

    Returns:
        From the input up, (forward,) or (forward, backward) for each layer.

    Source: jax/experimental/rnn.py.

    Example:
        >>> flat = convert.to_cudnn(convert.Weights(np.ones((16, 3)), np.ones((16, 4))))
        >>> flat.shape, convert.from_cudnn(flat, 3, 4)[0][0].w_ih.shape
        ((144,), (16, 3))
    """
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name}: expected a positive integer, got {size!r}")
    num_directions = 2 if bidirectional else 1
    shapes = _cudnn_shapes(input_size, hidden_size, num_layers, num_directions)
    ends = np.cumsum([prod(shape) for shape in shapes.values()])
    flat = _array("weights", weights)
    if flat.shape != (ends[-1],):
        given = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        raise ValueError(
            f"weights: expected shape [{ends[-1]}] with {given} and {num_directions} direction(s), "
            f"got {list(flat.shape)}"
        )
    pieces = zip(shapes.items(), np.split(flat, ends[:-1]), strict=True)
    arrays = {key: piece.reshape(shape).copy() for (key, shape), piece in pieces}
    return [
        tuple(Weights._make(arrays.get((n, d, field)) for field in Weights._fields) for d in range(num_directions))
        for n in range(num_layers)
    ]


def to_cudnn(layers: Layers) -> Array:
    """To cuDNN's flat buffer [N], as `jax.experimental.rnn` takes it (in float32); see `from_cudnn`.

    Args:
        layers: from the input up, all of them with or without a backward direction.
    """
    stack = _copy_stack(layers)
    everything = [weights for layer in stack for weights in layer]
    matrices = [a for weights in everything for a in (weights.w_ih, weights.w_hh)]
    biases = [a for weights in everything for a in _biases(weights)]
    return np.concatenate([a.ravel() for a in matrices + biases])
