"""Layers whose weights do not change, as torch sees them: what they are, how they are packed, and one op for all.

A `Stack` is what a frozen module holds: its weights in a portable layout, by name, and what the compiled core has
packed them to. The op `lstm_ext::frozen_forward` takes the portable weights, so that saved programs hold them, and
finds the packed ones again by the identity of these.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _native, route
from ._torch_private import _AutoDispatchBelowAutograd
from .call import BOTH, FORWARD, CallTuple, LayerCall, Outputs, OutputsTuple, Save
from .cell import Activation, cell_of
from .engines import choose_under, forced
from .torch_op import Batch, foldable, one_by_one, or_empty, plain

WEIGHTS = ("float32", "bfloat16", "int8")
_BOUNDED = frozenset({Activation.TANH, Activation.SIGMOID, Activation.HARD_SIGMOID, Activation.SOFTSIGN})

StackOutputs = tuple[Any, Any, Any]  # y, h_n (None of a step), c_n


class Spec(NamedTuple):
    """What a frozen module is, beside its weights; all plain values.

    Attributes:
        kind: the class of torch or ours that it does the work of.
        dtype: of x, the state and the output.
        weights: how the matrices are stored: as `dtype`, or narrower.
        cell: the numbers of a `Cell` in torch's layout, None of the plain LSTM.
        extra: the names of the weights that the cell has besides.
        state_is_tuple: of a cell of TensorFlow's: whether its state is a pair.
    """

    kind: str
    input_size: int
    hidden_size: int
    num_layers: int
    bidirectional: bool
    bias: bool
    proj_size: int
    batch_first: bool
    dtype: str
    weights: str
    cell: tuple[float, ...] | None = None
    extra: tuple[str, ...] = ()
    state_is_tuple: bool = True

    @property
    def narrow(self) -> bool:
        """Whether matrices are stored in fewer bits than x has."""
        return self.weights != self.dtype

    @property
    def num_directions(self) -> int:
        """D."""
        return 2 if self.bidirectional else 1

    @property
    def width(self) -> int:
        """P, the width of h."""
        return self.proj_size or self.hidden_size

    def names(self) -> list[str]:
        """The portable weights, layer by layer and direction by direction, as `torch.nn.LSTM` names them.

        Each int8 matrix is followed by its scales.
        """
        matrices = ["weight_ih", "weight_hh"]
        biases = ["bias_ih", "bias_hh"] if self.bias else []
        projection = ["weight_hr"] if self.proj_size else []
        of_direction = []
        for name in (*matrices, *biases, *projection, *self.extra):
            of_direction.append(name)
            if self.weights == "int8" and name.startswith("weight"):
                of_direction.append(name + "_scale")
        cell = not self.kind.endswith("LSTM")
        suffixes = [
            "" if cell else f"_l{layer}{reverse}"
            for layer in range(self.num_layers)
            for reverse in ("", "_reverse")[: self.num_directions]
        ]
        return [name + suffix for suffix in suffixes for name in of_direction]

    def to_text(self) -> str:
        """As the op takes it."""
        return json.dumps(self._asdict())

    @classmethod
    def from_text(cls, text: str) -> Spec:
        """The way back."""
        fields = json.loads(text)
        cell = fields.pop("cell")
        return cls(**{**fields, "extra": tuple(fields["extra"])}, cell=None if cell is None else tuple(cell))


def quantized(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers and a scale for each row: the largest of a row becomes ±127.

    Raises:
        ValueError: NaN or infinity among the weights.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name}: expected finite weights for int8, got NaN or infinity")
    largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight))
    scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round().to(torch.int8), scale


def dequantized(tensors: Sequence[Tensor], spec: Spec) -> list[Tensor]:
    """The weights as a call takes them: all of the dtype of x."""
    if not spec.narrow:
        return list(tensors)
    wide: list[Tensor] = []
    dtype = getattr(torch, spec.dtype)
    for name, a in zip(spec.names(), tensors, strict=True):
        if "_scale" in name:
            wide[-1] = wide[-1] * a[:, None]
        else:
            wide.append(a.to(dtype))
    return wide


class Stack:
    """All layers of a frozen module. It does not change.

    Attributes:
        spec: what it is.
        tensors: the portable weights, in the order of `spec.names()`.
        native: what the core has packed; None where the ordinary engines compute, because of `reason`.
        reason: "" if it is packed.
    """

    def __init__(self, spec: Spec, tensors: Sequence[Tensor]):
        self.spec, self.tensors = spec, list(tensors)
        self.reason = self._why_not_packed()
        self.native: Any = None if self.reason else self._packed()
        self._wide: list[Tensor] | None = None

    def _why_not_packed(self) -> str:
        spec = self.spec
        device = self.tensors[0].device
        if device.type != "cpu":
            return f"frozen weights are packed on the CPU alone, and these are on {device}"
        choice = choose_under(None, "cpu", getattr(torch, spec.dtype))
        if choice.name != "cpu":
            return choice.reason or f"the backend {choice.name} was asked for"
        if spec.weights == "int8" and spec.cell is not None:
            cell = cell_of(spec.cell)
            if not {cell.activation, cell.recurrent_activation} <= _BOUNDED:
                return "int8 needs activations with a bound"
        return ""

    def _packed(self) -> Any:
        spec, names = self.spec, self.spec.names()
        each = len(names) // spec.num_layers
        cell = None if spec.cell is None else cell_of(spec.cell)
        layers = []
        for first in range(0, len(names), each):
            own = list(zip(names, self.tensors, strict=True))[first : first + each]
            weights = [a for name, a in own if "_scale" not in name]
            layers.append((weights, [a for name, a in own if "_scale" in name], cell))
        directions = BOTH if spec.bidirectional else FORWARD
        storage: Any = spec.weights if spec.narrow else "plain"
        return _native.C.Frozen(layers, directions, spec.dtype, storage)

    @property
    def engine(self) -> str:
        """What computes: the name of a backend, and how the weights are read."""
        if self.native is not None:
            return f"cpu, packed {self.spec.weights}"
        device, dtype = self.tensors[0].device.type, getattr(torch, self.spec.dtype)
        return f"{choose_under(None, device, dtype).name or 'torch'}, not packed: {self.reason}"

    def run(self, call: LayerCall) -> StackOutputs:
        """The outputs of plain tensors or arrays; `call` has neither weights nor cell, and the state of all layers."""
        if self.native is not None and forced.get() in (None, "cpu"):
            outputs = self.native.run(call)
            if outputs is not NotImplemented:
                return outputs
        return self.run_by_engines(call)

    def run_by_engines(self, call: LayerCall) -> StackOutputs:
        """The same by the ordinary engines, layer by layer."""
        if isinstance(call.x, np.ndarray):
            y, h_n, c_n = self.run_by_engines(call.map(tensor_of))
            return y.numpy(), None if h_n is None else h_n.numpy(), c_n.numpy()
        if self._wide is None and not torch.compiler.is_compiling():
            self._wide = dequantized(self.tensors, self.spec)
        return run_layers(call, self._wide or dequantized(self.tensors, self.spec), self.spec)


def tensor_of(a: Any) -> Tensor:
    """An array, in whichever byte order or layout."""
    a = np.asarray(a, a.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(a if a.flags.writeable else a.copy())


def run_layers(
    call: LayerCall,
    weights: Sequence[Tensor],
    spec: Spec,
    run_layer: Callable[[CallTuple], OutputsTuple] = route.run,
) -> StackOutputs:
    """A call of a frozen module as one call for each layer."""
    cell, directions = None if spec.cell is None else cell_of(spec.cell), BOTH if spec.bidirectional else FORWARD
    each, D = len(weights) // spec.num_layers, spec.num_directions
    if call.x.dtype != getattr(torch, spec.dtype):
        raise RuntimeError(f"x: expected dtype {spec.dtype} as the frozen weights have, got {call.x.dtype}")
    x, h_ns, c_ns = call.x, [], []
    with torch.no_grad():
        for n in range(spec.num_layers):
            h0, c0 = (
                a if a is None or call.is_step else _layers_of(name, a, n, spec)
                for name, a in (("h0", call.h0), ("c0", call.c0))
            )
            own = list(weights[n * each : (n + 1) * each])
            masks = call.lengths, call.resets, call.batch_sizes, directions, call.batch_first
            x, h_n, c_n, _, _ = run_layer((x, h0, c0, own, *masks, cell, None))
            h_ns.append(h_n)
            c_ns.append(c_n)
    if call.is_step:
        return x, None, c_ns[0]
    return x, torch.cat(h_ns) if D * spec.num_layers > 1 else h_ns[0], torch.cat(c_ns) if len(c_ns) > 1 else c_ns[0]


def _layers_of(name: str, state: Tensor, n: int, spec: Spec) -> Tensor:
    """The part of a state [L * D, B, …] that belongs to a layer."""
    D = spec.num_directions
    if state.shape[0] != spec.num_layers * D:
        raise RuntimeError(f"{name}: expected {spec.num_layers * D} layers and directions, got {list(state.shape)}")
    return state[n * D : (n + 1) * D]


# The op --------------------------------------------------------------------------------------------------------------


_library = torch.library.Library("lstm_ext", "FRAGMENT")
_library.define(
    "frozen_forward(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? resets, "
    "Tensor? batch_sizes, bool batch_first, str frozen) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
frozen_forward = torch.ops.lstm_ext.frozen_forward.default


class _Known(NamedTuple):
    """A stack, and the very tensors, in the very versions, from which it was made."""

    refs: list[weakref.ref[Tensor]]
    versions: list[int]
    stack: Callable[[], Stack | None]

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        return all(ref() is a for ref, a in zip(self.refs, tensors, strict=True)) and self.versions == versions(tensors)


_known: dict[tuple[int, str], _Known] = {}


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written to, as far as torch counts it."""
    return [0 if a.is_inference() else a._version for a in tensors]


def remember(stack: Stack, tensors: Sequence[Tensor], text: str, keep: bool) -> None:
    """From now on the op finds the stack of these tensors; `keep`: and keeps it, for as long as they live."""
    key = (id(tensors[0]), text)
    refs = [weakref.ref(a) for a in tensors[1:]]
    first = weakref.ref(tensors[0], lambda _: _known.pop(key, None))
    _known[key] = _Known([first, *refs], versions(tensors), (lambda: stack) if keep else weakref.ref(stack))


def stack_of(tensors: Sequence[Tensor], text: str) -> Stack:
    """That of these weights: the one that is known, or a new one of copies."""
    known = _known.get((id(tensors[0]), text))
    stack = known.stack() if known is not None and known.is_of(tensors) else None
    if stack is None:
        stack = Stack(Spec.from_text(text), [a.detach().clone() for a in tensors])
        remember(stack, tensors, text, keep=True)
    return stack


def _call(arguments: Sequence[Any]) -> LayerCall:
    x, h0, c0, _, lengths, resets, batch_sizes, batch_first, _ = arguments
    return LayerCall(x, h0, c0, [], lengths, resets, batch_sizes, FORWARD, batch_first)


@torch.library.impl("lstm_ext::frozen_forward", ("cpu", "cuda"))
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of a step h_n is an empty tensor."""
    y, h_n, c_n = stack_of(arguments[3], arguments[8]).run(_call([plain(a) for a in arguments]))
    return y, or_empty(h_n, y), c_n


@torch.library.register_fake("lstm_ext::frozen_forward")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, spec = _call(arguments), Spec.from_text(arguments[8])
    x, H, P = call.x, spec.hidden_size, spec.width
    if call.is_step:
        return x.new_empty(*x.shape[:-1], P), x.new_empty(0), x.new_empty(*x.shape[:-1], H)
    states, B = spec.num_layers * spec.num_directions, _batch_size(call)
    return (
        x.new_empty(*x.shape[:-1], spec.num_directions * P),
        x.new_empty(states, B, P),
        x.new_empty(states, B, H),
    )


def _batch_size(call: LayerCall) -> Any:
    """B; of packed rows whichever state shows it, else what the contents of batch_sizes will be."""
    if call.batch_sizes is None:
        return call.batch_size()
    given = call.h0 if call.h0 is not None else call.c0
    return torch.library.get_ctx().new_dynamic_size() if given is None else given.shape[1]


def _without_gradient(*arguments: Any) -> Any:
    with _AutoDispatchBelowAutograd():
        return frozen_forward(*arguments)


_library.impl(frozen_forward.name(), _without_gradient, "Autograd")


def layer_by_layer(
    forward: Callable[[LayerCall, Save], OutputsTuple], arguments: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op gives, by an engine's forward pass for each layer, with weights of the dtype of x."""
    spec = Spec.from_text(arguments[8])

    def run(asked: CallTuple) -> OutputsTuple:
        call = LayerCall(*asked)
        if call.is_step:
            return Outputs(*forward(call.with_time(), Save.NOTHING)).without_time(call)
        return forward(call, Save.NOTHING)

    y, h_n, c_n = run_layers(_call(arguments), dequantized(arguments[3], spec), spec, run)
    return y, or_empty(h_n, y), c_n


@torch.library.register_vmap("lstm_ext::frozen_forward")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    """Mapped calls as one of a larger batch."""
    call, size = _call(arguments), info.batch_size
    x, h0, c0, weights, lengths, resets, batch_sizes, *_ = in_dims
    dims = LayerCall(x, h0, c0, weights, lengths, resets, batch_sizes, FORWARD, call.batch_first)
    if not foldable(size, call, dims):
        return one_by_one(frozen_forward, size, in_dims, arguments)
    rank = call.x.dim() - (dims.x is not None)
    if call.batch_sizes is None and rank < 3:
        return _step_of_all(call, dims, size, rank, arguments)
    batch = Batch(call, size)
    y, h_n, c_n = frozen_forward(*_arguments(batch.fold_call(dims), arguments))
    unfolded, out_dims = batch.unfold((y, h_n, c_n), (batch.axis, 1, 1))
    return tuple(unfolded), tuple(out_dims)


def _arguments(call: LayerCall, arguments: Sequence[Any]) -> tuple[Any, ...]:
    return *call[:3], arguments[3], *call[4:7], *arguments[7:]


def _step_of_all(call: LayerCall, dims: LayerCall, size: int, rank: int, arguments: Sequence[Any]) -> Any:
    """Steps [B, I] or [I], `size` of them."""

    def merged(a: Any, dim: int | None) -> Any:
        if a is None:
            return None
        a = a.expand(size, *a.shape) if dim is None else a.movedim(dim, 0)
        return a.flatten(0, 1) if rank == 2 else a

    x, h0, c0 = (merged(a, dim) for a, dim in zip(call[:3], dims[:3], strict=True))
    merged_call = call._replace(x=x, h0=h0, c0=c0, resets=merged(call.resets, dims.resets))
    h, nothing, c = frozen_forward(*_arguments(merged_call, arguments))
    if rank == 2:
        h, c = (a.unflatten(0, (size, len(a) // size)) for a in (h, c))
    return (h, nothing, c), (0, None, 0)


@register_flop_formula(torch.ops.lstm_ext.frozen_forward, get_raw=True)
def _(*arguments: Any, out_val: Any = None) -> int:
    """Two for each multiply-add of a matrix, as of the layer's op."""
    names = Spec.from_text(arguments[8]).names()
    of_matrices = (name.startswith("weight") and "_scale" not in name for name in names)
    numbers = sum(a.numel() for a, counts in zip(arguments[3], of_matrices, strict=True) if counts)
    return 2 * arguments[0].shape[:-1].numel() * numbers
