"""Faults while a bundle is written leave nothing behind and give one clear error line."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.commands import assert_one_line_error, run_command
from helpers.exporting import nothing_left
from ppllava_edge.engines.bundle.manifest import MANIFEST
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.graphs import graph
from ppllava_edge.engines.graphs.tensors import Tensor, Weight
from ppllava_edge.export.convert import convert
from ppllava_edge.export.options import Options
from ppllava_edge.export.output import check_output, move_into_place
from ppllava_edge.export.quantisation.precision import parse_precision
from ppllava_edge.export.sources.tensors import Checkpoint

FP32 = parse_precision("fp32")


@pytest.mark.parametrize(
    "fault",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
    ids=["full disk", "interrupt"],
)
def test_a_fault_half_way_leaves_nothing_behind(
    golden: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    real, calls = graph.write_weight, 0

    def store(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 60:
            raise fault
        return real(*arguments)

    monkeypatch.setattr(graph, "write_weight", store)
    expected = PPLLaVAError if isinstance(fault, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="full" if isinstance(fault, OSError) else None):
        convert(Options(str(golden), golden.parent / "bundle", FP32, tokenizer=False))
    assert nothing_left(golden)


def test_a_full_disk_keeps_its_error_number() -> None:
    """numpy's tofile would lose the number, and with it the clear error line."""

    class FullDisk:
        def tell(self) -> int:
            return 0

        def write(self, data: Any) -> int:
            if not len(data):
                return 0
            raise OSError(errno.ENOSPC, "No space left on device")

    weight = Weight(Tensor.of("w", np.zeros(4096, np.float32)), "float32")
    with pytest.raises(OSError) as raised:
        graph.write_weight("w", weight, FullDisk(), "w.data")
    assert raised.value.errno == errno.ENOSPC


def test_an_output_directory_that_can_not_be_written(golden: Path) -> None:
    (golden.parent / "file").write_text("x")
    assert_one_line_error(
        run_command("ppllava-export", golden, "-o", golden.parent / "file" / "b", "--no-tokenizer"), "file"
    )


def test_a_bundle_that_the_runtime_would_refuse_is_not_written(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is larger than the runtime's limits; no weight is read."""
    monkeypatch.setattr(Checkpoint, "load", lambda self, name: pytest.fail(f"{name} was read"))
    monkeypatch.setattr("ppllava_edge.engines.bundle.manifest_parser.LARGEST_CACHE", 0)
    with pytest.raises(PPLLaVAError, match="KV cache takes"):
        convert(Options(str(golden), golden.parent / "bundle", FP32, tokenizer=False))
    assert nothing_left(golden)


def test_only_a_bundle_is_replaced(golden: Path) -> None:
    """A link isn't followed, and a folder that another command wrote meanwhile stays."""
    output, staging = golden.parent / "bundle", golden.parent / "staging"
    staging.mkdir()
    output.mkdir()
    (output / "thesis.tex").write_text("x")
    with pytest.raises(PPLLaVAError, match="not a bundle"):
        move_into_place(staging, output, force=True)
    with pytest.raises(PPLLaVAError, match="meanwhile"):
        move_into_place(staging, output, force=False)
    (output / MANIFEST).write_text('{"name": "an app of the web", "icons": []}')
    with pytest.raises(PPLLaVAError, match="not a bundle"):
        move_into_place(staging, output, force=True)
    with pytest.raises(PPLLaVAError, match="not a bundle"):  # before hours of work
        check_output(Options(str(golden), output, FP32, force=True))
    link = golden.parent / "link"
    link.symlink_to(output)
    with pytest.raises(PPLLaVAError, match="not a bundle"):
        move_into_place(staging, link, force=True)
    assert (output / "thesis.tex").exists() and link.is_symlink() and staging.is_dir()


def test_what_appears_while_files_are_synced_stays(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing the files of a large bundle takes minutes."""
    output, staging = golden.parent / "bundle", golden.parent / "staging"
    staging.mkdir()

    def write_meanwhile(path: Path) -> None:
        output.mkdir(exist_ok=True)
        (output / MANIFEST).write_text('{"format": "ppllava-edge bundle"}')

    monkeypatch.setattr("ppllava_edge.engines.staging._sync", write_meanwhile)
    with pytest.raises(PPLLaVAError, match="meanwhile"):
        move_into_place(staging, output, force=False)
    assert (output / MANIFEST).exists() and staging.is_dir()
