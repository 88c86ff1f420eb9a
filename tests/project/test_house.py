"""House rules: files, functions and folders stay small, rooms and public names are documented."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from helpers.commands import ROOT

PACKAGES = ("api", "engines", "export", "calibration", "runtime", "bench", "nano")
FOLDERS = (*PACKAGES, "examples", "tests", "docs")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_FOLDER_FILES = 400, 60, 12
NOT_CODE = {"__pycache__", "golden", "bundle", "images"}  # data


def python_files() -> list[Path]:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if not NOT_CODE & set(path.relative_to(ROOT).parts[:-1])]


def folders() -> list[Path]:
    found = [ROOT / folder for folder in FOLDERS]
    found += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_dir()]
    room = ROOT / "engines" / "bundle"  # a room of code, not a bundle's data
    return [f for f in found if f == room or not NOT_CODE & set(f.relative_to(ROOT).parts)]


def test_no_file_is_too_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_no_function_is_too_long() -> None:
    long: dict[str, int] = {}
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert long == {}


def test_no_folder_is_too_full() -> None:
    counts = {
        str(folder.relative_to(ROOT)): sum(p.is_file() for p in folder.iterdir()) for folder in folders()
    }
    assert {name: n for name, n in counts.items() if n > MAX_FOLDER_FILES} == {}


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_every_room_describes_its_contents(package: str) -> None:
    rooms = [path for path in folders() if path.relative_to(ROOT).parts[0] == package]
    for room in rooms:
        if any(room.glob("*.py")):
            text = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
            assert text and len(text.split()) >= 8, room


OVERRIDDEN = {"forward", "invoke"}  # of torch's and click's classes, which document them


def public_nodes(tree: ast.Module) -> list[ast.AST]:
    """The public functions and classes of a module, and the public methods of its public classes."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    top = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    methods = [m for c in top if isinstance(c, ast.ClassDef) for m in c.body if isinstance(m, kinds)]
    setters = {m for m in methods if any(ast.unparse(d).endswith(".setter") for d in m.decorator_list)}
    public = [m for m in methods if not m.name.startswith("_") and m.name not in OVERRIDDEN]
    return top + [m for m in public if m not in setters]


def test_public_names_are_documented() -> None:
    """Every public class, function and method of the package has a docstring."""
    bare = []
    for path in python_files():
        if path.relative_to(ROOT).parts[0] in PACKAGES:
            nodes = public_nodes(ast.parse(path.read_text()))
            bare += [f"{path.relative_to(ROOT)}:{n.name}" for n in nodes if not ast.get_docstring(n)]  # type: ignore[attr-defined,arg-type]
    assert bare == []


MIRRORED = {  # room of the package → folder of its tests
    "engines": "tests/engines",
    "export": "tests/export",
    "calibration": "tests/calibration",
    "runtime": "tests/runtime",
    "bench": "tests/bench",
    "nano": "tests/nano",
}


def test_tests_mirror_the_rooms() -> None:
    for package, folder in MIRRORED.items():
        assert any((ROOT / folder).rglob("test_*.py")), f"{package} has no tests in {folder}"
