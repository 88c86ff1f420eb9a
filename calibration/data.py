"""Calibration data: videos and questions about them."""

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
QUESTIONS_PER_CLIP = 2
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


@dataclass
class Clip:
    """A video and the questions asked about it.

    Attributes:
        name: The file's name, for the report.
        pixels: Function that decodes and preprocesses the video: (T, 3, H, W) float32.
        questions: (question, answer) pairs; an unknown answer is "".
        held_back: Whether the clip is for the parity gate instead of calibration.
    """

    name: str
    pixels: Callable[[], np.ndarray]
    questions: list[tuple[str, str]]
    held_back: bool = False


@dataclass
class Data:
    """Calibration clips, in a fixed order.

    Attributes:
        clips: The videos and their questions.
        hash: SHA-256 of all files and questions, for the manifest.
        skipped: (file name, reason) of files that can't be used.
    """

    clips: list[Clip]
    hash: str
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def samples(self) -> Iterator[tuple[int, str, str]]:
        """Every (clip index, question, answer)."""
        for index, clip in enumerate(self.clips):
            for question, answer in clip.questions:
                yield index, question, answer

    def hold_back(self) -> None:
        """Hold back every fourth clip for the parity gate, or the last of two or three clips.

        A single clip serves for both calibration and the gate.
        """
        count = len(self.clips)
        for index, clip in enumerate(self.clips):
            if count > 3:
                clip.held_back = index % 4 == 3
            else:
                clip.held_back = count > 1 and index == count - 1


def video_clip(path: Path, frames: int, manifest: Manifest, questions: list[tuple[str, str]]) -> Clip:
    """A clip that decodes `frames` frames of a video file at each call of `pixels`."""

    def pixels() -> np.ndarray:
        return preprocess_video(read_frames(path, frames).images, manifest.preprocessing)

    return Clip(path.name, pixels, questions)


def read_questions(path: Path) -> list[tuple[str, str]]:
    """Read questions from a text file.

    Args:
        path: One question a line, optionally followed by a tab and its answer. Empty lines and lines that
            begin with # are ignored.

    Returns:
        (question, answer) pairs, at most MAX_QUESTIONS; an unknown answer is "".

    Raises:
        PPLLaVAError: If the file can't be read or holds no question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise PPLLaVAError(f"--questions {path} can't be read as text: {reason}") from None
    pairs = [line.partition("\t") for line in lines if line.strip() and not line.startswith("#")]
    found = [(clean_question(question), answer.strip()) for question, _, answer in pairs if question.strip()]
    if not found:
        raise PPLLaVAError(f"--questions {path} holds no question; write one per line")
    return found[:MAX_QUESTIONS]


def from_folder(
    folder: Path,
    questions: Path | None,
    manifest: Manifest,
    frames: int | None = None,
    max_clips: int = MAX_CLIPS,
    questions_per_clip: int = QUESTIONS_PER_CLIP,
) -> Data:
    """Calibration data from a folder of videos.

    Files are chosen in the order of their names, spread evenly over the folder. Files that can't be decoded
    are skipped and listed.

    Args:
        folder: The videos.
        questions: A file of questions, as `read_questions` takes it; None: general questions.
        manifest: Manifest of the float model.
        frames: Frames per clip; None: the model's default.
        max_clips: The most videos to use.
        questions_per_clip: How many questions each clip gets, taken in turn.

    Raises:
        PPLLaVAError: If the folder is missing or empty, no file can be decoded, or there are too many frames.
    """
    files = _files(folder)
    asked = read_questions(questions) if questions else [(question, "") for question in QUESTIONS]
    count = _frame_count(frames, manifest)
    skipped: list[tuple[str, str]] = []
    clips: list[Clip] = []
    digest = hashlib.sha256(repr((count, asked)).encode())
    for path in _spread(files, max(2 * max_clips, max_clips + 8)):
        if len(clips) == max_clips:
            break
        try:  # decode once now: a bad file must show up before hours of work
            preprocess_video(read_frames(path, count).images[:1], manifest.preprocessing)
        except MediaError as error:
            skipped.append((path.name, str(error)))
            continue
        digest.update(f"{path.name} {hash_file(path)}".encode())
        first = len(clips) * questions_per_clip
        turn = [asked[(first + k) % len(asked)] for k in range(questions_per_clip)]
        clips.append(video_clip(path, count, manifest, turn))
    if not clips:
        shown = "; ".join(f"{name}: {why}" for name, why in skipped[:3])
        raise PPLLaVAError(
            f"--calibrate {folder}: none of {len(skipped)} files is a video that can be decoded ({shown})"
        )
    data = Data(clips, digest.hexdigest(), skipped)
    data.hold_back()
    return data


def _files(folder: Path) -> list[Path]:
    """The folder's files by name, hidden ones left out."""
    if not folder.is_dir():
        raise PPLLaVAError(f"--calibrate {folder}: no such directory; name a folder with videos")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not files:
        raise PPLLaVAError(f"--calibrate {folder} is empty; add videos like those the model will see")
    return files


def _frame_count(frames: int | None, manifest: Manifest) -> int:
    count = manifest.vision.default_frames if frames is None else frames
    limit = manifest.vision.max_frames
    if limit and count > limit:
        raise PPLLaVAError(f"--calibration-frames {count}: the temporal adapter takes at most {limit}")
    return count


def _spread(files: list[Path], limit: int) -> list[Path]:
    """At most `limit` of the files, evenly spread."""
    at = np.linspace(0, len(files) - 1, min(len(files), limit)).round().astype(int)
    return [files[i] for i in dict.fromkeys(at.tolist())]
