"""Calibration data: the user's own videos and questions, or drawn clips for the demonstration model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ppllava_edge.engines.bundle.integrity import hash_file
from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.errors import MediaError, PPLLaVAError
from ppllava_edge.runtime.language.text_processor import clean_question
from ppllava_edge.runtime.vision.frame_choice import read_frames
from ppllava_edge.runtime.vision.preprocess import preprocess_video

MAX_CLIPS = 16
MAX_QUESTIONS = 10_000
QUESTIONS = (
    "Describe the video.",
    "What happens in this video?",
    "What color is the main object?",
    "How many people are there?",
    "Where does this take place?",
    "What moves, and in which direction?",
    "What happens first, and what happens last?",
    "Is there a person in the video?",
)
NANO_CLIPS, NANO_SEED = 24, 8_128  # drawn for calibration: no other use draws with this seed


@dataclass
class Clip:
    """A video and what is asked about it. pixels(): (T,3,H,W) float32, preprocessed. questions: (question, answer; "" if unknown)."""

    name: str
    pixels: Callable[[], np.ndarray]
    questions: list[tuple[str, str]]
    held_back: bool = False


@dataclass
class Data:
    """Clips, in a fixed order. skipped: (file, why). hash: of files and questions, in the manifest."""

    clips: list[Clip]
    hash: str
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def samples(self) -> Iterator[tuple[int, str, str]]:
        """(clip, question, answer) of everything that is asked."""
        for index, clip in enumerate(self.clips):
            for question, answer in clip.questions:
                yield index, question, answer

    def hold_back(self) -> None:
        """Every fourth clip judges and is not calibrated on; with two or three clips the last; a single one has to do both."""
        count = len(self.clips)
        for index, clip in enumerate(self.clips):
            clip.held_back = index % 4 == 3 if count > 3 else count > 1 and index == count - 1


def read_questions(path: Path) -> list[tuple[str, str]]:
    """One question a line, optionally a tab and its answer; empty lines and lines that begin with # don't count. Raises PPLLaVAError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PPLLaVAError(
            f"--questions {path} can't be read as text: {getattr(error, 'strerror', None) or 'not UTF-8'}"
        ) from None
    pairs = [line.partition("\t") for line in lines if line.strip() and not line.startswith("#")]
    found = [(clean_question(question), answer.strip()) for question, _, answer in pairs if question.strip()]
    if not found:
        raise PPLLaVAError(f"--questions {path} holds no question; write one a line")
    return found[:MAX_QUESTIONS]


def from_folder(
    folder: Path,
    questions: Path | None,
    manifest: Manifest,
    frames: int | None = None,
    most: int = MAX_CLIPS,
    asked: int = 2,
) -> Data:
    """At most `most` videos of a folder, spread over it in the order of names, each with `asked` questions.

    Files that can't be decoded are skipped and listed. Raises PPLLaVAError if none is left.
    """
    if not folder.is_dir():
        raise PPLLaVAError(f"--calibrate {folder}: no such directory; name a folder with videos")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not files:
        raise PPLLaVAError(
            f"--calibrate {folder} is empty; put some videos there, like those the model will see"
        )
    wanted = read_questions(questions) if questions else [(question, "") for question in QUESTIONS]
    count = manifest.vision.default_frames if frames is None else frames
    if manifest.vision.max_frames and count > manifest.vision.max_frames:
        raise PPLLaVAError(
            f"--calibration-frames {count}: the temporal adapter knows at most {manifest.vision.max_frames}"
        )
    skipped: list[tuple[str, str]] = []
    clips: list[Clip] = []
    digest = hashlib.sha256(repr((count, wanted)).encode())
    at = np.linspace(0, len(files) - 1, min(len(files), max(2 * most, most + 8))).round().astype(int)
    for path in [files[i] for i in dict.fromkeys(at.tolist())]:
        if len(clips) == most:
            break
        try:
            images = read_frames(
                path, count
            ).images  # decoded once now, so that what can't be used is known before hours of work
            preprocess_video(images[:1], manifest.preprocessing)
        except MediaError as error:
            skipped.append((path.name, str(error)))
            continue
        digest.update(f"{path.name} {hash_file(path)}".encode())
        first = len(clips) * asked
        clips.append(
            Clip(
                path.name,
                _reader(path, count, manifest),
                [wanted[(first + k) % len(wanted)] for k in range(asked)],
            )
        )
    if not clips:
        shown = "; ".join(f"{name}: {why}" for name, why in skipped[:3])
        raise PPLLaVAError(
            f"--calibrate {folder}: none of {len(skipped)} files is a video that can be decoded ({shown})"
        )
    data = Data(clips, digest.hexdigest(), skipped)
    data.hold_back()
    return data


def drawn(manifest: Manifest, scratch: Path, clips: int = NANO_CLIPS) -> Data:
    """Clips of nano's world as real H.264 files, with the questions that can be asked about each and the right answers."""
    from ppllava_edge.nano.clips import spoken, write_clip
    from ppllava_edge.nano.world import KINDS, ask, sample_scene

    rng = np.random.default_rng(NANO_SEED)
    made = []
    for index in range(clips):
        scene = sample_scene(rng)
        path = write_clip(scratch / f"drawn-{index:02d}.mp4", scene, rng)
        asked = [found for kind in KINDS if (found := ask(scene, kind, rng)) is not None]
        made.append(
            Clip(
                path.name,
                _reader(path, manifest.vision.default_frames, manifest),
                [(spoken(question), answer) for question, answer in asked],
            )
        )
    data = Data(made, hashlib.sha256(f"nano {clips} {NANO_SEED}".encode()).hexdigest())
    data.hold_back()
    return data


def _reader(path: Path, frames: int, manifest: Manifest) -> Callable[[], np.ndarray]:
    return lambda: preprocess_video(read_frames(path, frames).images, manifest.preprocessing)
