"""Batches: the same questions about every video of a folder, answered into JSON Lines; resumable."""

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

VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".m4v"}
VIDEO_SUFFIXES |= {".wmv", ".flv", ".ogv", ".3gp", ".mxf", ".y4m", ".h264", ".hevc", ".apng"}
MAX_QUESTIONS = 10_000
MAX_QUESTION_BYTES = 4 << 20


@dataclass
class BatchResult:
    """Counts of (video, question) pairs.

    Attributes:
        answered: Answers written.
        failed: Errors written.
        skipped: Pairs already in the output.
    """

    answered: int = 0
    failed: int = 0
    skipped: int = 0


def videos_below(folder: str | os.PathLike[str]) -> list[Path]:
    """Find videos, images and animations below a folder.

    Returns:
        Their paths, sorted; hidden files and folders are left out.

    Raises:
        MediaError: If there are none.
    """
    root = Path(folder)
    if not root.is_dir():
        raise MediaError(f"{folder} is not a folder")
    suffixes = VIDEO_SUFFIXES | IMAGE_SUFFIXES

    def is_hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(root).parts)

    known = (path for path in root.rglob("*") if path.suffix.lower() in suffixes)
    videos = [path for path in known if not is_hidden(path) and path.is_file()]
    if not videos:
        raise MediaError(f"there are no videos below {folder} (known: {', '.join(sorted(suffixes))})")
    return sorted(videos, key=lambda path: path.relative_to(root).as_posix())


def read_questions(source: str) -> list[str]:
    """Read a file of questions.

    Args:
        source: A file with one question per line ("#" begins a comment); if there is no such file, a
            question.

    Returns:
        The questions, cleaned, without duplicates.

    Raises:
        MediaError: If the file can't be read, is too large, or holds no questions.
        PromptError: If a question can't be asked.
    """
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
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    questions = list(dict.fromkeys(map(clean_question, lines)))
    if not questions:
        raise MediaError(f"{source} holds no questions (one a line; lines that begin with # are comments)")
    if len(questions) > MAX_QUESTIONS:
        raise MediaError(
            f"{source} holds {len(questions)} questions, which is more than {MAX_QUESTIONS}; split the file"
        )
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
    """Ask every question about every video below a folder.

    Every (video, question) pair becomes a line of JSON, synced to disk before the next. A video or a question
    that fails becomes a line with "error". Pairs that have a line already are skipped, so a run that was
    killed can be resumed: no line is lost or written twice.

    Args:
        qa: The model.
        folder: The folder of videos.
        questions: The questions to ask.
        output: The JSON Lines file to append to.
        opening, asking: Arguments of VideoQA.open and Video.ask.
        progress: Called with (video, pairs done, pairs in all).

    Returns:
        How many pairs were answered, failed and skipped.

    Raises:
        MediaError: If there are no videos.
        PPLLaVAError: If the output contains other data, another run writes to it, or the disk is full.
        BusyError: If the engine's queue is full.
    """
    root, videos, result = Path(folder), videos_below(folder), BatchResult()
    total = len(videos) * len(questions)
    with _open_output(Path(output)) as (file, written):
        for path in videos:
            name = path.relative_to(root).as_posix()
            missing = [q for q in questions if (name, q) not in written]
            result.skipped += len(questions) - len(missing)
            for question, line in _answers(qa, path, missing, opening or {}, asking or {}):
                _append(file, {"video": name, "question": question, **line})
                if "error" in line:
                    result.failed += 1
                else:
                    result.answered += 1
                if progress:
                    progress(name, result.answered + result.failed + result.skipped, total)
    return result


def _answers(
    qa: VideoQA, path: Path, questions: Sequence[str], opening: dict[str, Any], asking: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The questions about one video, each with the content of its line: an answer or an error."""
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
def _open_output(path: Path) -> Iterator[tuple[IO[bytes], set[tuple[str, str]]]]:
    """Lock and open the output; remove a last line that was cut off.

    Yields:
        The file, at its end, and the (video, question) pairs in it.
    """
    try:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115  (closed below)
    except OSError as error:
        raise PPLLaVAError(f"can't write {path}: {error.strerror}") from None
    with file:
        _lock(file, path)
        pairs, end = _read_pairs(path)
        file.truncate(end)
        file.seek(end)
        yield file, pairs


def _read_pairs(path: Path) -> tuple[set[tuple[str, str]], int]:
    """The (video, question) pairs of an output, and where its last whole line ends, in bytes."""
    pairs = set[tuple[str, str]]()
    end = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break  # cut off by a crash
            try:
                value = json.loads(line)
                pairs.add((str(value["video"]), str(value["question"])))
            except (ValueError, KeyError, TypeError):
                raise PPLLaVAError(
                    f"{path} line {number} is not a batch answer; choose another output, or remove that line"
                ) from None
            end += len(line)
    return pairs, end


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise PPLLaVAError(
            f"another run is writing to {path}; wait for it, or choose another output"
        ) from None


def _append(file: IO[bytes], value: dict[str, Any]) -> None:
    """Append a line and sync it to disk; undo a partial write and raise PPLLaVAError if the disk is full."""
    end = file.seek(0, os.SEEK_END)
    line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
    try:
        if file.write(line) != len(line):
            raise OSError(28, "No space left on device")
        os.fsync(file.fileno())
    except OSError as error:
        file.truncate(end)
        raise PPLLaVAError(f"can't write {file.name}: {error.strerror}; run it again to resume") from None
