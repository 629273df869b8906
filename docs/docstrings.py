"""What mkdocstrings is told of our docstrings, which are written to be read as they are."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Names the section `Example` as Griffe does, and keeps the products of shapes, [L*D, B], from being emphasis."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text, section, examples = obj.docstring.value.partition("\nExample:\n")
            obj.docstring.value = re.sub(r"(?<=\w)\*(?=\w)", r"\*", text) + section.replace("e:", "es:") + examples
