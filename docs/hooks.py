"""What the site has beside the pages in this folder; MkDocs calls the functions named on_….

Pages are read in the repository as well, so their links go to files outside of this folder. On the site each such file
is a page of its own: Markdown and pictures as they are, sources as one block of code. README.md is the first page.
Formulas become MathML, which browsers draw without a script.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)\s#]+")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def site_path(path: str) -> str:
    """Where a file of the repository, such as docs/math.md or csrc/params.h, stands on the site."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    page = "" if PurePosixPath(path).suffix in {".md", ".png", ".svg"} else ".md"
    return f"repository/{path}{page}"


def links(path: str, markdown: str) -> Iterator[tuple[str, str]]:
    """The links of a page of the repository to files in it: as they are written, and the file."""
    for link in LINK.findall(markdown):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
        if (ROOT / target).is_file():
            yield link, target


def content(path: str) -> str | bytes:
    """The text of a page, or a picture."""
    file = ROOT / path
    if file.suffix in {".png", ".svg"}:
        return file.read_bytes()
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    language = {".cuh": "cpp", ".h": "cpp", "": "bash"}.get(file.suffix, file.suffix[1:])
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n``````{language}\n{text}\n``````\n"


def on_files(files: Files, config: Any) -> Files:
    """Adds what pages link to, and what that links to."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting = [*pages, "README.md"]
    seen = set(pages)
    while waiting:
        path = waiting.pop()
        if path not in seen and not path.startswith("docs/"):
            files.append(File.generated(config, site_path(path), content=content(path)))
        seen.add(path)
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            waiting += (target for _, target in links(path, text) if target not in seen)
    config.extra["repository_paths"] = {site_path(path): path for path in seen}
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to files of the repository, as links to where they stand on the site."""
    here = page.file.src_uri
    for link, target in set(links(config.extra["repository_paths"][here], markdown)):
        there = posixpath.relpath(site_path(target), posixpath.dirname(here) or ".")
        markdown = re.sub(rf"(?<=\]\(){re.escape(link)}(?=[)#])", there, markdown)
    return markdown


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Formulas, as MathML."""

    def math(match: re.Match[str]) -> str:
        made = convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline")
        if re.search(r"<mi>(\\|&<)", made):
            raise ValueError(f"{page.file.src_uri}: latex2mathml does not know all of this: {match[2]}")
        return made

    return FORMULA.sub(math, content)
