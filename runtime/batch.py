"""Many videos, the same questions: answers as JSON Lines, resumed where they broke off."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ppllava_edge.engines.errors import BusyError, MediaError, PPLLaVAError
from ppllava_edge.runtime.language.text_processor import clean_question
from ppllava_edge.runtime.media.pictures import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from ppllava_edge.runtime.video_qa import VideoQA

VIDEO_SUFFIXES = {
    ".mp4",
    ".mkv",
    ".webm",
    ".mov",
    ".avi",
    ".ts",
    ".m2ts",
    ".mts",
    ".mpg",
    ".mpeg",
    ".m4v",
    ".wmv",
    ".flv",
    ".ogv",
    ".3gp",
    ".mxf",
    ".y4m",
    ".h264",
    ".hevc",
    ".apng",
}
MAX_QUESTIONS = 10_000
MAX_QUESTION_BYTES = 4 << 20


@dataclass
class BatchResult:
    """Lines written now: answered, failed; skipped: lines that were there already."""

    answered: int = 0
    failed: int = 0
    skipped: int = 0


def videos_below(folder: str | os.PathLike[str]) -> list[Path]:
    """Videos, images and animations below a folder, in order of their paths; hidden ones aren't looked at. Raises MediaError if there are none."""
    root = Path(folder)
    if not root.is_dir():
        raise MediaError(f"{folder} is not a folder")
    suffixes = VIDEO_SUFFIXES | IMAGE_SUFFIXES
    found = [
        p
        for p in root.rglob("*")
        if p.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in p.relative_to(root).parts)
        and p.is_file()
    ]
    if not found:
        raise MediaError(f"there are no videos below {folder} (known: {', '.join(sorted(suffixes))})")
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def read_questions(source: str) -> list[str]:
    """Questions, one a line, of a file; or the text itself if there is no such file. Raises PromptError or MediaError."""
    path = Path(source)
    try:
        if not path.is_file():
            return [clean_question(source)]
        if path.stat().st_size > MAX_QUESTION_BYTES:
            raise MediaError(f"{source} is too large for a file of questions ({path.stat().st_size} bytes)")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise MediaError(f"{source} is not a text file of questions, one a line") from None
    except OSError as error:
        if error.strerror == "File name too long":
            return [clean_question(source)]
        raise MediaError(f"{source} can't be read: {error.strerror}") from None
    questions = list(
        dict.fromkeys(clean_question(line) for line in lines if line.strip() and not line.startswith("#"))
    )
    if not questions:
        raise MediaError(f"{source} holds no questions (one a line; lines that begin with # don't count)")
    if len(questions) > MAX_QUESTIONS:
        raise MediaError(f"{source} holds {len(questions)} questions; {MAX_QUESTIONS} is the most")
    return questions


def run_batch(
    qa: VideoQA,
    folder: str | os.PathLike[str],
    questions: Sequence[str],
    output: str | os.PathLike[str],
    opening: dict[str, Any] | None = None,
    asking: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> BatchResult:
    """Ask every question about every video below a folder; append one JSON line per video and question to output, flushed to disk one by one.

    Pairs that have a line already are skipped, so a run that was killed goes on: no line twice, none lost. What fails becomes a line with "error".
    opening, asking: arguments of VideoQA.open and Video.ask. progress: called with (video, pairs done, of how many).
    Raises PPLLaVAError for an output that isn't such a file, or that another run writes to.
    """
    root, videos, result = Path(folder), videos_below(folder), BatchResult()
    total, done = len(videos) * len(questions), 0
    with _appending(Path(output)) as (file, there):
        for path in videos:
            name = path.relative_to(root).as_posix()
            missing = [q for q in questions if (name, q) not in there]
            result.skipped += len(questions) - len(missing)
            done += len(questions) - len(missing)
            for question, line in _answers(qa, path, missing, opening or {}, asking or {}):
                _append(file, {"video": name, "question": question, **line})
                failed = "error" in line
                result.failed, result.answered, done = (
                    result.failed + failed,
                    result.answered + (not failed),
                    done + 1,
                )
                if progress:
                    progress(name, done, total)
    return result


def _answers(
    qa: VideoQA, path: Path, questions: Sequence[str], opening: dict[str, Any], asking: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(question, what its line holds) for one video: errors are lines too."""
    if not questions:
        return
    try:
        video = qa.open(path, **opening)
    except (PPLLaVAError, MemoryError) as error:
        yield from ((question, {"error": _one_line(error)}) for question in questions)
        return
    for question in questions:
        try:
            yield question, video.ask(question, **asking).as_dict()
        except BusyError:
            raise
        except (PPLLaVAError, MemoryError) as error:
            yield question, {"error": _one_line(error)}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _appending(path: Path) -> Iterator[tuple[IO[bytes], set[tuple[str, str]]]]:
    """The output, locked and opened at its end, and the (video, question) pairs in it. A last line that was cut off is removed."""
    try:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115  (closed below)
    except OSError as error:
        raise PPLLaVAError(f"can't write {path}: {error.strerror}") from None
    with file:
        _lock(file, path)
        pairs, end = set[tuple[str, str]](), 0
        with open(path, "rb") as there:
            for number, line in enumerate(there, 1):
                if not line.endswith(b"\n"):
                    break  # cut off by a crash
                try:
                    value = json.loads(line)
                    pairs.add((str(value["video"]), str(value["question"])))
                except (ValueError, KeyError, TypeError):
                    raise PPLLaVAError(
                        f"{path} line {number} is no answer of a batch; give another file with -o, or remove that line"
                    ) from None
                end += len(line)
        file.truncate(end)
        file.seek(end)
        yield file, pairs


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise PPLLaVAError(
            f"another run is writing to {path}; wait for it, or give another file with -o"
        ) from None


def _append(file: IO[bytes], value: dict[str, Any]) -> None:
    """One line, whole or not at all. Raises PPLLaVAError if the disk is full."""
    end = file.seek(0, os.SEEK_END)
    line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
    try:
        if file.write(line) != len(line):
            raise OSError(28, "No space left on device")
        os.fsync(file.fileno())
    except OSError as error:
        file.truncate(end)
        raise PPLLaVAError(
            f"can't write {file.name}: {error.strerror}; run it again to go on from here"
        ) from None
