"""The only importer of the compiled module: the module, or why there is none.

`C` is `lstm_ext._C`, with the types of its stub; it is None where `reason` is not "". `missing` says whether it should
have been there: no installation has recorded why it left it out.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import _C as C

__all__ = ["C", "missing", "reason"]


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


def _why_not_here(error: ImportError) -> str:
    """Why an installation that should have the compiled module has none."""
    package = Path(__file__).resolve().parent
    if any(package.glob("_C*.so")) or not (package.parent / "csrc").is_dir():
        return f"lstm_ext._C cannot be imported: {error}"
    elsewhere = PathFinder.find_spec("lstm_ext", [each for each in sys.path if Path(each).resolve() != package.parent])
    origin = None if elsewhere is None else elsewhere.origin
    here = f"this is the source folder {package}, in which nothing is compiled"
    if origin is None:
        return f"{here}. Install it in place (pip install -e .), or install it and start Python in another folder"
    return (
        f"{here}; the installed copy is {Path(origin).parent}. Either start Python in another folder, or install this "
        "one in place: pip install -e ."
    )


def _load() -> tuple[Any, str, bool]:
    try:
        return import_module("._C", __package__), "", False
    except ImportError as error:
        if recorded := _recorded_reason():
            return None, recorded, False
        reason = _why_not_here(error)
    warnings.warn(
        f"lstm_ext computes in NumPy, slowly, or in torch's own LSTM: {reason}", stacklevel=5
    )  # where lstm_ext is imported
    return None, reason, True


if TYPE_CHECKING:
    reason, missing = "", False
else:
    C, reason, missing = _load()
