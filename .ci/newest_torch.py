"""Prints the newest torch that pip can install without CUDA packages, if it is newer than the one that CI is held to.

Nothing is downloaded but metadata. What was found, or why there is none, goes to stderr in one line.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PINNED = re.search(r"^torch==(\S+)", Path(__file__).with_name("constraints.txt").read_text(), re.MULTILINE)
CUDA = re.compile(r"^(nvidia|cuda|triton)", re.IGNORECASE)


def pip(*arguments: str) -> str:
    """What pip prints without our constraint; "" if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    command = [sys.executable, "-m", "pip", *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""


def numbers(version: str) -> list[int]:
    """For comparison, without the local label."""
    return [int(n) for n in version.split("+")[0].split(".")]


def cuda_packages(version: str) -> list[str] | None:
    """Those that this version asks for on this platform; None if pip cannot install it."""
    from pip._vendor.packaging.requirements import Requirement  # as old or new as the pip that is asked

    report = pip(
        "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report=-", f"torch=={version}"
    )
    if not report:
        return None
    metadata: dict[str, Any] = json.loads(report)["install"][0]["metadata"]
    required = [Requirement(each) for each in metadata.get("requires_dist", [])]
    asked = [each for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [each.name for each in asked if CUDA.match(each.name)]


def main() -> None:
    """See the module."""
    assert PINNED
    listed = re.search(r"^Available versions: (.*)", pip("index", "versions", "torch"), re.MULTILINE)
    versions = [v for v in listed[1].split(", ") if re.fullmatch(r"[\d.]+(\+\w+)?", v)] if listed else []
    newer = [version for version in versions if numbers(version) > numbers(PINNED[1])]
    why = []
    for version in newer:
        packages = cuda_packages(version)
        if packages == []:
            print(f"torch {version} installs without CUDA packages", file=sys.stderr)
            print(version)
            return
        why.append(f"pip refuses {version}" if packages is None else f"{version} brings {', '.join(packages[:2])} …")
    reason = "; ".join(why) or f"pip lists none newer than {PINNED[1]}" if listed else "pip can list none here"
    print(f"no newer torch installs without CUDA packages: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
