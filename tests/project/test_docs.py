"""The documentation: the API reference is up to date, links work, Python in it compiles."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_reference_is_made_from_todays_docstrings() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "scripts" / "build_reference.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_everything_public_is_documented() -> None:
    import ppllava_edge

    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for name in ppllava_edge.__all__:
        assert f"## {name}\n" in text and (getattr(ppllava_edge, name).__doc__ or "").strip(), name


def test_python_in_the_docs_compiles() -> None:
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            if page.name != "reference.md":  # its signatures aren't programs
                compile(block, page.name, "exec", flags=0x2000)  # top-level await allowed


def test_docstrings_become_lists() -> None:
    script = ROOT / "docs" / "scripts" / "build_reference.py"
    spec = importlib.util.spec_from_file_location("build_reference", script)
    assert spec and spec.loader
    build_reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_reference)
    docstring = """Decode a video.

    Args:
        start, end: Seconds; None: the
            whole video.
        *key: What names it.

    Returns:
        The video,
        ready.

    Raises:
        MediaError: If it is <damaged>.
    """
    assert build_reference.markdown(docstring) == (
        "Decode a video.\n\n"
        "Arguments:\n\n- `start`, `end`: Seconds; None: the whole video.\n- `*key`: What names it.\n\n"
        "Returns: The video, ready.\n\n"
        "Raises:\n\n- `MediaError`: If it is &lt;damaged>."
    )
