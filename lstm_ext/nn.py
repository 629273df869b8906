"""The modules: drop-ins for `torch.nn.LSTM` and `torch.nn.LSTMCell`; TensorFlow's are in `lstm_ext.tensorflow`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from itertools import repeat
from operator import is_
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.modules import rnn as torch_rnn
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from . import route
from ._torch_private import (
    _VF,
    _get_tracing_state,
    _is_any_autocast_enabled,
    one_dnn_takes_bfloat16,
    peek_interpreter_stack,
)
from .call import BOTH, FORWARD, LayerCall, Save
from .cell import show_options
from .checks import TooLargeError, check, check_kind, check_step_state
from .engines import logged, warn, warn_once
from .options import CellOptions, LayerOptions, Options, read_options
from .route import COMPILED, as_leaf, draw_seed, is_proxy, run, without_none
from .tensorflow import BasicLSTMCell as BasicLSTMCell  # where older pickles have it
from .tensorflow import LSTMStateTuple as LSTMStateTuple

if TYPE_CHECKING:
    from .options import Unpack

# Inputs that torch gives to oneDNN's LSTM.
_ONE_DNN_DTYPES: frozenset[torch.dtype] = frozenset()
if torch.backends.mkldnn.is_available():
    _ONE_DNN_DTYPES = frozenset({torch.float32})
    if one_dnn_takes_bfloat16():
        _ONE_DNN_DTYPES = frozenset({torch.float32, torch.bfloat16})

# torch's own classes: other names for ours may stand in torch.nn by now. Any, since ours are none of them by type.
_TorchLSTM: Any = torch_rnn.LSTM
_TorchLSTMCell: Any = torch_rnn.LSTMCell

# What torch's forward asks of a module, and what decides which weights it sees: subclasses and modules override them.
ASKED = (
    "check_forward_args",
    "check_input",
    "check_hidden_size",
    "get_expected_hidden_size",
    "get_expected_cell_size",
    "permute_hidden",
    "_init_flat_weights",
    "_update_flat_weights",
    "_weights_have_changed",
    "__getattr__",
    "__getattribute__",
)

# What a wrong argument raises, by our checks or by Python as it is used.
_ARGUMENT_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, BufferError, LookupError)

NOTHING, CELLS = Save.NOTHING, Save.CELLS
State = tuple[Tensor, Tensor]
M = TypeVar("M", bound=torch.nn.Module)


class LSTM(torch_rnn.RNNBase):
    """`torch.nn.LSTM` with fused kernels: the same arguments, parameters, `state_dict`, results and errors.

    L layers, D directions (2 if bidirectional), H = hidden_size, P = proj_size or H, I = input_size.

    Args:
        input_size: I, the width of the input.
        hidden_size: H, the number of units.
        num_layers: L.
        bias: whether the layers have `bias_ih_l*` and `bias_hh_l*`.
        batch_first: sequences are [B, T, …] instead of [T, B, …].
        dropout: probability of an output between two layers to be zeroed in training.
        bidirectional: whether a second set of weights walks backward in time.
        proj_size: P, the width of a projection of h; 0 is none.
        device, dtype: of the parameters.

    Options combine, and with none of them all is as in torch; docs/options.md tells more.

    Keyword Args:
        activation: of the candidate g, and of c before the output: "tanh", "sigmoid", "hard_sigmoid", "relu",
            "leaky_relu", "elu", "softsign", "softplus", "linear", or a tuple (name, alpha, beta).
        recurrent_activation: of the gates i, f and o.
        forget_bias: added to f at each step.
        unit_forget_bias: whether the bias of f starts at 1.
        peephole: whether the gates see c, by the weights `peephole_l*` [3, H] of i, f and o.
        cell_clip, proj_clip: c, and h after a projection, are cut to ± these.
        layer_norm: whether x W_ih', h W_hh' and c are normalised, with the weights `gamma_l*` [2, 4H], `gamma_h_l*` [H]
            and `beta_h_l*` [H].
        zoneout: probability of a unit to stay as it was; one for h and c, or a pair.
        recurrent_dropout: of an element of h to be zeroed before the recurrent product, at all steps.
        candidate_dropout: of an element of g to be zeroed, at each step.
        weight_drop: of an element of `weight_hh_l*` to be zeroed, once a call.
        coupled: whether i = 1 - f.

    Shape:
        - input: [T, B, I]; [B, T, I] if batch_first; [T, I]; or a PackedSequence.
        - hx: None (zeros) or (h_0 [L*D, B, P], c_0 [L*D, B, H]); without B if the input is.
        - lengths: valid steps of each row [B], integer; outputs past them are zero, h_n and c_n those of the last one.
        - resets: bool [T, B] ([B, T] if batch_first); where True, the state is zero before that step, in every layer
          and direction.
        - output: [T, B, D*P] in the layout of the input; h_n [L*D, B, P], c_n [L*D, B, H]. With `return_cells` a third
          item: c of every step of the last layer, [T, B, D*H] in the layout of the input.

    On a device or dtype without our kernel torch's own LSTM runs on the same weights, and a warning says so once.

    Raises:
        ValueError, RuntimeError, TypeError: as `torch.nn.LSTM`; ValueError for a length out of range.

    Example:
        >>> layer = lstm_ext.LSTM(28, 64, batch_first=True)
        >>> y, (h_n, c_n) = layer(torch.randn(16, 50, 28), lengths=torch.randint(0, 51, (16,)))
        >>> y.shape, h_n.shape
        (torch.Size([16, 50, 64]), torch.Size([1, 16, 64]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        torch_rnn.RNNBase.__init__(  # not super(): a class may be torch's LSTM as well
            self,
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        if options and (read := read_options({**options}, "LSTM", bias, proj_size > 0)):
            self._take_options(read)

    _options: Options | None = None  # None is torch's LSTM

    def _take_options(self, options: Options) -> None:
        """Adds their weights, those of each direction after its others."""
        self._options, names = options, self._all_weights
        self._customised = bool(options.changing)  # most calls are of modules without, which look at this anyway
        self._all_weights = []
        for own in names:
            suffix = own[0].removeprefix("weight_ih")
            extra = options.make_extra(self.hidden_size, self._flat_weights[0])
            for name, weight in extra.items():
                self.register_parameter(name + suffix, weight)
            self._all_weights.append([*own, *(name + suffix for name in extra)])
        self._flat_weights_names = [name for own in self._all_weights for name in own]
        ordered = {name: self._parameters[name] for name in self._flat_weights_names}
        self._parameters.clear()
        self._parameters.update(ordered)
        self._init_flat_weights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        super().reset_parameters()
        if self._options is not None:
            self._options.reset(self._parameters)

    def flatten_parameters(self) -> None:
        """As torch's; it has no place for the weights of options."""
        if self._options is None or not self._options.extra_weights:
            super().flatten_parameters()

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        return super().extra_repr() + str(self._options or "")

    # torch's forward asks these, so code that was copied from there or overrides them works here as well.
    check_forward_args = _TorchLSTM.check_forward_args
    get_expected_cell_size = _TorchLSTM.get_expected_cell_size
    permute_hidden = _TorchLSTM.permute_hidden

    _customised = False  # whether a subclass, or a module by itself, overrides any of `ASKED`

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._customised = any(getattr(cls, name) is not getattr(LSTM, name) for name in ASKED)

    def __setattr__(self, name: str, value: Any) -> None:
        """Notes what one module overrides; and makes the list of weights anew, as torch does once a weight was set."""
        super().__setattr__(name, value)
        if is_compiling():
            return
        if name in ASKED:
            self.__dict__["_customised"] = True
        elif name in self.__dict__.get("_flat_weights_names", ()) and not (value is None or self._customised):
            # Without a frame of its own: a compiled hook that sets a weight runs this, and Dynamo looks at each frame.
            flat: list[Any] = list(map(getattr, repeat(self), self._flat_weights_names, repeat(None)))
            if not any(map(is_, flat, repeat(None))):
                self._flat_weights, self._flat_weight_refs = flat, list(map(weakref.ref, flat))

    def _weights(self) -> list[Any]:
        """The weights of a call, by torch's rule: those in the list `_flat_weights`, to which others may write.

        The list is out of date once one of the weights it was made from is another object, as under parametrizations
        and functional calls; then the weights are those that the module has now.
        """
        if self._customised and self._options is None:
            self._update_flat_weights()
            return self._flat_weights
        flat, parameters = self._flat_weights, self._parameters
        if len(flat) == len(parameters) and all(map(is_, flat, parameters.values())):
            return flat
        now = [getattr(self, name, None) for name in self._flat_weights_names]
        made_from = [None if ref is None else ref() for ref in self._flat_weight_refs] or [None] * len(now)
        changed = any(w is not None and w is not old for w, old in zip(now, made_from, strict=True))
        return now if changed else flat

    def _checked(self, x: Tensor, hx: State | None, batch_sizes: Tensor | None, order: Tensor | None) -> State | None:
        """The state in the order of the rows, after torch's own checks; for whoever overrides these, zeros for None."""
        if hx is None:
            if not self._customised or self._options is not None:
                return None
            sizes = self.get_expected_hidden_size(x, batch_sizes), self.get_expected_cell_size(x, batch_sizes)
            hx = x.new_zeros(sizes[0]), x.new_zeros(sizes[1])
        hx = _pair(hx)
        if batch_sizes is None or not is_compiling():  # compilers do not know B then, and the engine checks it
            self.check_forward_args(x, hx, batch_sizes)
        return self.permute_hidden(hx, order)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of the versions that kept no list of weights too."""
        parameters, names = state["_parameters"], state.get("_flat_weights_names", ())
        super().__setstate__({"_flat_weights": [parameters.get(name) for name in names], **state})

    @overload
    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_cells: Literal[False] = False,
    ) -> tuple[Tensor, State]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_cells: Literal[True],
    ) -> tuple[Tensor, State, Tensor]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: State | None = None, *, return_cells: Literal[False] = False
    ) -> tuple[PackedSequence, State]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: State | None = None, *, return_cells: Literal[True]
    ) -> tuple[PackedSequence, State, PackedSequence]: ...
    @overload
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_cells: bool = False,
    ) -> tuple[Any, ...]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_cells: bool = False,
    ) -> tuple[Any, ...]:
        """(output, (h_n, c_n)), and with `return_cells` the cells of the last layer; the class tells all shapes.

        Args:
            input: a sequence, batched or not, or a PackedSequence.
            hx: the initial state (h_0, c_0); None is zeros.
            lengths: integer [B], the valid steps of each row; not with a PackedSequence.
            resets: bool [T, B] or [B, T], where the state is zero before a step; not with a PackedSequence.
            return_cells: whether to return c of every step too.
        """
        try:
            if type(input) is not Tensor:
                if isinstance(input, PackedSequence):
                    return self._forward_packed(input, hx, lengths, resets, return_cells)
                if is_proxy(input):
                    return as_leaf(self, input, hx, lengths=lengths, resets=resets, return_cells=return_cells or None)
            rank = input.dim()
            if rank == 2:
                return self._forward_unbatched(input, hx, lengths, resets, return_cells)
            if rank != 3:
                raise ValueError(f"input: expected 2 or 3 dimensions, got {rank}")
            weights, num_layers, customised = self._weights(), self.num_layers, self._customised
            if customised:
                hx = self._checked(input, hx, None, None)
            h0: Any = None
            c0: Any = None
            if hx is not None:  # what is not checked here the engine checks
                h0, c0 = hx if type(hx) is tuple and len(hx) == 2 else _pair(hx)
                if h0 is None or c0 is None:
                    raise TypeError("hx: expected a pair of tensors, got None in it")
            if lengths is not None or resets is not None:
                lengths = _as_tensor(lengths, input, torch.int64)
                resets = _as_tensor(resets, input, torch.bool)
            if (
                num_layers == 1
                and COMPILED
                and input.is_cpu
                and not (
                    return_cells
                    or _is_any_autocast_enabled()
                    or _get_tracing_state()
                    or (customised and self._options is not None)
                )
            ):
                # One call is all: small layers are called often.
                directions = BOTH if self.bidirectional else FORWARD
                y, h_n, c_n, _, _ = run(
                    (input, h0, c0, weights, lengths, resets, None, directions, self.batch_first, None, None)
                )
                if not customised:
                    return y, (h_n, c_n)
            elif lengths is None and resets is None and not return_cells and self._is_left_to_torch(input):
                return _TorchLSTM.forward(self, input, hx)
            else:
                y, h_n, c_n, cells = self._layers(input, hx, weights, lengths, resets, None, return_cells)
                if return_cells:
                    return y, (h_n, c_n), cells
            return y, self.permute_hidden((h_n, c_n), None) if customised else (h_n, c_n)
        except _ARGUMENT_ERRORS as error:
            if _became_torchs(self):
                given = without_none(lengths=lengths, resets=resets, return_cells=return_cells or None)
                return _TorchLSTM.forward(self, input, hx, **given)
            new = lengths is not None or resets is not None or return_cells or self._options is not None
            if new or _is_transformed() or not self._are_wrong(input, hx):
                raise
            why = str(error)
        return _ask_torch(_TorchLSTM.forward, why, self, input, hx)

    if TYPE_CHECKING:
        __call__ = forward  # Module's says no more than Callable[..., Any]

    def _is_left_to_torch(self, x: Tensor, batch_sizes: Tensor | None = None) -> bool:
        """Whether torch's own module runs a call that asks for nothing new: in a trace, or where there is no kernel."""
        if self._options is not None and self._options.changing:
            return False
        left = _get_tracing_state() is not None or (not (COMPILED and x.is_cpu) and route.is_torchs(x))
        if left and logged.ON:
            directions, own = BOTH if self.bidirectional else FORWARD, self._weights()
            own = own[: len(own) // self.num_layers]
            route.say_torchs(LayerCall(x, None, None, own, None, None, batch_sizes, directions, self.batch_first))
        return left

    def _are_wrong(self, input: Any, hx: Any) -> bool:
        """Whether an error was about arguments, which torch checks if it is asked, and not about a failed kernel."""
        try:
            x, batch_sizes = input[:2] if isinstance(input, PackedSequence) else (input, None)
            if self._would_be_trusted(input, hx):
                return False
            if any(w is None for w in self._weights()):
                return True
            if batch_sizes is None and x.dim() == 2:
                x, hx = x.unsqueeze(0 if self.batch_first else 1), hx and [a.unsqueeze(1) for a in _pair(hx)]
            if x.dim() != (3 if batch_sizes is None else 2):
                return True
            D, masks = 2 if self.bidirectional else 1, (None, None, batch_sizes)
            h0, c0 = [a[:D] for a in self._checked(x, hx, batch_sizes, None) or ()] or (None, None)
            own = self._weights()[: len(self._flat_weights_names) // self.num_layers]
            directions = BOTH if self.bidirectional else FORWARD
            check(_autocast(LayerCall(x, h0, c0, own, *masks, directions, self.batch_first)))
        except _ARGUMENT_ERRORS as error:
            return not isinstance(error, TooLargeError)  # torch would try to compute it
        return False

    def _would_be_trusted(self, input: Any, hx: Any) -> bool:
        """Whether sizes are wrong that torch does not check: it then ends the process, or oneDNN reads beyond memory.

        Those are of weights; the layers of a state of packed rows; and all of x and the state where packed rows are of
        one length, or where a subclass checks.
        """
        D, H, P = 2 if self.bidirectional else 1, self.hidden_size, self.proj_size or self.hidden_size
        sizes: tuple[int, ...]
        expected: list[tuple[int, ...]] = []
        for n in range(self.num_layers * D):
            expected += [(4 * H, self.input_size if n < D else D * P), (4 * H, P), *[(4 * H,)] * (2 * self.bias)]
            expected += [(P, H)] * (self.proj_size > 0)
        if any(w is not None and w.shape != size for w, size in zip(self._weights(), expected, strict=False)):
            return True
        if isinstance(input, PackedSequence):
            x, batch_sizes, order, _ = input
            given = () if hx is None else (hx[0], hx[1])
            if any(a.dim() != 3 or a.shape[0] != self.num_layers * D for a in given):
                return True
            if batch_sizes.numel() == 0 or bool((batch_sizes != batch_sizes.flatten()[0]).any()):
                return False
            sizes, width = (int(batch_sizes.flatten()[0]),), x.shape[1:]
        elif self._customised and input.dim() in (2, 3):
            order, width = None, input.shape[-1:]
            sizes = () if input.dim() == 2 else (input.shape[0 if self.batch_first else 1],)
        else:
            return False
        states = () if hx is None else self.permute_hidden((hx[0], hx[1]), order)
        wanted = [(self.num_layers * D, *sizes, each) for each in (P, H)]
        return width != (self.input_size,) or any(a.shape != size for a, size in zip(states, wanted, strict=False))

    def _forward_unbatched(
        self, x: Tensor, hx: State | None, lengths: Tensor | None, resets: Tensor | None, return_cells: bool
    ) -> tuple[Any, ...]:
        """x [T, I], as a batch of one."""
        batch = 0 if self.batch_first else 1
        if hx is not None:
            h0, c0 = _pair(hx)
            if h0.dim() != 2 or c0.dim() != 2:
                raise RuntimeError(f"hx: expected 2 dimensions as input has, got {h0.dim()} and {c0.dim()}")
            hx = h0.unsqueeze(1), c0.unsqueeze(1)
        y, (h_n, c_n), *cells = self.forward(
            x.unsqueeze(batch),
            hx,
            lengths=None if lengths is None else _as_batch("lengths", lengths, x, 0),
            resets=None if resets is None else _as_batch("resets", resets, x, batch),
            return_cells=return_cells,
        )
        return y.squeeze(batch), (h_n.squeeze(1), c_n.squeeze(1)), *(a.squeeze(batch) for a in cells)

    def _forward_packed(
        self,
        packed: PackedSequence,
        hx: State | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        return_cells: bool,
    ) -> tuple[Any, ...]:
        """The rows go to the kernel as they are packed."""
        if lengths is not None or resets is not None:
            raise ValueError("lengths, resets: expected a padded input beside them, got a PackedSequence")
        x, batch_sizes, sorted_indices, unsorted_indices = packed
        if not return_cells and self._is_left_to_torch(x, batch_sizes):
            return _TorchLSTM.forward(self, packed, hx)
        weights, hx = self._weights(), self._checked(x, hx, batch_sizes, sorted_indices)
        y, h_n, c_n, cells = self._layers(x, hx, weights, None, None, batch_sizes, return_cells)

        def pack(rows: Tensor) -> PackedSequence:
            return PackedSequence(rows, batch_sizes, sorted_indices, unsorted_indices)

        state = self.permute_hidden((h_n, c_n), unsorted_indices)
        return (pack(y), state, pack(cells)) if return_cells else (pack(y), state)

    def _layers(
        self,
        x: Tensor,
        hx: State | None,
        weights: list[Tensor],
        lengths: Tensor | None,
        resets: Tensor | None,
        batch_sizes: Tensor | None,
        return_cells: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """All layers, one fused call each: (y, h_n, c_n, the last layer's cells in the layout of y)."""
        if _is_any_autocast_enabled() and x.is_cpu and torch.is_autocast_enabled("cpu"):
            return self._layers_under_autocast(x, hx, weights, lengths, resets, batch_sizes, return_cells)
        L, directions, options = self.num_layers, BOTH if self.bidirectional else FORWARD, self._options
        batch_first = self.batch_first and batch_sizes is None
        masks = (lengths, resets, batch_sizes, directions, batch_first)
        cell = None if options is None else options.cells[1 if self.training else 0]
        h0, c0 = (None, None) if hx is None else hx
        if options is not None and self.training:
            weights = options.drop(weights, len(self._all_weights))
        if L == 1:
            seed = None if cell is None else draw_seed(cell, x)
            y, h_n, c_n, cells, _ = run((x, h0, c0, weights, *masks, cell, seed), CELLS if return_cells else NOTHING)
        else:
            h_ns, c_ns = [], []
            D, per_layer = 2 if self.bidirectional else 1, len(weights) // L
            if hx is not None and not len(hx[0]) == len(hx[1]) == L * D:
                raise RuntimeError(f"hx: expected states of {L * D} layers and directions, got {[*map(len, hx)]}")
            for n in range(L):
                if hx is not None:
                    h0, c0 = hx[0][n * D : (n + 1) * D], hx[1][n * D : (n + 1) * D]
                own = weights[n * per_layer : (n + 1) * per_layer]
                save = CELLS if return_cells and n == L - 1 else NOTHING
                seed = None if cell is None else draw_seed(cell, x)
                x, h_n, c_n, cells, _ = run((x, h0, c0, own, *masks, cell, seed), save)
                h_ns.append(h_n)
                c_ns.append(c_n)
                if n < L - 1 and self.dropout and self.training:
                    x = self._drop(x, batch_first)
            y, h_n, c_n = x, torch.cat(h_ns), torch.cat(c_ns)
        return y, h_n, c_n, None if cells is None else _join_directions(cells, batch_sizes, batch_first).to(y.dtype)

    def _layers_under_autocast(
        self, x: Tensor, hx: State | None, weights: list[Tensor], *masks: Any
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """The dtypes of torch's autocast on the CPU: its own where oneDNN's LSTM runs, else those of torch's cell."""
        dtype, batch_sizes = torch.get_autocast_dtype("cpu"), masks[2]
        even = batch_sizes is None or (
            not is_compiling() and bool((batch_sizes == batch_sizes[:1]).all()) and _one_dnn_takes_packed()
        )
        one_dnn = x.dtype in _ONE_DNN_DTYPES and x.numel() and even and not self.proj_size and not self._options
        h0, c0 = hx or (None, None)
        call = LayerCall(x, h0, c0, weights, None, None, None, FORWARD, False)
        call = call.cast(dtype if one_dnn else route.autocast_cell_dtype(call))
        cast_hx: Any = None if hx is None else (call.h0, call.c0)
        with torch.autocast("cpu", enabled=False):
            y, h_n, c_n, cells = self._layers(call.x, cast_hx, call.weights, *masks)
        if self.proj_size:
            y, h_n = (a.to(dtype) if a.is_floating_point() and a.dtype != torch.float64 else a for a in (y, h_n))
        return y, h_n, c_n, cells

    def _drop(self, x: Tensor, batch_first: bool) -> Tensor:
        """Dropout; a mask is drawn in the order of memory, and torch's is time-major."""
        if batch_first:
            return F.dropout(x.transpose(0, 1).contiguous(), self.dropout).transpose(0, 1)
        return F.dropout(x, self.dropout)

    def __prepare_scriptable__(self) -> torch_rnn.LSTM:
        """TorchScript compiles torch's own LSTM, on our weights."""
        _refuse_options(self._options)
        return _for_torch_script(torch_rnn.LSTM, self)


@cache
def _one_dnn_takes_packed() -> bool:
    """Whether torch gives packed rows of one length to oneDNN's LSTM too: 2.11 does not.

    On a processor without AVX-512 that LSTM has no bfloat16, and raises where torch gives it some.
    """

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=torch.float32, device="cpu")

    batch_sizes, hx, weights = torch.ones(1, dtype=torch.int64, device="cpu"), [zeros(1, 1, 1)] * 2, [zeros(4, 1)] * 2
    with torch.autocast("cpu", torch.bfloat16):
        try:
            y = _VF.lstm(zeros(1, 1), batch_sizes, hx, weights, False, 1, 0.0, False, False)[0]
        except RuntimeError:
            return True
    return bool(y.dtype == torch.bfloat16)


def _pair(hx: Any) -> State:
    """The pair (h_0, c_0)."""
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        what = f"{len(hx)} items" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise TypeError(f"hx: expected a pair of tensors (h_0, c_0), got {what}")
    return hx[0], hx[1]


def _as_batch(name: str, given: Any, x: Tensor, batch: int) -> Tensor:
    """The mask of one sequence with an axis for the batch; a length may have it already."""
    mask: Any = _as_tensor(given, x, torch.int64 if name == "lengths" else torch.bool)
    check_kind(name, mask, x)
    if name == "lengths" and mask.shape == (1,):
        return mask
    if mask.dim() != (rank := 0 if name == "lengths" else 1):
        raise RuntimeError(f"{name}: expected {rank} dimensions beside an input [T, I], got shape {list(mask.shape)}")
    return mask.unsqueeze(batch)


def _as_tensor(mask: Any, x: Tensor, dtype: torch.dtype) -> Any:
    """Lengths or resets given as a list, a tuple or an array, beside x; `dtype` is that of a list without numbers."""
    if not isinstance(mask, (list, tuple, np.ndarray)):
        return mask
    tensor = torch.as_tensor(mask, device=x.device)
    return tensor.to(dtype) if tensor.numel() == 0 and not isinstance(mask, np.ndarray) else tensor


def _join_directions(cells: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> Tensor:
    """[D, T, B, H] → [T, B, D*H] or [B, T, D*H]; packed, [D, N, H] → [N, D*H]."""
    if batch_sizes is not None:
        return cells.movedim(0, 1).flatten(1)
    cells = cells.movedim(0, 2).flatten(2)
    return cells.transpose(0, 1) if batch_first else cells


class LSTMCell(torch_rnn.LSTMCell):
    """`torch.nn.LSTMCell` with a fused kernel: the same arguments, parameters, `state_dict`, results and errors.

    Args:
        input_size: I, the width of the input.
        hidden_size: H, the number of units.
        bias: whether there are `bias_ih` and `bias_hh`.
        device, dtype: of the parameters.
        options: those of `LSTM` but for proj_clip. The weights are `peephole`, `gamma`, `gamma_h` and `beta_h`, and
            masks are drawn anew at each call.

    Shape:
        - input: [B, I] or [I].
        - hx: None (zeros) or (h_0, c_0), each [B, H] or [H].
        - resets: bool [B], or [] where the input is [I]; where True, the state is zero before the step.
        - output: (h_1, c_1), each [B, H] or [H].

    Raises:
        ValueError, RuntimeError, TypeError: as `torch.nn.LSTMCell`.

    Example:
        >>> cell, state = lstm_ext.LSTMCell(28, 64), None
        >>> for x, new in zip(torch.randn(50, 16, 28), torch.rand(50, 16) < 0.1):
        ...     h, c = state = cell(x, state, resets=new)
        >>> h.shape
        torch.Size([16, 64])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[CellOptions],
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        if options and (read := read_options({**options}, "LSTMCell", bias, False)):
            self._options, self._customised = read, bool(read.changing)
            for name, weight in read.make_extra(hidden_size, self.weight_hh).items():
                self.register_parameter(name, weight)
            self.reset_parameters()

    _customised = False  # whether a subclass computes its attributes, or there are options
    _options: Options | None = None  # None is torch's cell

    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        super().reset_parameters()
        if self._options is not None:
            self._options.reset(self._parameters)

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        return super().extra_repr() + str(self._options or "")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        names = ("__getattr__", "__getattribute__")
        cls._customised = any(getattr(cls, name) is not getattr(LSTMCell, name) for name in names)

    def _weights(self) -> list[Any]:
        """Those that there are, computed or not; zeros stand for one bias of two."""
        weights, biases = [self.weight_ih, self.weight_hh], [self.bias_ih, self.bias_hh]
        given = next((b for b in biases if b is not None), None)
        return weights if given is None else weights + [torch.zeros_like(given) if b is None else b for b in biases]

    def _are_wrong(self, input: Any, hx: Any) -> bool:
        """Whether an error was about arguments, which torch checks if it is asked, and not about a failed kernel."""
        try:
            if self._would_be_trusted(input, hx):
                return False
            h, c = (None, None) if hx is None else _pair(hx)
            if input.dim() not in (1, 2) or (h is None) != (hx is None) or (c is None) != (hx is None):
                return True
            call = _autocast(LayerCall(input, h, c, self._weights(), None, None, None, FORWARD, False))
            check_step_state(call)
            check(call)
        except _ARGUMENT_ERRORS as error:
            return not isinstance(error, TooLargeError)  # torch would try to compute it
        return False

    def _would_be_trusted(self, input: Tensor, hx: Any) -> bool:
        """Whether sizes are wrong that torch's operator does not check, which then ends the process.

        It splits the gates in four by what it takes for their second axis.
        """
        H, (w_ih, w_hh, *biases) = self.hidden_size, self._weights()
        if any(w.dim() != 2 or w.shape[0] != 4 * H for w in (w_ih, w_hh)) or any(b.dim() > 1 for b in biases):
            return True
        return input.dim() == 1 and hx is not None and any(a.dim() == 2 and a.shape[0] == H for a in (hx[0], hx[1]))

    def forward(self, input: Tensor, hx: State | None = None, *, resets: Tensor | None = None) -> State:
        """(h_1, c_1); the class tells all shapes.

        Args:
            input: one step, batched or not.
            hx: the state before it (h_0, c_0); None is zeros.
            resets: bool [B] or [], where that state is zero instead.
        """
        try:
            if type(input) is not Tensor and is_proxy(input):
                return as_leaf(self, input, hx, resets=resets)
            if (rank := input.dim()) != 2 and rank != 1:
                raise ValueError(f"input: expected 1 or 2 dimensions, got {rank}")
            h: Any = None
            c: Any = None
            if hx is not None:
                h, c = hx if type(hx) is tuple and len(hx) == 2 else _pair(hx)
                if h is None or c is None:
                    raise TypeError("hx: expected a pair of tensors, got None in it")
            if resets is not None:
                resets = _as_tensor(resets, input, torch.bool)
            p: dict[str, Any] = self._parameters
            try:
                weights: list[Any] = [p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"]]
            except KeyError:
                weights = [None] * 4
            if weights[2] is None or weights[3] is None or self._customised:
                weights = self._weights()
                if self._options is not None:
                    return self._step(input, h, c, weights, resets, self._options)
            if not COMPILED and resets is None and route.is_torchs(input, "LSTM cell"):
                route.say_torchs(LayerCall(input, h, c, weights, None, None, None, FORWARD, False))
                return _TorchLSTMCell.forward(self, input, hx)
            y, _, c_n, _, _ = run((input, h, c, weights, None, resets, None, FORWARD, False, None, None))
            return y, c_n
        except _ARGUMENT_ERRORS as error:
            if _became_torchs(self):
                return _TorchLSTMCell.forward(self, input, hx, **without_none(resets=resets))
            if self._options is not None or _is_transformed() or not self._are_wrong(input, hx):
                raise
            why = str(error)
        if resets is not None and hx is not None:
            hx = hx[0].masked_fill(resets[..., None], 0), hx[1].masked_fill(resets[..., None], 0)
        return _ask_torch(_TorchLSTMCell.forward, why, self, input, hx)

    if TYPE_CHECKING:
        __call__ = forward

    def _step(
        self, x: Tensor, h: Any, c: Any, weights: list[Any], resets: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        """A step of a cell with options."""
        cell = options.cells[1 if self.training else 0]
        weights = [*weights, *(getattr(self, name) for name in options.extra_weights)]
        weights = options.drop(weights, 1) if self.training else weights
        seed = None if cell is None else draw_seed(cell, x)
        y, _, c_n, _, _ = run((x, h, c, weights, None, resets, None, FORWARD, False, cell, seed))
        return y, c_n

    def __prepare_scriptable__(self) -> torch_rnn.LSTMCell:
        """TorchScript compiles torch's own cell, on our weights."""
        _refuse_options(self._options)
        return _for_torch_script(torch_rnn.LSTMCell, self)


for _init, _options in ((LSTM.__init__, LayerOptions), (LSTMCell.__init__, CellOptions)):
    show_options(_init, _options, unit_forget_bias=False, weight_drop=0.0)


# What is torch's -----------------------------------------------------------------------------------------------------


def _became_torchs(module: Any) -> bool:
    """Whether `to_torch` changed the class of a module after somebody had taken its `forward`."""
    return not isinstance(module, (LSTM, LSTMCell))


def _autocast(call: LayerCall) -> LayerCall:
    """The call in the dtypes that autocast makes of it, if it is on."""
    device = call.x.device.type
    if not _is_any_autocast_enabled() or not torch.is_autocast_enabled(device):
        return call
    return call.cast(torch.get_autocast_dtype(device))


def _is_transformed() -> bool:
    """Whether torch's own operators would say other things, such as that they have no rule for this transform."""
    return is_compiling() or peek_interpreter_stack() is not None


def _ask_torch(forward: Callable[..., Any], why: str, module: torch.nn.Module, *args: Any) -> Any:
    """What torch's own module makes of arguments that were found wrong: its error, or its result with a warning."""
    result = forward(module, *args)
    warn_once(f"lstm_ext runs torch's own {module._get_name()}: {why}")
    return result


def _refuse_options(options: Options | None) -> None:
    """An error where torch's own module would have to run ours."""
    if options is not None and options.changing:
        names = ", ".join(options.changing)
        raise NotImplementedError(f"{names}: expected none of them, since TorchScript compiles torch's own module")


def _for_torch_script(cls: type[M], module: torch.nn.Module) -> M:
    """A module of torch's class with the Parameters, hooks and options of ours."""
    warn(f"TorchScript puts torch's own {cls.__name__} in the place of lstm_ext's, on its weights")
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        new.__dict__[name] = module.__dict__[name].copy()
    return new
