"""Files that are about one GPU: what was found out here, kept for later processes.

They lie in the folder LSTM_EXT_CACHE, else in lstm_ext below XDG_CACHE_HOME or ~/.cache. A file says which GPU, driver
and build it is about. What cannot be read, or is about others, counts as not there; what cannot be written is not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from . import _native
from ._version import __version__

VARIABLE = "LSTM_EXT_CACHE"
_DRIVER = Path("/proc/driver/nvidia/version")


def folder() -> Path:
    """Where they are kept."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lstm_ext"


@cache
def _build() -> str:
    """Which build of the kernels this is: a digest of the compiled module."""
    path = getattr(_native.C, "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else ""


def _driver(version: int) -> str:
    """That of the driver itself where the system tells, and the CUDA that it knows."""
    text = ""
    with suppress(OSError, UnicodeDecodeError):
        text = _DRIVER.read_text(encoding="utf-8")
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return f"{found[1] if found else 'unknown'}, CUDA {version}"


def identity(device: int) -> dict[str, Any]:
    """What a file on this GPU is about."""
    known = dict(_native.C.cuda_device(device))
    driver = _driver(known.pop("driver"))
    return {"lstm_ext": __version__, "build": _build(), "driver": driver, **known}


def path_of(kind: str, about: dict[str, Any]) -> Path:
    """Of the file of a kind about this GPU, driver and build."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"\W+", "-", str(about["name"])).strip("-")
    return folder() / f"{kind}-{name}-{digest}.json"


def read(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """What `write` has written to this path about the same; None if there is nothing of the kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if content["about"] == about else None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None


def write(path: Path, content: dict[str, Any]) -> None:
    """Puts the content in the place of the file at once: readers see the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
