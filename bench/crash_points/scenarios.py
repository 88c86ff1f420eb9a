"""The commands that are killed: from which state they start, what they write, and who reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ppllava_edge.bench.crash_points.runs import Runner
from ppllava_edge.engines.bundle.engine_manifest import ENGINE
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.nano import sample_path
from ppllava_edge.nano.clips import write_clip
from ppllava_edge.nano.world import sample_scene

QUESTIONS = ("What color is the circle?", "How many objects are there?")
READERS = (
    ("ppllava-info", "bundle"),
    (
        "ppllava-run",
        "--model",
        "bundle",
        "--device",
        "cpu",
        "--threads",
        "1",
        str(sample_path()),
        QUESTIONS[0],
    ),
)


@dataclass(frozen=True)
class Scenario:
    """A command and its surroundings. All paths are relative to its home folder.

    Attributes:
        name: For the table.
        command: The program and its arguments.
        prepare: Fills the home folder before the command; gets the runner too, to run other commands.
        target: What the command writes.
        readers: Commands that read the target while it may be half-written.
        status: The command's exit status.
        prints: Whether what it prints on stdout is part of its result.
        on_full_disk: Its exit status on a full, read-only or broken disk.
        done: A part of the error line with which it refuses to write what is there already.
    """

    name: str
    command: tuple[str, ...]
    prepare: Callable[[Path, Runner], None]
    target: str
    readers: tuple[tuple[str, ...], ...] = ()
    status: int = 0
    prints: bool = False
    on_full_disk: int = 2
    done: str = ""


def _nothing(home: Path, runner: Runner) -> None:
    """An empty home."""


def _export(home: Path, runner: Runner) -> None:
    _run(runner, "ppllava-export", "nano", "-o", "bundle", "--precision", "fp32", "--no-engine")


def _bundle(home: Path, runner: Runner) -> None:
    shutil.copytree(packed_bundle(), home / "bundle")


def _engine(home: Path, runner: Runner) -> None:
    """A bundle with an engine whose description looks different and means the same."""
    _bundle(home, runner)
    _run(runner, "ppllava-build", "bundle", "--target", "cpu")
    path = home / "bundle" / "engines" / "cpu" / ENGINE
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))


def _clips(home: Path, runner: Runner) -> None:
    """Two clips, and a file of questions."""
    rng = np.random.default_rng(12)
    (home / "videos").mkdir()
    for name in ("a.mp4", "c.mp4"):
        write_clip(home / "videos" / name, sample_scene(rng), rng)
    (home / "questions.txt").write_text("\n".join(QUESTIONS))


def _videos(home: Path, runner: Runner) -> None:
    """The same, and a broken video."""
    _clips(home, runner)
    (home / "videos" / "b.mp4").write_bytes(b"not a video")


def _run(runner: Runner, *command: str) -> None:
    finished = runner.run(command)
    if finished.status:
        raise PPLLaVAError(f"{' '.join(command)} failed: {finished.stderr.strip()}")


SCENARIOS = (
    Scenario(
        "export",
        ("ppllava-export", "nano", "-o", "bundle", "--precision", "int8", "--weight-only"),
        _nothing,
        "bundle",
        READERS,
        done="exists already",
    ),
    Scenario(
        "export --force",
        ("ppllava-export", "nano", "-o", "bundle", "--precision", "fp16", "--force"),
        _export,
        "bundle",
        READERS,
    ),
    Scenario(
        "export --calibrate",
        (
            *("ppllava-export", "nano", "-o", "bundle", "--precision", "vision=int8,kv=int8", "--no-engine"),
            *("--calibrate", "videos", "--questions", "questions.txt", "--calibration-frames", "2"),
            *("--keep-fp16", "0", "--allow-drift"),
        ),
        _clips,
        "bundle",
        READERS,
        done="exists already",
    ),
    Scenario("build", ("ppllava-build", "bundle", "--target", "cpu"), _bundle, "bundle", READERS),
    Scenario(
        "build --force",
        ("ppllava-build", "bundle", "--target", "cpu", "--force"),
        _engine,
        "bundle",
        READERS,
    ),
    Scenario(
        "run --batch",
        (
            *("ppllava-run", "--batch", "videos", "questions.txt", "-o", "answers.jsonl"),
            *("--device", "cpu", "--threads", "1"),
        ),
        _videos,
        "answers.jsonl",
        status=1,
    ),
    Scenario(
        "run --cache",
        (
            *("ppllava-run", "--cache-folder", "features", "--device", "cpu", "--threads", "1"),
            *(str(sample_path()), QUESTIONS[0]),
        ),
        _nothing,
        "features",
        prints=True,
        on_full_disk=0,
    ),
)
