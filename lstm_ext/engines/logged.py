"""LSTM_EXT_LOG=1: one line on stderr for each new plan, telling which engine computes, which way, and why.

Without it no call passes here: engines are wrapped as they are chosen, once, or not at all.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from ..call import CallTuple, GradsTuple, LayerCall, Needs, OutputGrads, OutputsTuple, Save, Saved

ENVIRONMENT = "LSTM_EXT_LOG"
ON = os.environ.get(ENVIRONMENT, "0") not in ("", "0")

_said: set[str] = set()


class Logged:
    """An engine that says how it computes, after the first call of each kind."""

    def __init__(self, name: str, engine: Any, why: str) -> None:
        self._name, self._engine, self._why = name, engine, why

    def forward(self, call: CallTuple, save: Save) -> OutputsTuple:
        """See `Engine`."""
        outputs = self._engine.forward(call, save)
        if outputs is not NotImplemented:
            self._say("forward", LayerCall(*call))
        return outputs

    def backward(self, call: LayerCall, saved: Saved, grads: OutputGrads, needs: Needs) -> GradsTuple:
        """See `Engine`."""
        results = self._engine.backward(call, saved, grads, needs)
        if results is not NotImplemented:
            self._say("backward", call)
        return results

    def _say(self, direction: str, call: LayerCall) -> None:
        say(direction, call, self._name, self._engine.way(call, direction == "backward"), self._why)


def say(direction: str, call: LayerCall, name: str, way: str, why: str) -> None:
    """One line, unless only the number of steps is new."""
    T, *others = call.sizes()
    sizes = " ".join(f"{letter}={size}" for letter, size in zip("BIHP", others, strict=True))
    dtype, device = str(call.x.dtype).removeprefix("torch."), getattr(call.x, "device", "cpu")
    what = f"{dtype} {device}{f' {call.directions.name}' if call.directions else ''}{' cell' if call.is_step else ''}"
    what += "" if call.cell is None else " with options"
    key = f"{direction} {sizes} {what} {name} {way}"
    if key not in _said:
        _said.add(key)
        line = f"lstm_ext: {direction} T={T} {sizes} {what}: {name}"
        print(f"{line}{f' ({why})' if why else ''}{f', {way}' if way else ''}", file=sys.stderr, flush=True)
