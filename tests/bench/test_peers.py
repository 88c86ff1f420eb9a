"""Other engines' environments: missing packages are reported in one line before anything is prepared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers.commands import ROOT
from ppllava_edge.bench.peers.__main__ import main
from ppllava_edge.bench.peers.prepare import check_packages
from ppllava_edge.engines.errors import PPLLaVAError


def test_a_python_with_all_packages_is_accepted() -> None:
    check_packages(sys.executable, {"numpy": "numpy", "json": "json"})


def test_a_missing_package_is_named() -> None:
    with pytest.raises(PPLLaVAError, match=r"lacks no_such_module: .* -m pip install no-such-package$"):
        check_packages(sys.executable, {"numpy": "numpy", "no_such_module": "no-such-package"})


@pytest.mark.parametrize("option", ["--openvino-python", "--llama-python"])
def test_a_missing_python_is_reported(option: str, tmp_path: Path) -> None:
    run = CliRunner().invoke(main, [str(tmp_path / "work"), option, "/no/such/python"])
    assert run.exit_code == 2
    assert run.stderr == "error: /no/such/python doesn't run: No such file or directory\n"
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", ["openvino_vision.py", "llama_cpp_decoder.py"])
def test_peer_scripts_stand_alone(name: str) -> None:
    source = (ROOT / "bench" / "peers" / name).read_text(encoding="utf-8")
    assert "import ppllava_edge" not in source
    assert "from ppllava_edge" not in source
