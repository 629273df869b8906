"""Modules for inference alone, their weights packed once, and streams that keep their state between calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import PackedSequence

from . import _native
from ._torch_private import _is_any_autocast_enabled
from .call import FORWARD, LayerCall
from .cell import read_integer
from .checks import check_kind, is_tensor, kind
from .engines import forced, onnx
from .frozen_stack import Spec, Stack, dequantized, frozen_forward, remember, run_layers, tensor_of
from .route import as_leaf, is_proxy
from .tensorflow import LSTMStateTuple
from .torch_op import is_eager

M = TypeVar("M", bound=Module)
A = TypeVar("A")

_FORMAT = 1  # of pickles and files
_NONE: list[Any] = []


class Frozen(Module):
    """What frozen modules share: weights that nothing can change, in a portable layout and packed for this machine."""

    _held: frozenset[str] = frozenset()  # the names of what cannot be set, once it is there
    hidden_size: int

    def __init__(self, spec: Spec, tensors: Sequence[Tensor], error: float | None = None):
        super().__init__()
        self.eval()
        self._prepare(spec, tensors, error)

    def _prepare(self, spec: Spec, tensors: Sequence[Tensor], error: float | None) -> None:
        stack = Stack(spec, tensors)
        self._spec, self._text, self._tensors, self._stack = spec, spec.to_text(), stack.tensors, stack
        self._run = None if stack.native is None else stack.native.run
        self.error = error
        for name in ("input_size", "hidden_size", "num_layers", "bidirectional", "bias", "proj_size", "batch_first"):
            setattr(self, name, getattr(spec, name))
        self.weights = spec.weights
        own = "_spec", "_text", "_tensors", "_stack", "_run", "_held", "error", "dtype", "nbytes", "engine"
        self._held = frozenset((*own, *Spec._fields, *spec.names()))
        remember(stack, stack.tensors, self._text, keep=False)

    # What nothing changes ----------------------------------------------------------------------------

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"{type(self).__name__}: {what}; its weights are packed and stay as they are: change the module that it "
            "was made from, and freeze that again"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Hooks and the like may be set; weights, sizes and the mode of training not."""
        is_mode = name == "training" and value
        if self._held and (name in self._held or is_mode or isinstance(value, (Tensor, Module))):
            self._refuse(f"{name} cannot be set")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """The same."""
        if name in self._held:
            self._refuse(f"{name} cannot be deleted")
        super().__delattr__(name)

    def train(self: M, mode: bool = True) -> M:
        """Only `eval()` is possible."""
        if mode:
            self._refuse("it cannot be trained")  # type: ignore[operator]
        return super().train(False)

    def register_parameter(self, name: str, param: Any) -> None:
        """There are none."""
        self._refuse(f"it takes no parameter {name!r}")

    def register_buffer(self, name: str, tensor: Any, persistent: bool = True) -> None:
        """There are none."""
        self._refuse(f"it takes no buffer {name!r}")

    def add_module(self, name: str, module: Any) -> None:
        """There are none."""
        self._refuse(f"it takes no module {name!r}")

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        """`to`, `half`, `cuda` and so on: only what changes nothing."""
        device, dtype = self._tensors[0].device, self.dtype  # type: ignore[index]
        probe = torch.empty(1, device=device, dtype=dtype)  # type: ignore[call-overload]
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            self._refuse(f"{moved.dtype} on {moved.device} was asked for")  # type: ignore[operator]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Copies of the portable weights by the names of `torch.nn.LSTM`."""
        for name, a in zip(self._spec.names(), self._tensors, strict=True):
            destination[prefix + name] = a.clone()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Only the same weights may be loaded."""
        for name, a in zip(self._spec.names(), self._tensors, strict=True):
            given = state_dict.get(prefix + name)
            if given is None:
                missing_keys.append(prefix + name)
            elif given.dtype != a.dtype or not torch.equal(given.to(a.device), a):
                error_msgs.append(
                    f"{prefix}{name}: {type(self).__name__} holds other weights, which cannot be changed: load them "
                    "into the module that it was made from, and freeze that again"
                )
        names = self._spec.names()
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in names]

    def __getstate__(self) -> dict[str, Any]:
        """With portable weights: they are packed for the machine that loads them."""
        made = "_stack", "_run", "_tensors", "_text", "_held"
        kept = {name: value for name, value in vars(self).items() if name not in made}
        return {**kept, "_spec": tuple(self._spec), "_portable": self._tensors, "_format": _FORMAT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Raises RuntimeError for what a newer version has saved."""
        state = dict(state)
        if (version := state.pop("_format", None)) != _FORMAT:
            raise RuntimeError(
                f"{type(self).__name__}: expected format {_FORMAT} of a frozen module, got {version}: it was saved by "
                "another version of lstm_ext"
            )
        spec, tensors = Spec(*state.pop("_spec")), state.pop("_portable")
        super().__setstate__(state)
        self._prepare(spec, tensors, state["error"])

    # What it says --------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Of x, the state and the output."""
        found: torch.dtype = getattr(torch, self._spec.dtype)
        return found

    @property
    def nbytes(self) -> int:
        """Of the weights: as they are packed, or as they are kept where they are not."""
        if self._stack.native is not None:
            return int(self._stack.native.bytes())
        return sum(a.nbytes for a in self._tensors)

    @property
    def engine(self) -> str:
        """What computes."""
        return self._stack.engine

    def plans(self, num_steps: int, batch_size: int, num_threads: int) -> list[dict[str, Any]]:
        """How each layer would run; `lstm_ext.plan` shows it."""
        if self._stack.native is None:
            raise RuntimeError(f"plan: {type(self).__name__} is not packed: {self._stack.reason}")
        found: list[dict[str, Any]] = self._stack.native.plans(num_steps, batch_size, num_threads)
        return found

    def extra_repr(self) -> str:
        """The sizes, and how the weights are kept."""
        spec = self._spec
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "bidirectional": False, "proj_size": 0}
        sizes = [f"{name}={getattr(spec, name)}" for name, usual in defaults.items() if getattr(spec, name) != usual]
        error = "" if self.error is None else f", error={self.error:.1e}"
        shown = ", ".join([str(spec.input_size), str(spec.hidden_size), *sizes])
        return (
            f"{shown}, weights={spec.weights}, dtype={spec.dtype}, nbytes={self.nbytes}{error}, engine={self.engine!r}"
        )

    # How it computes -----------------------------------------------------------------------------------

    def _compute(self, call: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        """(y, h_n, c_n) of a call as the core takes it: without weights and cell."""
        # is_eager comes first: the compiler of torch 2.11 takes no method of a native module, not even to look at
        if is_eager() and self._run is not None and forced.get() is None and not _is_any_autocast_enabled():
            outputs: Any = self._run(call)
            if outputs is not NotImplemented:
                found: tuple[Any, Any, Any] = outputs
                return found
        return self._compute_otherwise(LayerCall(*call))

    def _compute_otherwise(self, call: LayerCall) -> tuple[Any, Any, Any]:
        """Of a call that is watched, of arrays that are not plain, or of a module that is not packed."""
        if not is_tensor(call.x) or not all(a is None or is_tensor(a) for a in (*call[1:3], *call[4:7])):
            check_kind("input", call.x)
            for name, a in call.named()[1:]:
                if a is not None:
                    check_kind(name, a, call.x)
            return self._stack.run(call.map(np.asarray))
        if _is_any_autocast_enabled():
            call = call._replace(**{name: _cast(getattr(call, name), self.dtype) for name in ("x", "h0", "c0")})
        if onnx.is_exporting():
            if self._spec.narrow:
                warnings.warn(f"ONNX gets the weights as {self._spec.dtype}, not {self.weights}", stacklevel=2)
            return run_layers(call, dequantized(self._tensors, self._spec), self._spec)
        if is_eager() and type(call.x) is Tensor:
            return self._stack.run(call)
        tensors, text, masks = self._tensors, self._text, (call.lengths, call.resets, call.batch_sizes)
        y, h_n, c_n = frozen_forward(call.x, call.h0, call.c0, tensors, *masks, call.batch_first, text)
        return y, None if call.is_step else h_n, c_n

    def stream(self, batch_size: int = 1) -> Stream:
        """A stream of `batch_size` sequences, which begins with a state of zeros.

        Raises:
            ValueError: a module of two directions: the second one would need the end of the stream.
        """
        return Stream(self, batch_size)


def _cast(a: Any, dtype: torch.dtype) -> Any:
    return a if a is None or not a.is_floating_point() else a.to(dtype)


def _pair(hx: Any, what: str = "hx: expected a pair of arrays (h_0, c_0)") -> tuple[Any, Any]:
    if not isinstance(hx, (tuple, list)) or len(hx) != 2 or hx[0] is None or hx[1] is None:
        raise TypeError(f"{what}, got {type(hx).__name__}")
    return hx[0], hx[1]


def _mask(mask: Any, x: Any) -> Any:
    """Lengths or resets given as a list or an array of the other kind, beside x."""
    if mask is None or type(mask) is type(x) or not isinstance(mask, (list, tuple, int, np.ndarray, Tensor)):
        return mask
    return torch.as_tensor(mask, device=x.device) if is_tensor(x) else np.asarray(mask)


def _with_batch(name: str, a: Any, x: Any, rank: int, axis: int) -> Any:
    """An array beside x, which has no batch, as of a batch of one."""
    if a is None:
        return None
    check_kind(name, a, x)
    if a.ndim != rank:
        raise RuntimeError(f"{name}: expected {rank} dimensions beside an input without a batch, got {a.ndim}")
    return a[None] if axis == 0 else a[:, None]


class FrozenLSTM(Frozen):
    """What `freeze` makes of an `LSTM`: its forward, without gradients, on torch tensors or NumPy arrays.

    All layers are one native call. It has no Parameters, and nothing changes its weights. It is a module like others:
    it may be part of a model, be pickled, copied and saved, compiled and exported; `state_dict` has copies of the
    weights in a portable layout, int8 ones with the scale of each row. Many threads may call it at once.

    Attributes:
        input_size, hidden_size, num_layers, bias, batch_first, bidirectional, proj_size: those of the `LSTM`.
        weights: how the matrices are stored.
        dtype: of x, the state and the output.
        nbytes: of the packed weights.
        error: the largest difference of its output on random input to that of the module it was made from.
        engine: what computes.

    Example:
        >>> fast = lstm_ext.freeze(lstm_ext.LSTM(28, 64, num_layers=2), weights="int8")
        >>> y, (h_n, c_n) = fast(torch.randn(50, 16, 28))
        >>> y.shape, h_n.shape
        (torch.Size([50, 16, 64]), torch.Size([2, 16, 64]))
    """

    def forward(self, input: Any, hx: Any = None, *, lengths: Any = None, resets: Any = None) -> tuple[Any, Any]:
        """(output, (h_n, c_n)), as `LSTM` gives them.

        Args:
            input: [T, B, I], [B, T, I] if `batch_first`, [T, I], or a PackedSequence.
            hx: the initial state (h_0, c_0); None is zeros.
            lengths: integer [B], the valid steps of each row.
            resets: bool [T, B] or [B, T], where the state is zero before a step.

        Raises:
            RuntimeError, TypeError, ValueError: as `LSTM`.
        """
        rank = getattr(input, "ndim", None)
        if type(rank) is not int:
            return self._forward_of_no_array(input, hx, lengths, resets)
        h0, c0 = (None, None) if hx is None else _pair(hx)
        if lengths is not None or resets is not None:
            lengths, resets = _mask(lengths, input), _mask(resets, input)
        if rank == 2:
            return self._forward_unbatched(input, h0, c0, lengths, resets)
        if rank != 3:
            raise ValueError(f"input: expected 2 or 3 dimensions, got {rank}")
        y, h_n, c_n = self._compute(
            (input, h0, c0, _NONE, lengths, resets, None, FORWARD, self._spec.batch_first, None, None)
        )
        return y, (h_n, c_n)

    if TYPE_CHECKING:
        __call__ = forward

    def flatten_parameters(self) -> None:
        """Nothing: for models that call it before each use of an `LSTM`. The weights are packed."""

    def _forward_of_no_array(self, input: Any, hx: Any, lengths: Any, resets: Any) -> Any:
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths, resets)
        if is_proxy(input):
            return as_leaf(self, input, hx, lengths=lengths, resets=resets)
        check_kind("input", input)
        raise TypeError(f"input: expected an array with dimensions, got {kind(input)}")

    def _forward_unbatched(self, x: Any, h0: Any, c0: Any, lengths: Any, resets: Any) -> tuple[Any, Any]:
        """x [T, I], as a batch of one."""
        batch = 0 if self.batch_first else 1
        hx = None if h0 is None else (_with_batch("h0", h0, x, 2, 1), _with_batch("c0", c0, x, 2, 1))
        resets = _with_batch("resets", resets, x, 1, batch)
        if lengths is not None:
            check_kind("lengths", lengths, x)
            lengths = lengths.reshape(1)
        y, (h_n, c_n) = self.forward(_with_batch("input", x, x, 2, batch), hx, lengths=lengths, resets=resets)
        return y.squeeze(batch), (h_n.squeeze(1), c_n.squeeze(1))

    def _forward_packed(self, packed: PackedSequence, hx: Any, lengths: Any, resets: Any) -> tuple[Any, Any]:
        if lengths is not None or resets is not None:
            raise ValueError("lengths, resets: expected a padded input beside them, got a PackedSequence")
        x, batch_sizes, order, back = packed
        state = (None, None) if hx is None else _pair(hx)
        h0, c0 = (a if a is None or order is None else a.index_select(1, order) for a in state)
        y, h_n, c_n = self._compute((x, h0, c0, _NONE, None, None, batch_sizes, FORWARD, False, None, None))
        h_n, c_n = (a if back is None else a.index_select(1, back) for a in (h_n, c_n))
        return PackedSequence(y, batch_sizes, order, back), (h_n, c_n)


class FrozenLSTMCell(Frozen):
    """What `freeze` makes of an `LSTMCell`; as `FrozenLSTM` else.

    Example:
        >>> h, c = lstm_ext.freeze(lstm_ext.LSTMCell(28, 64))(torch.randn(16, 28))
        >>> h.shape
        torch.Size([16, 64])
    """

    def forward(self, input: Any, hx: Any = None, *, resets: Any = None) -> tuple[Any, Any]:
        """(h_1, c_1) of a step [B, I] or [I]; hx is (h_0, c_0), None for zeros; resets is bool [B] or []."""
        if type(input) is not Tensor and is_proxy(input):
            return as_leaf(self, input, hx, resets=resets)
        h0, c0 = (None, None) if hx is None else _pair(hx)
        return self.step(input, h0, c0, None if resets is None else _mask(resets, input))

    if TYPE_CHECKING:
        __call__ = forward

    def step(self, x: Any, h0: Any, c0: Any, resets: Any) -> tuple[Any, Any]:
        """(h, c) after a step."""
        if (rank := getattr(x, "ndim", None)) != 1 and rank != 2:
            check_kind("input", x)
            raise ValueError(f"input: expected 1 or 2 dimensions, got {rank}")
        h, _, c = self._compute((x, h0, c0, _NONE, None, resets, None, FORWARD, False, None, None))
        return h, c


class FrozenTensorFlowCell(FrozenLSTMCell):
    """What `freeze` makes of a `BasicLSTMCell` or `LayerNormBasicLSTMCell`: the weights are kept in torch's layout.

    Example:
        >>> output, state = lstm_ext.freeze(lstm_ext.BasicLSTMCell(64, input_size=28))(torch.randn(16, 28))
        >>> state.h.shape
        torch.Size([16, 64])
    """

    @property
    def state_is_tuple(self) -> bool:
        """Whether the state is a pair; else [c, h] joined."""
        return self._spec.state_is_tuple

    def forward(self, input: Any, state: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
        """(h', state), the state as the cell has it: (c, h), or both joined."""
        if type(input) is not Tensor and is_proxy(input):
            return as_leaf(self, input, state)
        if state is None:
            c0 = h0 = None
        elif self.state_is_tuple:
            c0, h0 = _pair(state, "state: expected the pair (c, h)")
        else:
            check_kind("state", state, input)
            U = self.hidden_size
            if len(state.shape) != 2 or state.shape[1] != 2 * U:
                raise RuntimeError(f"state: expected shape [B, 2*num_units] with {2 * U}, got {list(state.shape)}")
            c0, h0 = state[:, :U], state[:, U:]
        h, c = self.step(input, h0, c0, None)
        if self.state_is_tuple:
            return h, LSTMStateTuple(c, h)
        return h, (torch.cat if is_tensor(h) else np.concatenate)([c, h], -1)


class Stream:
    """Sequences that go on from call to call: `fast.stream(batch_size)`. It belongs to one thread at a time.

        y = stream(x)             # the next steps
        stream(x, out=y)          # the same into an array of the caller's, without any allocation

    Attributes:
        frozen: the module.
        batch_size: B.
        state: (h [L, B, P], c [L, B, H]) as they are now, copies; may be set.

    Example:
        >>> stream = lstm_ext.freeze(lstm_ext.LSTM(1, 16)).stream()
        >>> block, out = np.zeros((64, 1, 1), np.float32), np.empty((64, 1, 16), np.float32)
        >>> stream(block, out=out) is out
        True
    """

    def __init__(self, frozen: Frozen, batch_size: int = 1):
        spec = frozen._spec
        if spec.bidirectional:
            raise ValueError("stream: expected one direction; a reverse one begins where the stream ends")
        if (batch_size := read_integer("batch_size", batch_size)) < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.frozen, self.batch_size = frozen, batch_size
        self._is_cell, self._batch_first = isinstance(frozen, FrozenLSTMCell), spec.batch_first
        device = frozen._tensors[0].device
        shapes = [(spec.num_layers, batch_size, width) for width in (spec.width, spec.hidden_size)]
        with torch.inference_mode(False):  # they are written to in either mode
            self._states = [torch.zeros(shape, dtype=frozen.dtype, device=device) for shape in (*shapes, *shapes)]
        native = frozen._stack.native
        self._native: Any = None if native is None else _native.C.Stream(native, tuple(self._states))
        self._step = None if self._native is None else self._native.step

    def __call__(self, x: A, *, out: A | None = None, lengths: Any = None, resets: Any = None) -> A:
        """The outputs of the next steps.

        Args:
            x: a torch tensor or a NumPy array [T, B, I], [B, T, I] if the module is `batch_first`, or [T, I] of a
                stream of one; of a cell one step [B, I], or [I] of a stream of one.
            out: an array like the result, in memory apart from that of x, to write it to.
            lengths: integer [B], how many of the steps each sequence takes; the others stay as they are.
            resets: bool [T, B] or [B, T] (of a cell [B]), where a sequence begins anew before a step.

        Returns:
            y [T, B, P] in the layout of x; `out` if that was given.

        Raises:
            RuntimeError: another dtype, shape or batch size; another thread uses the stream.
            TypeError: not an array, or arrays of several kinds.
            ValueError: `out` that cannot be written to, or overlaps x; a length out of range.
        """
        if self._step is not None and forced.get() is None and not (self._is_unbatched(x)):
            try:
                y: Any = self._step(x, self._batch_first, out, lengths, resets)
            except RuntimeError as error:
                if is_eager():
                    raise
                raise RuntimeError(_WATCHED) from error
            if y is not NotImplemented:
                found: A = y
                return found
        return self._call_otherwise(x, out, lengths, resets)

    def _is_unbatched(self, x: Any) -> bool:
        return bool(getattr(x, "ndim", 0) == (1 if self._is_cell else 2))

    def _call_otherwise(self, x: Any, out: Any, lengths: Any, resets: Any) -> Any:
        """Without a batch: steps [T, I], of a cell [I]; masks in other forms; a module that is not packed."""
        if not is_tensor(x) and not isinstance(x, np.ndarray):
            raise TypeError(f"x: expected a torch.Tensor or numpy.ndarray, got {kind(x)}")
        if out is not None and kind(out) != kind(x):
            raise TypeError(f"out: expected {kind(x)} as x is, got {kind(out)}")
        lengths, resets = _mask(lengths, x), _mask(resets, x)
        if self._is_unbatched(x):
            if self.batch_size != 1:
                expected = f"{x.ndim + 1} dimensions in a stream of {self.batch_size} sequences"
                raise RuntimeError(f"x: expected {expected}, got {x.ndim}")
            batch = 0 if self._batch_first or self._is_cell else 1
            wide_x, wide_out = (_with_batch(name, a, x, x.ndim, batch) for name, a in (("x", x), ("out", out)))
            wide_resets = _with_batch("resets", resets, x, x.ndim - 1, batch)
            y: Any = self(wide_x, out=wide_out, lengths=lengths, resets=wide_resets)
            return out if out is not None else y.squeeze(batch)
        if self._step is not None and forced.get() is None:
            y = self._step(x, self._batch_first, out, lengths, resets)
            if y is not NotImplemented:
                return y
        return self._call_module(x, out, lengths, resets)

    def _call_module(self, x: Any, out: Any, lengths: Any, resets: Any) -> Any:
        """By the module's ordinary engines."""
        h, c = self._now()
        if x.ndim != (2 if self._is_cell else 3):
            raise RuntimeError(f"x: expected {2 if self._is_cell else 3} dimensions, got {x.ndim}")
        B = x.shape[0] if self._is_cell or self._batch_first else x.shape[1]
        if self.batch_size != B:
            raise RuntimeError(f"x: expected a batch of {self.batch_size} as the stream has, got {B}")
        if self._is_cell:
            if lengths is not None:
                raise ValueError("lengths: expected None in a stream of a cell, whose calls are one step")
            hx = (h[0], c[0]) if is_tensor(x) else (h[0].numpy(), c[0].numpy())
            cell: Any = self.frozen
            y, new_c = cell.step(x, *hx, resets)
            new_h, new_c = y[None], new_c[None]
        else:
            hx = (h, c) if is_tensor(x) else (h.numpy(), c.numpy())
            y, (new_h, new_c) = self.frozen(x, hx, lengths=lengths, resets=resets)
        if out is not None and (tuple(out.shape) != tuple(y.shape) or out.dtype != y.dtype):
            expected = f"shape {list(y.shape)} and dtype {y.dtype}"
            raise RuntimeError(f"out: expected {expected}, got {list(out.shape)} and {out.dtype}")
        if out is not None and _overlap(out, x):
            raise ValueError("out: expected memory apart from that of x")
        if out is not None and not is_tensor(out) and not out.flags.writeable:
            raise ValueError("out: expected a writable array")
        if out is not None:
            out[...] = y  # may fail, and the state is then as before
        h.copy_(torch.as_tensor(new_h))
        c.copy_(torch.as_tensor(new_c))
        return y if out is None else out

    def _now(self) -> tuple[Tensor, Tensor]:
        n = 0 if self._native is None else 2 * self._native.current()
        return self._states[n], self._states[n + 1]

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        """(h [L, B, P], c [L, B, H]): copies."""
        with _Held(self):
            h, c = self._now()
            return h.clone(), c.clone()

    @state.setter
    def state(self, state: Any) -> None:
        given = _pair(state, "state: expected a pair of arrays (h, c)")
        for name, a in zip("hc", given, strict=True):
            check_kind(f"state, {name}", a)
        new = [a.detach() if is_tensor(a) else tensor_of(a) for a in given]
        with _Held(self):
            for name, a, own in zip("hc", new, self._now(), strict=True):
                if a.shape != own.shape or a.dtype != own.dtype:
                    raise RuntimeError(
                        f"state, {name}: expected shape {list(own.shape)} and {own.dtype}, got {list(a.shape)} and "
                        f"{a.dtype}"
                    )
            for a, own in zip(new, self._now(), strict=True):
                own.copy_(a)

    def reset(self, rows: Any = None) -> None:
        """Sets the state to zero: of all sequences, or of these rows: a number, numbers, or bool [B]."""
        chosen = slice(None) if rows is None else torch.as_tensor(rows)
        if isinstance(chosen, Tensor) and not chosen.numel():
            return  # an empty list has no dtype
        if isinstance(chosen, Tensor) and chosen.is_floating_point():
            raise TypeError(f"rows: expected integers, or bool [B], got {rows!r}")
        with _Held(self):
            for own in self._now():
                own[:, chosen] = 0

    def __reduce__(self) -> Any:
        """With the state: `copy.copy` goes on from here beside it, with the same weights."""
        return _restored, (self.frozen, self.batch_size, self.state)

    def __repr__(self) -> str:
        return f"Stream({self.frozen!r}, batch_size={self.batch_size})"


_WATCHED = (
    "stream: torch.func, compilers and modes do not see its state: call the frozen module itself, with the state as hx"
)


def _restored(frozen: Frozen, batch_size: int, state: tuple[Tensor, Tensor]) -> Stream:
    stream = frozen.stream(batch_size)
    stream.state = state
    return stream


def _overlap(a: Any, b: Any) -> bool:
    if not is_tensor(a):
        return bool(np.may_share_memory(a, b))
    ends = []
    for each in (a, b):
        last = sum((size - 1) * step for size, step in zip(each.shape, each.stride(), strict=True))
        ends.append(each.data_ptr() + (last + 1) * each.element_size())
    return bool(a.numel() and b.numel() and a.data_ptr() < ends[1] and b.data_ptr() < ends[0])


class _Held:
    """While nobody else may use a stream."""

    def __init__(self, stream: Stream):
        self._native = stream._native

    def __enter__(self) -> None:
        if self._native is not None:
            self._native.hold()

    def __exit__(self, *_: object) -> None:
        if self._native is not None:
            self._native.release()
