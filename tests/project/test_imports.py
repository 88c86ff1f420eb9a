"""The lean runtime stays lean: what it imports, and how long that takes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ppllava_edge.engines
import ppllava_edge.runtime

MAKERS = (  # of engines; answering loads none of them
    "graph.py",
    "pieces.py",
    "rewrite.py",
    "build.py",
    "cpu.py",
    "cuda.py",
    "lower.py",
    "decode_graph.py",
    "plugin_node.py",
    "profiles.py",
    "tensorrt_target.py",
    "tensorrt_worker.py",
)
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


def test_what_runs_engines_and_judges_a_machine_needs_no_onnx() -> None:
    """A Jetson has TensorRT and numpy; graphs are rewritten elsewhere."""
    modules = (
        "runtime.gpu_pipeline",
        "engines.device",
        "engines.device_stage",
        "engines.doctor",
        "engines.plugins.weighted_pool.tensorrt_plugin",
    )
    loaded = modules_after("\n".join(f"import ppllava_edge.{module}" for module in modules))
    assert not {name.split(".")[0] for name in loaded} & (HEAVY | {"onnxruntime", "tensorrt", "cuda"})


@pytest.mark.parametrize("package", [ppllava_edge.runtime, ppllava_edge.engines], ids=["runtime", "engines"])
def test_no_source_file_names_a_heavy_import(package: object) -> None:
    """Not even inside a function: the bundle is the only contract between export and runtime. Files that make engines may have onnx."""
    for path in Path(package.__file__).parent.glob("*.py"):  # type: ignore[attr-defined]
        allowed = {"onnx"} if package is ppllava_edge.engines and path.name in MAKERS else set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if not node.level else []
                relative = (node.module or "").split(".")[0] if node.level == 2 else ""
                assert relative not in ("export", "calibration", "bench"), f"{path.name} imports {relative}"
            assert {name.split(".")[0] for name in names} & HEAVY <= allowed, path.name


def test_export_does_not_import_the_runtime() -> None:
    import ppllava_edge.export

    for path in Path(ppllava_edge.export.__file__).parent.glob("*.py"):
        assert "..runtime" not in path.read_text(), path.name


def test_exporting_needs_no_torch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = [str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--json"]
    loaded = modules_after(
        f"from ppllava_edge.export.cli import main\nmain({arguments!r}, standalone_mode=False)"
    )
    assert not {name.split(".")[0] for name in loaded} & {"torch", "transformers"}
