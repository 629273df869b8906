"""Says what is missing for a release of this tree, and what it would hold.

    python .ci/release.py --dry-run           # every check, the changes, and the files built into dist/
    python .ci/release.py --tag v0.1.0        # what the workflow runs: the changes on stdout, or what is missing

docs/release.md has the steps.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()
VERSION_FILE, CHANGELOG = "lstm_ext/_version.py", "CHANGELOG.md"
STATED = re.compile(r"""^\s*(?:__version__|version)\s*[:=]\s*["']?(\d+\.[^"'\s,{}]*)["']?\s*$""", re.MULTILINE)


def read_version(text: str) -> str:
    """Of the text of the version file."""
    found = re.search(r'^__version__ = "(\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{VERSION_FILE}: expected a release's version, such as 1.2.3 or 1.2.3rc1")
    return found[1]


def read_changes(changelog: str) -> tuple[str, str, str]:
    """The version, the date and the text of the newest entry."""
    found = re.search(r"^## (\S+) — (\S+)\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit(f"{CHANGELOG}: expected an entry '## VERSION — DATE'")
    return found[1], found[2], found[3].strip()


def find_problems(version: str, changelog: str, tag: str | None) -> list[str]:
    """Why this is no release yet, as far as the version, the changelog and the tag tell."""
    problems = []
    newest, date, changes = read_changes(changelog)
    if newest != version:
        problems.append(f"{CHANGELOG}: the newest entry is {newest}, {VERSION_FILE} has {version}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        problems.append(f"{CHANGELOG}: the entry {newest} has no date but {date!r}")
    if not changes:
        problems.append(f"{CHANGELOG}: the entry {newest} says nothing")
    if tag is not None and tag != f"v{version}":
        problems.append(f"the tag is {tag}, the version {version}: expected v{version}")
    return problems


def git(*arguments: str) -> str:
    """What git prints."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def find_problems_of_tree(version: str) -> list[str]:
    """Changes that no commit has, and files that state a version of their own."""
    problems = [f"not committed: {line[3:]}" for line in git("status", "--porcelain").splitlines()]
    for name in git("ls-files", "*.py", "*.toml", "*.cfg", "*.cff", "CMakeLists.txt").splitlines():
        for stated in STATED.findall((ROOT / name).read_text(encoding="utf-8")):
            # A citation has to name what it cites, and then the same.
            if name != VERSION_FILE and (Path(name).suffix != ".cff" or stated != version):
                problems.append(f"{name}: states the version {stated}; that of {VERSION_FILE} is the only one")
    return problems


def build() -> None:
    """The sdist, the pure wheel and that for this Python, into dist/, and their sizes."""
    subprocess.run([sys.executable, "-m", "build", "--sdist"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    [sdist] = (ROOT / "dist").glob(f"*-{read_version((ROOT / VERSION_FILE).read_text())}.tar.gz")
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB", flush=True)
    subprocess.run([sys.executable, ".ci/wheels.py", "make"], cwd=ROOT, check=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--dry-run", action="store_true", help="go on where something is missing, and build the files")
    how.add_argument("--tag", help="that of the release")
    asked = parser.parse_args()
    version = read_version((ROOT / VERSION_FILE).read_text(encoding="utf-8"))
    changelog = (ROOT / CHANGELOG).read_text(encoding="utf-8")
    problems = [*find_problems(version, changelog, asked.tag), *find_problems_of_tree(version)]
    print("\n".join(problems) or "nothing is missing", file=sys.stderr)
    if problems and not asked.dry_run:
        raise SystemExit(1)
    print(f"{read_changes(changelog)[2]}\n")
    if asked.dry_run:
        build()


if __name__ == "__main__":
    main()
