"""The only importer of the compiled module: the module, or why there is none.

`C` is `lstm_ext._C`, with the types of its stub; it is None where `reason` is not "".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import _C as C

__all__ = ["C", "reason"]


def _recorded_reason() -> str:
    """Why the installation left the compiled module out, if it did."""
    path = Path(__file__).with_name("_build_info.json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return "" if record["native"] else str(record["reason"])
    except OSError:
        return ""
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        return f"lstm_ext._C is missing, and the record of the installation, {path}, is damaged: {error!r}"


def _load() -> tuple[Any, str]:
    try:
        from . import _C
    except ImportError as error:
        return None, _recorded_reason() or f"lstm_ext._C cannot be imported: {error}"
    try:
        _C.build_info()
    except RuntimeError as error:  # LSTM_EXT_SIMD names a level that this machine lacks
        return None, str(error)
    return _C, ""


if TYPE_CHECKING:
    reason = ""
else:
    C, reason = _load()
