"""The wheel holds everything that the runtime needs, and works away from the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from lint import FOLDERS

from helpers.commands import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack files that are gone since
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
    run = subprocess.run([*pip, "-w", folder, ROOT], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return next(folder.glob("*.whl"))


def test_the_wheels_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "__init__.py",
        "py.typed",
        "nano/bundle/manifest.json",
        "nano/bundle/decoder.onnx.data",
        "nano/sample/shapes.mp4",
        "export/cli.py",
    ):
        assert f"ppllava_edge/{name}" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"ppllava_edge"}, (
        "nothing lands beside the package"
    )
    assert wheel.stat().st_size < 8_000_000
    sources = set()
    for folder in FOLDERS:
        start = ROOT / folder if folder == "api" else ROOT
        sources |= {
            f"ppllava_edge/{p.relative_to(start)}"
            for kind in ("*.py", "*.cu*", "*.cpp", "CMakeLists.txt")
            for p in (ROOT / folder).rglob(kind)
        }
    assert sources <= names, sources - names
    modules = {name for name in names if name.endswith(".py")}
    assert modules <= sources, modules - sources


def test_the_installed_wheel_answers_outside_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys, ppllava_edge; from ppllava_edge.nano import sample_path;"
        "assert sys.argv[1] in ppllava_edge.__file__;"
        "print(ppllava_edge.VideoQA().open(sample_path()).ask('What color is the circle?').text)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    assert run.stdout.strip() == "red", run.stderr
