"""check.py, the comparison with the original implementation's arrays, over any pipeline."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from helpers.commands import GOLDEN, ROOT

_spec = importlib.util.spec_from_file_location("golden_check", GOLDEN / "check.py")
assert _spec and _spec.loader
check = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check)

VARIANTS = pytest.mark.parametrize(
    "variant",
    range(len(check.VARIANTS)),
    ids=["-".join(map(str, (v[0], v[1], v[3] or ""))) for v in check.VARIANTS],
)


def run_check(
    variant: int, exports: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run check.py for one variant; `ppllava_edge.runtime.Pipeline` is what it drives.

    Args:
        variant: Which of check.VARIANTS.
        exports: Where exported bundles are kept, so that each checkpoint is exported once in a test run.
    """
    export = f"{sys.executable} {ROOT / 'tests' / 'helpers' / 'cached_export.py'} {exports}"
    monkeypatch.setattr(check, "VARIANTS", [check.VARIANTS[variant]])
    monkeypatch.setattr(sys, "argv", ["check.py", "--golden", str(GOLDEN), "--export", export])
    status = check.main()
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if line.startswith("FAIL")]
    assert status == 0 and not failed, "\n".join(failed) or printed
