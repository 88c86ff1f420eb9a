"""The runtime stays lean: the modules that it imports, and the time that this takes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import ROOT

BUILDERS = ("graphs", "targets")  # rooms of engines that build engines; answering loads no onnx of theirs
HEAVY = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "optimum"}


def modules_after(code: str) -> set[str]:
    program = f"import sys, json\n{code}\nprint(json.dumps(sorted(m for m in sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_the_package_loads_numpy_at_most() -> None:
    loaded = {name.split(".")[0] for name in modules_after("import ppllava_edge")}
    third_party = loaded - set(sys.stdlib_module_names) - {"ppllava_edge", "numpy"}
    third_party = {
        name for name in third_party if not name.startswith(("_", "site", "distutils", "sitecustomize"))
    }
    assert third_party == set(), third_party


def test_answering_loads_neither_torch_nor_onnx_nor_the_exporter(tiny_bundle: Path, video_file: Path) -> None:
    code = f"""
from ppllava_edge import VideoQA
qa = VideoQA({str(tiny_bundle)!r}, device="cpu")
qa.open({str(video_file)!r}, frames=4).ask("What is it?", max_new_tokens=3)
"""
    loaded = modules_after(code)
    assert not {name.split(".")[0] for name in loaded} & HEAVY
    assert not [
        name
        for name in loaded
        if name.startswith(("ppllava_edge.export", "ppllava_edge.bench", "ppllava_edge.nano.model"))
    ]


def test_running_engines_and_the_doctor_need_no_onnx() -> None:
    """A Jetson has TensorRT and numpy; graphs are rewritten elsewhere."""
    modules = (
        "runtime.pipeline.gpu",
        "engines.backends.cuda_driver",
        "engines.backends.onnxruntime_device_stage",
        "engines.backends.tensorrt_stage",
        "engines.cli.doctor",
        "engines.plugins.weighted_pool.tensorrt_plugin",
    )
    loaded = modules_after("\n".join(f"import ppllava_edge.{module}" for module in modules))
    assert not {name.split(".")[0] for name in loaded} & (HEAVY | {"onnxruntime", "tensorrt", "cuda"})


def imported(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("package", ["runtime", "engines"])
def test_no_source_file_names_a_heavy_import(package: str) -> None:
    """Not even inside a function: the bundle is the only contract between export and runtime."""
    files = list((ROOT / package).rglob("*.py"))
    assert len(files) > 30
    for path in files:
        room = path.relative_to(ROOT / package).parts[0]
        allowed = {"onnx"} if package == "engines" and room in (*BUILDERS, "cli") else set()
        modules = imported(path)
        assert {name.split(".")[0] for name in modules} & HEAVY <= allowed, path
        foreign = ("export", "calibration", "bench", "nano")
        assert not [m for m in modules if m.startswith(tuple(f"ppllava_edge.{f}" for f in foreign))], path


def test_export_does_not_import_the_runtime() -> None:
    for path in (ROOT / "export").rglob("*.py"):
        assert not [name for name in imported(path) if name.startswith("ppllava_edge.runtime")], path


def test_exporting_needs_no_torch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = [str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--json"]
    loaded = modules_after(
        f"from ppllava_edge.export.cli import main\nmain({arguments!r}, standalone_mode=False)"
    )
    assert not {name.split(".")[0] for name in loaded} & {"torch", "transformers"}
