"""Every path, module, command and make target that README.md and docs/ mention exists. Nothing is run."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from helpers.commands import ROOT
from ppllava_edge.engines.targets.select import TARGETS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("api", "bench", "calibration", "docs", "engines", "examples", "export", "nano", "runtime", "tests")
SOURCES = (".py", ".cu", ".cuh", ".cpp", ".md")  # a file name with one of these is a file of the repository
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
PATH = re.compile(rf"(?<![\w./~:-])(?:{'|'.join(FOLDERS)})/[\w./{{}},<>-]*")
NAME = re.compile(rf"(?<![\w./-])[\w-]+(?:{'|'.join(map(re.escape, SOURCES))})\b")
MODULE = re.compile(r"\bppllava_edge(?:\.\w+)+")
IMPORT = re.compile(r"^\s*from (ppllava_edge[\w.]*) import ([\w, ]+)", re.M)
RUN = re.compile(r"python[\d.]* -m (ppllava_edge[\w.]*)")
COMMAND = re.compile(r"\bppllava-[a-z]+\b(?!-)")
MAKE = re.compile(r"(?:^\s*|`)make ([a-z-]+)", re.M)
IN_A_BUNDLE = re.compile(rf"engines/(?:<target>|\.<target>|{'|'.join(TARGETS)})(?:[/.]|$)")


def code(text: str) -> str:
    """The text in backticks and code blocks, one piece per line."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    indented = re.findall(r"^ {4,}\S.*$", text, re.M)
    return "\n".join([*fenced, *indented, *re.findall(r"`([^`\n]+)`", text)])


def expand(path: str) -> Iterator[str]:
    """a/{b,c} → a/b, a/c."""
    braces = re.search(r"\{([^}]*)\}", path)
    if braces is None:
        yield path
        return
    for choice in braces[1].split(","):
        yield from expand(path[: braces.start()] + choice + path[braces.end() :])


@cache
def file_names() -> frozenset[str]:
    """The names of the files in the root and in the folders."""
    files = [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    return frozenset(path.name for path in files if path.is_file())


def module_file(name: str) -> Path | None:
    """The source of a module or package; None if no module has that name."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def mentions(source: Path, name: str) -> bool:
    """Whether a module defines, imports or lists a name, by its syntax tree."""
    return any(
        name in (getattr(node, field, None) for field in ("name", "id", "value"))
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
    )


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or a name in its module."""
    if module_file(dotted) is not None:
        return True
    parent, _, last = dotted.rpartition(".")
    source = module_file(parent) if parent else None
    return source is not None and mentions(source, last)


def missing_paths(page: Path) -> list[str]:
    """Paths in links and in code that don't exist."""
    text = page.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    for match in PATH.findall(code(text)):
        for path in expand(match.rstrip(".,")):
            if not IN_A_BUNDLE.match(path) and not (ROOT / path).exists():
                missing.append(path)
    return missing + [name for name in NAME.findall(code(text)) if name not in file_names()]


def missing_modules(page: Path) -> list[str]:
    """Modules, imported names and `python -m` commands that don't exist."""
    text = page.read_text(encoding="utf-8")
    missing = [name for name in MODULE.findall(text) if not resolves(name)]
    for module, names in IMPORT.findall(text):
        missing += [
            f"{module}.{n.strip()}" for n in names.split(",") if not resolves(f"{module}.{n.strip()}")
        ]
    return missing + [f"python -m {name}" for name in RUN.findall(text) if not runs(name)]


def runs(name: str) -> bool:
    """Whether `python -m name` runs a program."""
    source = module_file(name)
    if source is not None and source.name == "__init__.py":
        source = module_file(f"{name}.__main__")
    return source is not None and 'if __name__ == "__main__":' in source.read_text(encoding="utf-8")


def missing_commands(page: Path) -> list[str]:
    """Commands of the package and targets of the Makefile that don't exist."""
    text = page.read_text(encoding="utf-8")
    scripts = re.findall(r"^(ppllava-\w+) = ", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    missing = [name for name in COMMAND.findall(text) if name not in (*scripts, "ppllava-edge")]
    return missing + [f"make {name}" for name in MAKE.findall(code(text)) if name not in targets]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    assert missing_paths(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_exist(page: Path) -> None:
    assert missing_modules(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    assert missing_commands(page) == []


def test_missing_paths_and_names_are_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`engines/pooling.py` [x](nowhere.md) `gone.py` `engines/{bundle,rooms}` `engines/cpu/`\n"
        "`engines/errors.py` `ppllava_edge.runtime.nothing` `ppllava_edge.runtime.Pipeline`\n"
        "`python -m ppllava_edge.engines.errors`\n\n"
        "    from ppllava_edge import VideoQA, Nothing\n"
        "    ppllava-fly x\n    make tea\n    ppllava-run x\n"
    )
    assert missing_paths(page) == ["nowhere.md", "engines/pooling.py", "engines/rooms", "gone.py"]
    assert missing_modules(page) == [
        "ppllava_edge.runtime.nothing",
        "ppllava_edge.Nothing",
        "python -m ppllava_edge.engines.errors",
    ]
    assert missing_commands(page) == ["ppllava-fly", "make tea"]
