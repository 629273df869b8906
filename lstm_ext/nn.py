"""The modules: drop-ins for `torch.nn.LSTM` and `torch.nn.LSTMCell`, TensorFlow's `BasicLSTMCell`, and the swap."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.parameter import Parameter, UninitializedParameter
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from . import route
from ._torch_private import _is_any_autocast_enabled, one_dnn_takes_bfloat16
from .call import BOTH, FORWARD, LayerCall, Save
from .engines import stock, warn_once
from .route import run
from .swap import recast, swap

# Inputs that torch gives to oneDNN's LSTM.
_ONE_DNN_DTYPES: frozenset[torch.dtype] = frozenset()
if torch.backends.mkldnn.is_available():
    _ONE_DNN_DTYPES = frozenset({torch.float32})
    if one_dnn_takes_bfloat16():
        _ONE_DNN_DTYPES = frozenset({torch.float32, torch.bfloat16})

NOTHING, CELLS = Save.NOTHING, Save.CELLS
STRIDED = torch.strided
State = tuple[Tensor, Tensor]
M = TypeVar("M", bound=torch.nn.Module)


class LSTM(RNNBase):
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
    ) -> None:
        super().__init__(
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

    @property
    def _flat_weights(self) -> list[Any]:
        """The weights as they are now. A list kept goes stale under parametrizations and functional calls."""
        parameters = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]
        except KeyError:
            return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, _: list[Any]) -> None:
        """RNNBase assigns its list; there is nothing to keep."""

    def _check_state(self, x: Tensor, hx: Any, batch_sizes: Tensor | None) -> None:
        L, D = self.num_layers, 2 if self.bidirectional else 1
        if batch_sizes is None:
            B = x.size(0 if self.batch_first else 1)
        else:  # compilers do not know B, and the engine checks it again
            B = hx[0].size(-2) if is_compiling() else int(batch_sizes[0])
        self.check_hidden_size(
            hx[0], (L * D, B, self.proj_size or self.hidden_size), "LSTM: expected hx[0] of size {}, got {}"
        )
        self.check_hidden_size(hx[1], (L * D, B, self.hidden_size), "LSTM: expected hx[1] of size {}, got {}")

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
        """See the class for shapes: (output, (h_n, c_n)), and with `return_cells` the cells of the last layer."""
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths, resets, return_cells)
        rank = input.dim()
        if rank == 2:
            return self._forward_unbatched(input, hx, lengths, resets, return_cells)
        if rank != 3:
            raise ValueError(f"LSTM: expected input to be 2-D or 3-D, got {rank}-D")
        weights = self._flat_weights
        if input.dtype is not weights[0].dtype:  # the engine checks the rest
            self.check_input(input, None)
        h0: Tensor | None = None
        c0: Tensor | None = None
        if hx is not None:
            pair = type(hx) is tuple and len(hx) == 2
            h0, c0 = hx if pair else (hx[0], hx[1])
            if h0.dim() != 3 or c0.dim() != 3:
                raise RuntimeError(f"LSTM: a 3-D input needs a 3-D hx, got {h0.dim()}-D and {c0.dim()}-D")
            if not pair:
                hx = _pair("LSTM", hx)
            if self.num_layers > 1 or not input.is_cpu or input.dtype not in route.DTYPES:  # else the engine checks it
                self._check_state(input, hx, None)
        if self.num_layers == 1 and input.is_cpu and not return_cells and not _is_any_autocast_enabled():
            # One call is all: small layers are called often.
            directions = BOTH if self.bidirectional else FORWARD
            y, h_n, c_n, _, _ = run((input, h0, c0, weights, lengths, resets, None, directions, self.batch_first))
            return y, (h_n, c_n)
        y, h_n, c_n, cells = self._layers(input, hx, weights, lengths, resets, None, return_cells)
        return (y, (h_n, c_n), cells) if return_cells else (y, (h_n, c_n))

    if TYPE_CHECKING:
        __call__ = forward  # Module's says no more than Callable[..., Any]

    def _forward_unbatched(
        self, x: Tensor, hx: State | None, lengths: Tensor | None, resets: Tensor | None, return_cells: bool
    ) -> tuple[Any, ...]:
        """x [T, I], as a batch of one."""
        batch = 0 if self.batch_first else 1
        if hx is not None:
            if hx[0].dim() != 2 or hx[1].dim() != 2:
                raise RuntimeError(f"LSTM: a 2-D input needs a 2-D hx, got {hx[0].dim()}-D and {hx[1].dim()}-D")
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        y, (h_n, c_n), *cells = self.forward(
            x.unsqueeze(batch),
            hx,
            lengths=None if lengths is None else lengths.reshape(1),
            resets=None if resets is None else resets.unsqueeze(batch),
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
            raise ValueError("LSTM: lengths and resets go with a padded input, got a PackedSequence")
        x, batch_sizes, sorted_indices, unsorted_indices = packed
        if hx is not None:
            hx = _pair("LSTM", hx)
            self._check_state(x, hx, batch_sizes)
            hx = self._permute(hx, sorted_indices)
        y, h_n, c_n, cells = self._layers(x, hx, self._flat_weights, None, None, batch_sizes, return_cells)

        def pack(rows: Tensor) -> PackedSequence:
            return PackedSequence(rows, batch_sizes, sorted_indices, unsorted_indices)

        state = self._permute((h_n, c_n), unsorted_indices)
        return (pack(y), state, pack(cells)) if return_cells else (pack(y), state)

    def _permute(self, state: State, order: Tensor | None) -> State:
        return state if order is None else (state[0].index_select(1, order), state[1].index_select(1, order))

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
        L, directions = self.num_layers, BOTH if self.bidirectional else FORWARD
        batch_first = self.batch_first and batch_sizes is None
        masks = (lengths, resets, batch_sizes, directions, batch_first)
        if not x.is_cpu and lengths is None and resets is None and not return_cells and not route.has_kernel(x):
            return *self._stock_layers(x, hx, weights, batch_sizes), None
        h0, c0 = (None, None) if hx is None else hx
        if L == 1:
            y, h_n, c_n, cells, _ = run((x, h0, c0, weights, *masks), CELLS if return_cells else NOTHING)
        else:
            h_ns, c_ns = [], []
            D, per_layer = 2 if self.bidirectional else 1, len(weights) // L
            for n in range(L):
                if hx is not None:
                    h0, c0 = hx[0][n * D : (n + 1) * D], hx[1][n * D : (n + 1) * D]
                own = weights[n * per_layer : (n + 1) * per_layer]
                save = CELLS if return_cells and n == L - 1 else NOTHING
                x, h_n, c_n, cells, _ = run((x, h0, c0, own, *masks), save)
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
        dtype = torch.get_autocast_dtype("cpu")
        packed = x.dim() == 2
        one_dnn = x.dtype in _ONE_DNN_DTYPES and x.numel() and not packed and not self.proj_size
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

    def _stock_layers(
        self, x: Tensor, hx: State | None, weights: list[Tensor], batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """torch's own LSTM on our weights, all layers at once."""
        return stock.stack(
            x,
            hx,
            weights,
            batch_sizes,
            has_biases=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            train=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
        )

    def __prepare_scriptable__(self) -> torch.nn.LSTM:
        """TorchScript compiles torch's own LSTM, on our weights."""
        return _for_torch_script(torch.nn.LSTM, self)


def _pair(name: str, hx: Any) -> State:
    """The pair (h_0, c_0); the error types are those of torch."""
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"{name}: expected hx to be a pair (h_0, c_0), got {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError(f"{name}: expected hx to be a pair (h_0, c_0), got {len(hx)} items")
    return hx[0], hx[1]


def _join_directions(cells: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> Tensor:
    """[D, T, B, H] → [T, B, D*H] or [B, T, D*H]; packed, [D, N, H] → [N, D*H]."""
    if batch_sizes is not None:
        return cells.movedim(0, 1).flatten(1)
    cells = cells.movedim(0, 2).flatten(2)
    return cells.transpose(0, 1) if batch_first else cells


def _why_stock_cell(x: Tensor, c: Tensor | None) -> str:
    """Why torch's own cell has to run, which takes other layouts, and a c of another dtype; "" if it need not."""
    if x.layout is not STRIDED:
        return f"input: expected a dense tensor (torch.strided), got {x.layout}"
    if c is not None and c.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"hx[1]: expected dtype {x.dtype} as input has, got {c.dtype}"
    return ""


class LSTMCell(RNNCellBase):
    """`torch.nn.LSTMCell` with a fused kernel: the same arguments, parameters, `state_dict`, results and errors.

    Args:
        input_size: I, the width of the input.
        hidden_size: H, the number of units.
        bias: whether there are `bias_ih` and `bias_hh`.
        device, dtype: of the parameters.

    Shape:
        - input: [B, I] or [I].
        - hx: None (zeros) or (h_0, c_0), each [B, H] or [H].
        - output: (h_1, c_1), each [B, H] or [H].

    Raises:
        ValueError, RuntimeError, TypeError: as `torch.nn.LSTMCell`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """See the class for shapes: (h_1, c_1)."""
        h: Any = None
        c: Any = None
        if hx is not None:
            h, c = hx if type(hx) is tuple and len(hx) == 2 else _pair("LSTMCell", hx)
            if h is None or c is None:
                raise AttributeError("LSTMCell: expected hx to be a pair of tensors, got None in it")  # torch's type
        if (rank := input.dim()) != 2 and rank != 1:
            raise ValueError(f"LSTMCell: expected input to be 1-D or 2-D, got {rank}-D")
        p: dict[str, Any] = self._parameters
        try:
            weights = [p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"]]
        except KeyError:  # a parametrization computes them
            weights = [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]
        if weights[2] is None and weights[3] is None:  # bias=False
            del weights[2:]
        unusual = input.layout is not STRIDED or (c is not None and c.dtype is not input.dtype)
        if unusual and (why := _why_stock_cell(input, c)):
            warn_once(f"lstm_ext runs torch's own LSTM cell: {why}")
            y, _, c_n, _, _ = stock.forward(LayerCall(input, h, c, weights, None, None, None, FORWARD, False), NOTHING)
            return y, c_n
        y, _, c_n, _, _ = run((input, h, c, weights, None, None, None, FORWARD, False))
        return y, c_n

    if TYPE_CHECKING:
        __call__ = forward

    def __prepare_scriptable__(self) -> torch.nn.LSTMCell:
        """TorchScript compiles torch's own cell, on our weights."""
        return _for_torch_script(torch.nn.LSTMCell, self)


class BasicLSTMCell(LazyModuleMixin, torch.nn.Module):
    """TensorFlow 1's `BasicLSTMCell`: its arithmetic, gate order and weight layout, for torch tensors.

    `num_units` is the width U of the vectors h and c: how many memory cells, each with its four gates, work side by
    side at every step (PyTorch calls it hidden_size). It is not the number of time steps, nor of layers. The weights
    grow with its square: 4 * U * (input width + U + 1).

        i, j, f, o = [x, h] @ kernel + bias
        c' = c * sigmoid(f + forget_bias) + sigmoid(i) * activation(j)
        h' = activation(c') * sigmoid(o)

    Args:
        num_units: U.
        forget_bias: added to f at every step; it is no part of `bias`.
        state_is_tuple: whether a state is the pair (c, h), c first, or one tensor [B, 2U] of both.
        activation: a callable, or the name of one in torch; None is tanh.
        input_size: the width I of x; None takes it from the first input.
        device, dtype: of the parameters.

    Shape:
        - input: [B, I]; state: (c, h), each [B, U], or [B, 2U], or None for zeros.
        - output: (h' [B, U], state), the state of the same form.

    Attributes:
        kernel: [I + U, 4U], uniform as Glorot and Bengio initialise (2010).
        bias: [4U], zeros.

    Raises:
        ValueError: an input that is not [B, I], a state of another form.
    """

    cls_to_become = None
    kernel: UninitializedParameter

    def __init__(
        self,
        num_units: int,
        forget_bias: float = 1.0,
        state_is_tuple: bool = True,
        activation: Callable[[Tensor], Tensor] | str | None = None,
        input_size: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_units <= 0:
            raise ValueError(f"num_units: expected a positive number, got {num_units}")
        if input_size is None:
            with warnings.catch_warnings():  # torch calls its lazy modules a new feature
                warnings.simplefilter("ignore", UserWarning)
                super().__init__()
        else:
            torch.nn.Module.__init__(self)
        self.num_units = num_units
        self.forget_bias = forget_bias
        self.state_is_tuple = state_is_tuple
        if activation is None:
            activation = "tanh"
        if not callable(getattr(torch, activation, None) if isinstance(activation, str) else activation):
            raise ValueError(f"activation: expected a callable or the name of one in torch, got {activation!r}")
        self.activation = activation
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.kernel = UninitializedParameter(**factory)
        self.bias = Parameter(torch.zeros(4 * num_units, **factory))
        if input_size is not None:
            self._materialize(input_size)

    def _materialize(self, input_size: int) -> None:
        self.kernel.materialize((input_size + self.num_units, 4 * self.num_units))
        self.reset_parameters()

    def initialize_parameters(self, input: Tensor, state: Any = None) -> None:
        """Takes the input width from the first input."""
        if self.has_uninitialized_params():
            if input.dim() != 2:
                raise ValueError(f"input: expected shape [B, I], got {list(input.shape)}")
            with torch.no_grad():
                self._materialize(input.shape[1])

    def reset_parameters(self) -> None:
        """Draws the kernel anew and zeroes the bias."""
        if not self.has_uninitialized_params():
            torch.nn.init.xavier_uniform_(self.kernel)
        torch.nn.init.zeros_(self.bias)

    def _split(self, x: Tensor, state: Any) -> State:
        """(c, h) of a state of either form."""
        U = self.num_units
        if state is None:
            zeros = x.new_zeros(x.shape[0], U)
            return zeros, zeros
        if self.state_is_tuple:
            if not isinstance(state, (tuple, list)) or len(state) != 2:
                raise ValueError(f"state: expected the pair (c, h), got {type(state).__name__}")
            for name, each in zip("ch", state, strict=True):
                if tuple(each.shape) != (x.shape[0], U):
                    expected = [x.shape[0], U]
                    raise ValueError(
                        f"state: expected {name} of shape [B, num_units] = {expected}, got {list(each.shape)}"
                    )
            return state[0], state[1]
        if not isinstance(state, Tensor) or tuple(state.shape) != (x.shape[0], 2 * U):
            got = list(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(f"state: expected a tensor of shape [B, 2*num_units] = {[x.shape[0], 2 * U]}, got {got}")
        return state[:, :U], state[:, U:]

    def forward(self, input: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """See the class for shapes: (h', state)."""
        if input.dim() != 2 or input.shape[1] + self.num_units != self.kernel.shape[0]:
            width = self.kernel.shape[0] - self.num_units
            raise ValueError(f"input: expected shape [B, I] with I = {width}, got {list(input.shape)}")
        activation = getattr(torch, self.activation) if isinstance(self.activation, str) else self.activation
        c, h = self._split(input, state)
        i, j, f, o = torch.addmm(self.bias, torch.cat([input, h], 1), self.kernel).chunk(4, 1)
        c = c * torch.sigmoid(f + self.forget_bias) + torch.sigmoid(i) * activation(j)
        h = activation(c) * torch.sigmoid(o)
        return h, (c, h) if self.state_is_tuple else torch.cat([c, h], 1)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        options = {"forget_bias": (self.forget_bias, 1.0), "state_is_tuple": (self.state_is_tuple, True)}
        shown = [f"{name}={value}" for name, (value, default) in options.items() if value != default]
        return ", ".join([str(self.num_units), *shown])


def _for_torch_script(cls: type[M], module: torch.nn.Module) -> M:
    warnings.warn(
        f"TorchScript puts torch's own {cls.__name__} in the place of lstm_ext's, on its weights", stacklevel=3
    )
    return recast(cls, module)


_OURS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {torch.nn.LSTM: LSTM, torch.nn.LSTMCell: LSTMCell}
_TORCHS = {ours: stock for stock, ours in _OURS.items()}


@overload
def replace_lstm(module: torch.nn.LSTM) -> LSTM: ...
@overload
def replace_lstm(module: torch.nn.LSTMCell) -> LSTMCell: ...
@overload
def replace_lstm(module: M) -> M: ...
def replace_lstm(module: torch.nn.Module) -> torch.nn.Module:
    """Puts our `LSTM` and `LSTMCell` in the place of each `torch.nn.LSTM` and `torch.nn.LSTMCell` inside `module`.

    The new modules share the Parameters, hooks, training flags, parametrizations and pruning masks of the old ones; a
    module used in several places stays one. A warning names what is left alone: subclasses, and modules whose forward
    method was replaced. The logger "lstm_ext" tells each replacement at the level INFO.

    Returns:
        `module`; or the new module if `module` itself is one to replace.
    """
    return swap("replace_lstm", module, _OURS)


@overload
def to_torch(module: LSTM) -> torch.nn.LSTM: ...
@overload
def to_torch(module: LSTMCell) -> torch.nn.LSTMCell: ...
@overload
def to_torch(module: M) -> M: ...
def to_torch(module: torch.nn.Module) -> torch.nn.Module:
    """The way back from `replace_lstm`: torch's own modules in the place of each `LSTM` and `LSTMCell` of ours.

    All is shared, warned of and logged as there. A `BasicLSTMCell`, for which torch has no module, is left alone. Calls
    that give `lengths`, `resets` or `return_cells` fail afterwards.

    Returns:
        `module`; or the new module if `module` itself is one to replace.
    """

    def why_not(each: torch.nn.Module) -> str:
        return "torch has no BasicLSTMCell" if isinstance(each, BasicLSTMCell) else ""

    return swap("to_torch", module, _TORCHS, why_not)
