"""TensorFlow 1's cells for torch tensors, and its loop over them: `BasicLSTMCell`, `dynamic_rnn` and their relatives.

A cell's weights lie as TensorFlow has them, and the kernels read them so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import Parameter, UninitializedParameter
from torch.types import Device

from ._torch_private import _get_tracing_state
from .call import FORWARD
from .cell import ACTIVATIONS, Cell, Norm, read_activation, read_integer, read_number, read_probability
from .engines import composed
from .route import COMPILED, as_leaf, draw_seed, has_kernel, is_proxy, run


class LSTMStateTuple(NamedTuple):
    """The state of a `BasicLSTMCell`: c [B, U] and h [B, U], c first.

    Example:
        >>> c, h = lstm_ext.BasicLSTMCell(64).zero_state(16)
        >>> c.shape, h.shape
        (torch.Size([16, 64]), torch.Size([16, 64]))
    """

    c: Any
    h: Any


def _is_ours(activation: Any) -> bool:
    """Whether there are kernels for it."""
    return isinstance(activation, str) and activation in ACTIVATIONS


def _make_cells(activation: Any, forget_bias: float, epsilon: float, dropout: float) -> tuple[Cell | None, Cell | None]:
    """In eval and in training."""
    if not _is_ours(activation):
        return None, None
    cell = Cell(
        *read_activation("activation", activation),
        forget_bias=float(forget_bias),
        norm=Norm.GATES if epsilon else Norm.NONE,
        norm_epsilon=epsilon,
        tensorflow=True,
    )
    return cell, cell._replace(candidate_dropout=dropout, training=True) if dropout else cell


_TRAINING = Cell._fields.index("training")
_OPTIONS = frozenset({"activation", "forget_bias", "dropout_keep_prob"})


class TensorFlowCell(LazyModuleMixin, torch.nn.Module):
    """What the cells here share; `num_units` U, kernel [I + U, 4U], gates in the order i, j, f, o."""

    cls_to_become = None
    kernel: UninitializedParameter
    state_is_tuple = True

    def __init__(
        self,
        num_units: int,
        forget_bias: float,
        activation: Callable[[Tensor], Tensor] | str | None,
        input_size: int | None,
        factory: dict[str, Any],
        name: str | None,
    ) -> None:
        if (num_units := read_integer("num_units", num_units)) <= 0:
            raise ValueError(f"num_units: expected a positive number, got {num_units}")
        read_number("forget_bias", forget_bias)
        if input_size is None:
            with warnings.catch_warnings():  # torch calls its lazy modules a new feature
                warnings.simplefilter("ignore", UserWarning)
                super().__init__()
        else:
            torch.nn.Module.__init__(self)
        self.num_units = num_units
        self.forget_bias = forget_bias
        if activation is None:
            activation = "tanh"
        in_torch = isinstance(activation, str) and callable(getattr(torch, activation, None))
        if not (_is_ours(activation) or in_torch or callable(activation)):
            names = ", ".join(ACTIVATIONS)
            expected = f"a callable, one of {names}, or the name of a callable in torch"
            raise ValueError(f"activation: expected {expected}, got {activation!r}")
        self.activation = activation
        self.name = name
        self.kernel = UninitializedParameter(**factory)

    def _materialize(self, input_size: int) -> None:
        self.kernel.materialize((input_size + self.num_units, 4 * self.num_units))
        self.reset_parameters()

    def initialize_parameters(self, input: Tensor, state: Any = None) -> None:
        """Takes the input width from the first input."""
        if self.has_uninitialized_params():
            if is_proxy(input):
                raise TypeError("input_size: expected the width of x for torch.fx, which has no tensors, got None")
            if input.dim() != 2:
                raise ValueError(f"input: expected shape [B, I], got {list(input.shape)}")
            with torch.no_grad():
                self._materialize(input.shape[1])

    def reset_parameters(self) -> None:
        """Draws the kernel anew."""
        if not self.has_uninitialized_params():
            torch.nn.init.xavier_uniform_(self.kernel)

    @property
    def state_size(self) -> LSTMStateTuple | int:
        """The widths of a state."""
        return LSTMStateTuple(self.num_units, self.num_units) if self.state_is_tuple else 2 * self.num_units

    @property
    def output_size(self) -> int:
        """The width of an output."""
        return self.num_units

    def zero_state(self, batch_size: int, dtype: torch.dtype | None = None) -> LSTMStateTuple | Tensor:
        """A state of zeros for `batch_size` rows, where the parameters are; the dtype is theirs if None."""
        like = next(p for name, p in self.named_parameters() if "kernel" not in name)  # that may have no shape yet
        c, h = like.new_zeros(2, batch_size, self.num_units, dtype=dtype)
        return LSTMStateTuple(c, h) if self.state_is_tuple else torch.cat([c, h], 1)

    def _check(self, name: str, a: Any, axes: str, *shape: int) -> None:
        """The parameters decide the dtype, except under autocast."""
        if not isinstance(a, Tensor) or tuple(a.shape) != shape:
            got = list(a.shape) if isinstance(a, Tensor) else type(a).__name__
            raise ValueError(f"{name}: expected shape {axes}, got {got}")
        if a.dtype != self.kernel.dtype and not torch.is_autocast_enabled(a.device.type):
            raise ValueError(f"{name}: expected dtype {self.kernel.dtype} as the kernel has, got {a.dtype}")

    def _check_step(self, input: Tensor, state: Any) -> None:
        """Says what is wrong with the arguments of a step, if anything is."""
        width = self.kernel.shape[0] - self.num_units
        rows = input.shape[0] if input.dim() else 0
        self._check("input", input, f"[B, I] with I = {width}", rows, width)
        self._check_state("state", state, rows)

    def _check_state(self, name: str, state: Any, B: int) -> None:
        U = self.num_units
        if state is None:
            return
        if not self.state_is_tuple:
            self._check(name, state, f"[B, 2*num_units] = {[B, 2 * U]}", B, 2 * U)
            return
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            raise ValueError(f"{name}: expected the pair (c, h), got {type(state).__name__}")
        for part, a in zip((f"{name}.c", f"{name}.h"), state, strict=True):
            self._check(part, a, f"[B, num_units] = {[B, U]}", B, U)

    def _split(self, state: Any) -> tuple[Any, Any]:
        """(c, h) of a state of either form, None for zeros."""
        if state is None:
            return None, None
        if self.state_is_tuple:
            if not isinstance(state, (tuple, list)):
                raise TypeError(f"state: expected the pair (c, h), got {type(state).__name__}")
            c, h = state
            return c, h
        return state[:, : self.num_units], state[:, self.num_units :]

    def _join(self, c: Tensor, h: Tensor) -> LSTMStateTuple | Tensor:
        """A state of this form."""
        return LSTMStateTuple(c, h) if self.state_is_tuple else torch.cat([c, h], -1)

    def _keep_cells(self) -> None:
        """What it computes in eval and in training, made once: compilers do not see into that."""
        self._cells = _make_cells(*self._options())

    def __setattr__(self, name: str, value: Any) -> None:
        """An option that is set counts from the next step on."""
        super().__setattr__(name, value)
        if name in _OPTIONS and "_cells" in self.__dict__:
            self._keep_cells()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of the versions that kept no cells too."""
        super().__setstate__(state)
        self._keep_cells()

    def _options(self) -> tuple[Any, float, float, float]:
        """The activation, the forget bias, what is added to a variance (0: nothing is normalised), and the dropout."""
        return self.activation, self.forget_bias, 0.0, 0.0

    def _weights(self) -> list[Any]:
        """As a call takes them."""
        raise NotImplementedError

    def _compose(self, x: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """A step in torch's operations: (h', c')."""
        raise NotImplementedError

    def _function(self) -> Callable[[Tensor], Tensor]:
        """The activation."""
        if isinstance(self.activation, str):
            named: Any = getattr(torch, self.activation, None)
            if named is None:
                kind, alpha, beta = read_activation("activation", self.activation)
                return lambda x: composed.activate(kind, alpha, beta, x)
            return named
        return self.activation

    def forward(self, input: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """See the class for shapes: (h', state)."""
        if type(input) is not Tensor and is_proxy(input):
            return as_leaf(self, input, state)
        cell = self._cells[1 if self.training else 0]  # None if it has a function of the user's
        fused = input.is_cpu and _get_tracing_state() is None
        if cell is None or not (fused and (COMPILED or has_kernel(input, "operations"))):
            self._check_step(input, state)
            c, h = self._split(state)
            if c is None:
                c = h = input.new_zeros(input.shape[0], self.num_units)
            h, c = self._compose(input, c, h)
            return h, self._join(c, h)
        try:
            c, h = state if type(state) is LSTMStateTuple and self.state_is_tuple else self._split(state)
            if input.dim() != 2 or (c is None) != (state is None):
                raise TypeError("input, state: expected [B, I] and a pair")
            seed = draw_seed(cell, input) if cell[_TRAINING] else None
            h, _, c, _, _ = run((input, h, c, self._weights(), None, None, None, FORWARD, False, cell, seed))
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
            self._check_step(input, state)
            raise
        # tuple's own, as the function that NamedTuple makes takes half as long again
        return h, tuple.__new__(LSTMStateTuple, (c, h)) if self.state_is_tuple else self._join(c, h)

    if TYPE_CHECKING:
        __call__ = forward

    def __prepare_scriptable__(self) -> None:
        """TorchScript knows neither lazy parameters nor callables as attributes."""
        raise NotImplementedError(
            f"{type(self).__name__}: TorchScript cannot compile it; expected torch.jit.trace, torch.compile or "
            "torch.export"
        )

    def _shown(self) -> dict[str, tuple[Any, Any]]:
        """The arguments by name, each with its default."""
        width = None if self.has_uninitialized_params() else self.kernel.shape[0] - self.num_units
        activation = "tanh" if isinstance(self.activation, torch.nn.Module) else self.activation  # Module shows its own
        return {
            "forget_bias": (self.forget_bias, 1.0),
            "state_is_tuple": (self.state_is_tuple, True),
            "activation": (getattr(activation, "__name__", activation), "tanh"),
            "input_size": (width, None),
            "name": (self.name, None),
        }

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        shown = [f"{name}={value}" for name, (value, default) in self._shown().items() if value != default]
        return ", ".join([str(self.num_units), *shown])


class BasicLSTMCell(TensorFlowCell):
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
        state_is_tuple: whether a state is an `LSTMStateTuple` (c, h), c first, or one tensor [B, 2U] of both.
        activation: one of `LSTM`'s by name, for which there are kernels; another name of a callable in torch, or a
            callable, runs in torch's operations. None is tanh.
        input_size: the width I of x; None takes it from the first input.
        device, dtype: of the parameters.
        name: kept as an attribute and shown; in TensorFlow it names the variables.

    Shape:
        - input: [B, I]; state: (c, h), each [B, U], or [B, 2U], or None for zeros.
        - output: (h' [B, U], state), the state of the same form.

    `dynamic_rnn` runs a cell over a whole sequence.

    Attributes:
        kernel: [I + U, 4U], uniform as Glorot and Bengio initialise (2010).
        bias: [4U], zeros.
        state_size: the widths of a state, `LSTMStateTuple(U, U)` or 2U.
        output_size: U.

    Raises:
        ValueError: an input that is not [B, I], a state of another form, another dtype than that of `kernel`.

    Example:
        >>> cell, state = lstm_ext.BasicLSTMCell(64), None
        >>> for x in torch.randn(50, 16, 28):
        ...     output, state = cell(x, state)
        >>> output.shape, state.c.shape, cell.kernel.shape
        (torch.Size([16, 64]), torch.Size([16, 64]), torch.Size([92, 256]))
    """

    def __init__(
        self,
        num_units: int,
        forget_bias: float = 1.0,
        state_is_tuple: bool = True,
        activation: Callable[[Tensor], Tensor] | str | None = None,
        input_size: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(num_units, forget_bias, activation, input_size, factory, name)
        self.state_is_tuple = state_is_tuple
        self.bias = Parameter(torch.zeros(4 * num_units, **factory))
        if input_size is not None:
            self._materialize(input_size)
        self._keep_cells()

    def reset_parameters(self) -> None:
        """Draws the kernel anew and zeroes the bias."""
        super().reset_parameters()
        torch.nn.init.zeros_(self.bias)

    def _weights(self) -> list[Any]:
        parameters = self._parameters
        try:
            return [parameters["kernel"], parameters["bias"]]
        except KeyError:  # parametrized
            return [self.kernel, self.bias]

    def _compose(self, x: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        activation = self._function()
        i, j, f, o = torch.addmm(self.bias, torch.cat([x, h], 1), self.kernel).chunk(4, 1)
        c = c * torch.sigmoid(f + self.forget_bias) + torch.sigmoid(i) * activation(j)
        return activation(c) * torch.sigmoid(o), c


class LayerNormBasicLSTMCell(TensorFlowCell):
    """TensorFlow 1's `LayerNormBasicLSTMCell`: each gate's sum and the new c are normalised, j may be dropped.

        i, j, f, o = each of [x, h] @ kernel, normalised over its U, times gamma, plus beta
        c' = c * sigmoid(f + forget_bias) + sigmoid(i) * dropout(activation(j))
        c' = c' normalised, times gamma_h, plus beta_h
        h' = activation(c') * sigmoid(o)

    The variance has 1e-12 added (1e-3 in float16) before its root is taken. Without `layer_norm` there is a bias
    instead. Sources: Ba et al. (2016), Semeniuta et al. (2016), tensorflow/contrib/rnn/python/ops/rnn_cell.py.

    Args:
        num_units: U.
        forget_bias: added to f at every step.
        activation: see `BasicLSTMCell`.
        layer_norm: whether anything is normalised.
        norm_gain, norm_shift: what gamma and gamma_h, beta and beta_h start at.
        dropout_keep_prob: probability of an element of activation(j) to stay, divided by that, while the module trains.
        input_size: the width I of x; None takes it from the first input.
        device, dtype: of the parameters.
        name: kept as an attribute and shown.

    Shape:
        - input: [B, I]; state: (c, h), each [B, U], or None for zeros.
        - output: (h' [B, U], state).

    Attributes:
        kernel: [I + U, 4U], gates in the order i, j, f, o.
        gamma, beta: [4U], TensorFlow's "input", "forget", "transform" and "output", in this order: i, f, j, o.
        gamma_h, beta_h: [U], TensorFlow's "state".
        bias: [4U], without `layer_norm`.

    Raises:
        ValueError: as `BasicLSTMCell`; a probability out of [0, 1].

    Example:
        >>> cell = lstm_ext.LayerNormBasicLSTMCell(64, dropout_keep_prob=0.9)
        >>> outputs, state = lstm_ext.dynamic_rnn(cell, torch.randn(16, 50, 28))
        >>> outputs.shape
        torch.Size([16, 50, 64])
    """

    def __init__(
        self,
        num_units: int,
        forget_bias: float = 1.0,
        activation: Callable[[Tensor], Tensor] | str | None = None,
        layer_norm: bool = True,
        norm_gain: float = 1.0,
        norm_shift: float = 0.0,
        dropout_keep_prob: float = 1.0,
        input_size: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(num_units, forget_bias, activation, input_size, factory, name)
        self.layer_norm, self.norm_gain, self.norm_shift = layer_norm, norm_gain, norm_shift
        self.dropout_keep_prob = read_probability("dropout_keep_prob", dropout_keep_prob)
        if layer_norm:
            self.gamma, self.beta = (Parameter(torch.empty(4 * num_units, **factory)) for _ in range(2))
            self.gamma_h, self.beta_h = (Parameter(torch.empty(num_units, **factory)) for _ in range(2))
        else:
            self.bias = Parameter(torch.empty(4 * num_units, **factory))
        self.reset_parameters()
        if input_size is not None:
            self._materialize(input_size)
        self._keep_cells()

    def reset_parameters(self) -> None:
        """Draws the kernel anew; all else as it starts."""
        super().reset_parameters()
        if not self.layer_norm:
            torch.nn.init.zeros_(self.bias)
            return
        for weights, value in (
            ((self.gamma, self.gamma_h), self.norm_gain),
            ((self.beta, self.beta_h), self.norm_shift),
        ):
            for weight in weights:
                torch.nn.init.constant_(weight, value)

    @property
    def _epsilon(self) -> float:
        return 1e-3 if self.kernel.dtype == torch.float16 else 1e-12

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self._keep_cells()  # the dtype may be another
        return result

    def _options(self) -> tuple[Any, float, float, float]:
        return self.activation, self.forget_bias, self._epsilon if self.layer_norm else 0.0, 1 - self.dropout_keep_prob

    def _weights(self) -> list[Any]:
        if not self.layer_norm:
            return [self.kernel, self.bias]
        no_bias = self.kernel.new_zeros(4 * self.num_units)  # as a buffer it would be what `to_empty` leaves there
        return [self.kernel, no_bias, self.gamma, self.beta, self.gamma_h, self.beta_h]

    def _compose(self, x: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        activation, U = self._function(), self.num_units
        products = torch.cat([x, h], 1) @ self.kernel
        if self.layer_norm:
            gates = [products[:, n * U : (n + 1) * U] for n in (0, 2, 1, 3)]  # i, f, j, o
            scales = zip(gates, self.gamma.chunk(4), self.beta.chunk(4), strict=True)
            i, f, j, o = (F.layer_norm(gate, (U,), gamma, beta, self._epsilon) for gate, gamma, beta in scales)
        else:
            i, j, f, o = (products + self.bias).chunk(4, 1)
        g = F.dropout(activation(j), 1 - self.dropout_keep_prob, self.training)
        c = c * torch.sigmoid(f + self.forget_bias) + torch.sigmoid(i) * g
        if self.layer_norm:
            c = F.layer_norm(c, (U,), self.gamma_h, self.beta_h, self._epsilon)
        return activation(c) * torch.sigmoid(o), c

    def _shown(self) -> dict[str, tuple[Any, Any]]:
        own = {
            "layer_norm": (self.layer_norm, True),
            "norm_gain": (self.norm_gain, 1.0),
            "norm_shift": (self.norm_shift, 0.0),
            "dropout_keep_prob": (self.dropout_keep_prob, 1.0),
        }
        return super()._shown() | own


class MultiRNNCell(torch.nn.Module):
    """TensorFlow 1's `MultiRNNCell`: cells one above the other, each of which takes the output of the one below.

    Args:
        cells: from the input up.

    Shape:
        - input: [B, I]; state: a tuple with the state of each cell, or None for zeros.
        - output: (h' of the last cell, a tuple with the state of each).

    Example:
        >>> cells = lstm_ext.MultiRNNCell([lstm_ext.BasicLSTMCell(64), lstm_ext.BasicLSTMCell(32)])
        >>> outputs, states = lstm_ext.dynamic_rnn(cells, torch.randn(16, 50, 28))
        >>> outputs.shape, len(states)
        (torch.Size([16, 50, 32]), 2)
    """

    def __init__(self, cells: Iterable[Any]) -> None:
        super().__init__()
        self.cells = torch.nn.ModuleList(cells)
        if not len(self.cells):
            raise ValueError("cells: expected at least one cell, got none")

    @property
    def state_size(self) -> tuple[Any, ...]:
        """The widths of a state."""
        return tuple(cell.state_size for cell in self._cells)

    @property
    def output_size(self) -> int:
        """The width of an output."""
        return self._cells[-1].output_size

    @property
    def _cells(self) -> list[Any]:
        return list(self.cells)

    def zero_state(self, batch_size: int, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        """A state of zeros for `batch_size` rows."""
        return tuple(cell.zero_state(batch_size, dtype) for cell in self._cells)

    def states(self, name: str, state: Any) -> list[Any]:
        """The state of each cell; None for zeros."""
        if state is None:
            return [None] * len(self.cells)
        if not isinstance(state, (tuple, list)) or len(state) != len(self.cells):
            got = f"{len(state)} items" if isinstance(state, (tuple, list)) else type(state).__name__
            raise ValueError(f"{name}: expected a state for each of {len(self.cells)} cells, got {got}")
        return list(state)

    def forward(self, input: Tensor, state: Any = None) -> tuple[Tensor, tuple[Any, ...]]:
        """See the class for shapes."""
        states = []
        for cell, own in zip(self._cells, self.states("state", state), strict=True):
            input, after = cell(input, own)
            states.append(after)
        return input, tuple(states)

    if TYPE_CHECKING:
        __call__ = forward


def dynamic_rnn(
    cell: Any,
    inputs: Tensor,
    sequence_length: Any = None,
    initial_state: Any = None,
    time_major: bool = False,
) -> tuple[Tensor, Any]:
    """TensorFlow 1's loop over a cell, in one call of the kernel for the whole sequence.

    A cell with hooks, with another forward method, or with an activation that has no kernel is called at each step.

    Args:
        cell: a `BasicLSTMCell`, a `LayerNormBasicLSTMCell`, a `MultiRNNCell`, or a list of cells, which stacks them.
        inputs: [B, T, I], or [T, B, I] if `time_major`.
        sequence_length: integer [B], the valid steps of each row; None is all.
        initial_state: as the cell takes it; None is zeros.
        time_major: whether T comes before B in inputs and outputs.

    Returns:
        outputs [B, T, U] (or [T, B, U]), zero past a length; and the state after each row's last valid step.

    Raises:
        TypeError: another cell.
        ValueError: inputs, lengths or a state of the wrong shape or dtype, a length out of range.

    Example:
        >>> cell = lstm_ext.BasicLSTMCell(64)
        >>> outputs, (c, h) = lstm_ext.dynamic_rnn(cell, torch.randn(16, 50, 28), sequence_length=[50] * 15 + [7])
        >>> outputs.shape, h.shape, bool(outputs[15, 7:].any())
        (torch.Size([16, 50, 64]), torch.Size([16, 64]), False)
    """
    if isinstance(cell, (list, tuple)):
        cell = MultiRNNCell(cell)
    if not isinstance(inputs, Tensor) or inputs.dim() != 3 or not inputs.shape[0 if time_major else 1]:
        axes = "[T, B, I]" if time_major else "[B, T, I]"
        got = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"inputs: expected shape {axes} with at least one step, got {got}")
    lengths = _lengths(sequence_length, inputs, time_major)
    if isinstance(cell, MultiRNNCell):
        own_states = cell.states("initial_state", initial_state)
        if _was_changed(cell, MultiRNNCell):
            return _loop(cell, inputs, lengths, None if initial_state is None else tuple(own_states), time_major)
        states = []
        for each, own in zip(cell.cells, own_states, strict=True):
            inputs, after = dynamic_rnn(each, inputs, lengths, own, time_major)
            states.append(after)
        return inputs, tuple(states)
    if not isinstance(cell, TensorFlowCell):
        known = "BasicLSTMCell, LayerNormBasicLSTMCell, MultiRNNCell or a list of these"
        raise TypeError(f"cell: expected a {known}, got {type(cell).__name__}")
    if _was_changed(cell, TensorFlowCell):
        return _loop(cell, inputs, lengths, initial_state, time_major)
    first = inputs[0] if time_major else inputs[:, 0]
    if isinstance(cell.kernel, UninitializedParameter):
        cell.initialize_parameters(first)
    cell._check_step(first, None)
    cell._check_state("initial_state", initial_state, len(first))
    computed = cell._cells[1 if cell.training else 0]
    if computed is None:
        return _loop(cell, inputs, lengths, initial_state, time_major)
    c, h = cell._split(initial_state)
    seed = draw_seed(computed, inputs) if computed.training else None
    h, c = (None if a is None else a[None] for a in (h, c))
    options = (FORWARD, not time_major, computed, seed)
    y, h_n, c_n, _, _ = run((inputs, h, c, cell._weights(), lengths, None, None, *options))
    return y, cell._join(c_n[0], h_n[0])


def _lengths(lengths: Any, inputs: Tensor, time_major: bool) -> Tensor | None:
    """`sequence_length` as a tensor where the inputs are."""
    if lengths is None:
        return None
    T, B = inputs.shape[:2] if time_major else (inputs.shape[1], inputs.shape[0])
    try:
        dtype = torch.int64 if isinstance(lengths, (list, tuple)) and not lengths else None  # which has none of its own
        lengths = torch.as_tensor(lengths, dtype=dtype, device=inputs.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"sequence_length: expected integers [B] = [{B}], got {lengths!r}") from error
    if lengths.dtype == torch.bool or lengths.is_floating_point() or tuple(lengths.shape) != (B,):
        raise ValueError(
            f"sequence_length: expected integers [B] = [{B}], got {lengths.dtype} of shape {list(lengths.shape)}"
        )
    if B and lengths.is_cpu and not is_compiling() and type(lengths) is Tensor:
        least, most = int(lengths.min()), int(lengths.max())
        if least < 0 or most > T:
            raise ValueError(f"sequence_length: expected values from 0 to T = {T}, got {least} to {most}")
    return lengths


def _was_changed(cell: torch.nn.Module, cls: type[torch.nn.Module]) -> bool:
    """Whether a call of the cell may do something else than its class: by hooks, or another forward method."""
    makes_kernel = getattr(cell, "_initialize_hook", None)  # before the first call of a lazy module
    hooks = [key for key in cell._forward_pre_hooks if makes_kernel is None or key != makes_kernel.id]
    others = (cell._forward_hooks, cell._backward_hooks, cell._backward_pre_hooks)
    return bool(hooks) or any(others) or "forward" in vars(cell) or type(cell).forward is not cls.forward


def _loop(cell: Any, inputs: Tensor, lengths: Tensor | None, state: Any, time_major: bool) -> tuple[Tensor, Any]:
    """The same step by step, by calls of the cell."""
    axis, outputs = 0 if time_major else 1, []
    steps = inputs.unbind(axis)
    zeros = cell.zero_state(len(steps[0]), inputs.dtype)
    if isinstance(cell, MultiRNNCell) and state is not None:
        state = tuple(zero if own is None else own for own, zero in zip(state, zeros, strict=True))
    state = zeros if state is None else state
    for t, x in enumerate(steps):
        output, after = cell(x, state)
        if lengths is not None:
            valid = (t < lengths)[:, None]
            output, after = output.masked_fill(~valid, 0), _where(valid, after, state)
        state = after
        outputs.append(output)
    return torch.stack(outputs, axis), state


def _where(valid: Tensor, state: Any, before: Any) -> Any:
    """A state of any form, of the rows that are valid."""
    if isinstance(state, Tensor):
        return torch.where(valid, state, before)
    parts = [_where(valid, *pair) for pair in zip(state, before, strict=True)]
    make: Any = getattr(type(state), "_make", tuple)  # of a NamedTuple
    return make(parts)
