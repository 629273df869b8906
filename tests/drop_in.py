"""torch's modules and ours side by side: the same weights, the same inputs, outputs and gradients compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import lstm_ext
from lstm_ext.testing import assert_close

TERMS = 400  # as long as the longest sum in any test here, and for stock's own error
I, H, T, B = 5, 7, 6, 3  # noqa: E741


def pair(*args: Any, cell: bool = False, **options: Any) -> tuple[Any, Any]:
    """torch's module and ours with the same weights."""
    stock = (nn.LSTMCell if cell else nn.LSTM)(*args, **options)
    ours = (lstm_ext.LSTMCell if cell else lstm_ext.LSTM)(*args, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def tensors(result: Any) -> list[Any]:
    """The tensors in nested tuples and PackedSequences, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if result is None:
        return []
    return [t for each in result for t in tensors(each)]


def run(module: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """Outputs, and the gradients of all floating inputs and parameters, from fixed random gradients of the outputs."""
    leaves = [t for t in tensors(args) if t.is_floating_point()]
    leaves = [t.detach().requires_grad_() for t in leaves]
    fresh = iter(leaves)

    def rebuild(a: Any) -> Any:
        if isinstance(a, PackedSequence):
            return a._replace(data=next(fresh))
        if isinstance(a, tuple):
            return tuple(rebuild(b) for b in a)
        return next(fresh) if isinstance(a, torch.Tensor) else a

    result = tensors(module(*rebuild(args), **kwargs))
    outputs = [t for t in result if t.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    wanted = [*leaves, *module.parameters()]
    return [*result, *torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)]


def assert_same(actual: list[Any], expected: list[Any], dtype: str = "float32") -> None:
    assert len(actual) == len(expected)
    for n, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None), n
        if a is None:
            continue
        assert a.dtype == e.dtype, n
        if a.is_floating_point():
            assert_close(a, e, dtype, terms=TERMS, name=f"result {n}")
        else:
            assert torch.equal(a, e), n
