"""Batches: the same questions about every video of a folder, answered into JSON Lines; resumable."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ppllava_edge.engines.errors import BusyError, MediaError, PPLLaVAError
from ppllava_edge.engines.staging import sync_folder
from ppllava_edge.runtime.language.text_processor import clean_question
from ppllava_edge.runtime.media.pictures import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from ppllava_edge.runtime.video_qa import VideoQA

VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".m4v"}
VIDEO_SUFFIXES |= {".wmv", ".flv", ".ogv", ".3gp", ".mxf", ".y4m", ".h264", ".hevc", ".apng"}
MAX_QUESTIONS = 10_000
MAX_QUESTION_BYTES = 4 << 20
QUESTION_SUFFIXES = (".txt", ".text", ".lst", ".md", ".csv", ".tsv", ".json", ".jsonl")
MAX_LINE_BYTES = 64 << 20  # of an output; a longer line isn't an answer
Pair = tuple[str, str]  # a video's name, relative to the folder, and a question
_STRING = re.compile(rb'(?:[^"\\\x00-\x1f]|\\.)*')  # what stands between the quotes of a JSON string
_SURROGATES = re.compile("[\ud800-\udfff]")  # how Python shows bytes of a file name that aren't UTF-8


@dataclass
class BatchResult:
    """Counts of (video, question) pairs.

    Attributes:
        answered: Answers written.
        failed: Errors written.
        skipped: Pairs already in the output.
        failed_before: Those of the skipped pairs whose line is an error.
    """

    answered: int = 0
    failed: int = 0
    skipped: int = 0
    failed_before: int = 0


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
        MediaError: If the file can't be read, is too large, or holds no questions; or if `source` looks like
            a file's name and there is no such file.
        PromptError: If a question can't be asked.
    """
    try:
        if not os.path.exists(source):
            if _looks_like_file(source):
                raise MediaError(f"no such file of questions: {source}")
            return [clean_question(source)]
        with open(source, "rb") as file:  # perhaps a pipe, as in `<(grep …)`
            data = file.read(MAX_QUESTION_BYTES + 1)
        if len(data) > MAX_QUESTION_BYTES:
            raise MediaError(
                f"{source} is too large for a file of questions (more than {MAX_QUESTION_BYTES} bytes)"
            )
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise MediaError(f"{source} is not a text file of questions, one a line") from None
    except OSError as error:
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


def _looks_like_file(text: str) -> bool:
    """Whether a text is a file's name rather than a question: by its ending, or one word with a separator."""
    text = text.strip()
    return text.lower().endswith(QUESTION_SUFFIXES) or (os.sep in text and not re.search(r"[\s?]", text))


def run_batch(
    qa: VideoQA,
    folder: str | os.PathLike[str],
    questions: Sequence[str],
    output: str | os.PathLike[str],
    opening: dict[str, Any] | None = None,
    asking: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    retry: bool = False,
) -> BatchResult:
    """Ask every question about every video below a folder.

    Every (video, question) pair becomes a line of JSON, synced to disk before the next. A video or a question
    that fails becomes a line with "error". Pairs that have a line already are skipped, so a run that was
    killed can be resumed: no line is lost or written twice. A file name that isn't UTF-8 is written with
    \\x escapes, and its bytes in hex as "video_bytes".

    Args:
        qa: The model.
        folder: The folder of videos.
        questions: The questions to ask, without outer white space and duplicates.
        output: The JSON Lines file to append to.
        opening, asking: Arguments of VideoQA.open and Video.ask.
        progress: Called with (video, pairs done, pairs in all).
        retry: Ask again where the last line of a pair is an error. The new line is appended: a pair's last
            line counts.

    Returns:
        How many pairs were answered, failed and skipped.

    Raises:
        MediaError: If there are no videos.
        PromptError: If a question is empty.
        PPLLaVAError: If the output isn't a regular file, contains other data (nothing is changed then) or is
            written by another run, or the disk is full.
        BusyError: If the engine's queue is full.
    """
    root, videos, result = Path(folder), videos_below(folder), BatchResult()
    # Cleaned as the answers' lines have them: a resumed run compares them.
    questions = list(
        dict.fromkeys(map(clean_question, [questions] if isinstance(questions, str) else questions))
    )
    total = len(videos) * len(questions)
    with _open_output(Path(output)) as (file, written):
        for path in videos:
            name = path.relative_to(root).as_posix()
            failed = [q for q in questions if written.get((name, q))]
            missing = [q for q in questions if (name, q) not in written or (retry and q in failed)]
            result.skipped += len(questions) - len(missing)
            result.failed_before += 0 if retry else len(failed)
            for question, line in _answers(qa, path, missing, opening or {}, asking or {}):
                _append(file, _line(name, question, line))
                if "error" in line:
                    result.failed += 1
                else:
                    result.answered += 1
                if progress:
                    progress(_printable(name), result.answered + result.failed + result.skipped, total)
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
    return _printable(" ".join(str(error).split())) or type(error).__name__


@contextmanager
def _open_output(path: Path) -> Iterator[tuple[IO[bytes], dict[Pair, bool]]]:
    """Lock and open the output; remove a last line that a crash cut off.

    Yields:
        The file, at its end, and what `_read_lines` found in it.
    """
    try:
        if path.exists() and not path.is_file():  # opening a FIFO would block, and a device may act
            raise PPLLaVAError(f"{path} is not a regular file; answers are appended to one")
        is_new = not path.exists()
        file = open(path, "a+b", buffering=0)  # noqa: SIM115  (closed below)
        if is_new:
            sync_folder(path.parent)
    except OSError as error:
        raise PPLLaVAError(f"can't write {path}: {error.strerror}") from None
    with file:
        _lock(file, path)
        try:
            pairs, end = _read_lines(path)
            file.truncate(end)
        except OSError as error:
            raise PPLLaVAError(f"can't write {path}: {error.strerror}") from None
        file.seek(end)
        yield file, pairs


def _read_lines(path: Path) -> tuple[dict[Pair, bool], int]:
    """Read an output.

    Returns:
        Every (video, question) pair in it, with whether its last line is an error; and where the last whole
        line ends, in bytes.

    Raises:
        PPLLaVAError: If there is anything in the file that this command didn't write.
    """
    pairs: dict[Pair, bool] = {}
    end = number = 0
    with open(path, "rb") as lines:
        while line := lines.readline(MAX_LINE_BYTES):
            number += 1
            if not line.endswith(b"\n"):
                # Removed, so it must be a line of this command that a crash cut off, not somebody's text.
                # After a power cut, some file systems leave zeros where the data was still missing.
                if len(line) == MAX_LINE_BYTES or not _is_cut_line(line.rstrip(b"\0") if end else line):
                    raise _foreign_line(path, number)
                break
            pair, failed = _parse_line(line)
            if pair is None:
                raise _foreign_line(path, number)
            pairs[pair] = failed
            end += len(line)
    return pairs, end


def _foreign_line(path: Path, number: int) -> PPLLaVAError:
    return PPLLaVAError(
        f"{path} line {number} is not a batch answer; choose another output, or remove that line"
    )


def _is_cut_line(data: bytes) -> bool:
    """Whether this is what a crash can leave of a line: the beginning of one, of any length."""
    for before in (b'{"video": "', b', "question": "'):
        if not data.startswith(before):
            return before.startswith(data)
        match = _STRING.match(data, len(before))
        end = match.end() if match else len(before)
        if data[end : end + 1] != b'"':
            return data[end:] in (b"", b"\\")  # cut off inside the string
        data = data[end + 1 :]
    return any(data.startswith(key) or key.startswith(data) for key in (b', "text": ', b', "error": '))


def _parse_line(line: bytes) -> tuple[Pair | None, bool]:
    """The (video, question) pair of an output's line, None if it is no such line, and whether it failed."""
    try:
        value = json.loads(line)
        name, question = value["video"], value["question"]
        if "video_bytes" in value:
            name = os.fsdecode(bytes.fromhex(value["video_bytes"]))
        is_ours = (
            isinstance(name, str) and isinstance(question, str) and ("error" in value or "text" in value)
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, False
    return ((name, question), "error" in value) if is_ours else (None, False)


def _line(name: str, question: str, content: dict[str, Any]) -> dict[str, Any]:
    """A line's contents. A file name that isn't UTF-8 is shown with \\x escapes, and kept as it is in hex."""
    value: dict[str, Any] = {"video": _printable(name), "question": question, **content}
    if value["video"] != name:
        value["video_bytes"] = os.fsencode(name).hex()
    return value


def _printable(text: str) -> str:
    """Text with the bytes of a file name that aren't UTF-8 written as \\x escapes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace") if _SURROGATES.search(text) else text


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
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):  # the next run removes what can't be removed now
            file.truncate(end)
        raise PPLLaVAError(f"can't write {file.name}: {error.strerror}; run it again to resume") from None
