"""ppllava-info: its output, and bundles whose parts do not belong together."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from helpers.commands import assert_one_line_error, run_command


def test_info_and_its_json(tiny_bundle: Path) -> None:
    assert "clip-llama" in run_command("ppllava-info", tiny_bundle).stdout
    found = json.loads(run_command("ppllava-info", tiny_bundle, "--json").stdout)
    assert found["manifest"]["pooling"]["video"]["kernel"] == [2, 3, 3] and found["bytes"] > 0
    assert run_command("ppllava-info").returncode == 0


def test_info_notices_graphs_of_another_shape(tiny_bundle: Path, golden_bundle: Path, tmp_path: Path) -> None:
    """A bundle whose hashes are right but whose parts don't belong together."""
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "mixed"))
    manifest = json.loads((copy / "manifest.json").read_text())
    for name in ("decoder.onnx", "decoder.onnx.data"):
        shutil.copy(golden_bundle / name, copy / name)
    for name in manifest["files"]:
        data = (copy / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert_one_line_error(run_command("ppllava-info", copy), "decoder.onnx", "the manifest promises")
