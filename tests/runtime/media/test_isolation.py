"""Decoding in a child process: the same frames, and every death or lie of the child is a MediaError."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.encoded_clips import KINDS, Clips, encode_clip
from ppllava_edge.engines.errors import EngineError, MediaError
from ppllava_edge.runtime.media.isolation import interpreter, open_source, reader
from ppllava_edge.runtime.media.isolation.reader import IsolatedReader
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS, MediaLimits
from ppllava_edge.runtime.media.readers import FrameReader, open_reader
from ppllava_edge.runtime.vision.frame_choice import choose_frames

Children = Callable[[], set[int]]
Choice = Callable[[FrameReader], Sequence[int]]


def open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_is_left(child_processes: Children) -> Iterator[None]:
    """No test leaves a process or an open file."""
    processes, files = child_processes(), open_files()
    yield
    gc.collect()
    assert child_processes() <= processes
    assert len(open_files()) <= len(files)


def every(step: int) -> Choice:
    return lambda r: range(0, r.count, step)


def uniform(frames: int) -> Choice:
    return lambda r: choose_frames(r, frames, None, None)


def assert_same(source: Path, choice: Choice, limits: MediaLimits = DEFAULT_LIMITS) -> IsolatedReader:
    """Check that a source gives the same in a child process as in this one."""
    expected, found = open_reader(source, limits), IsolatedReader(source, limits)
    for name in ("what", "kind", "takes_all", "count", "fps", "duration"):
        assert getattr(found, name) == getattr(expected, name), name
    pairs = list(zip(found.frames(choice), expected.frames(choice), strict=True))
    assert pairs
    for ours, theirs in pairs:
        assert (ours.number, ours.seconds) == (theirs.number, theirs.seconds)
        np.testing.assert_array_equal(ours.image, theirs.image)
    for name in ("indices", "notes", "count", "fps", "duration"):
        assert getattr(found, name) == getattr(expected, name), name
    return found


# -- the same frames -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_video_gives_the_same_frames(clips: Clips, kind: str) -> None:
    assert_same(clips.path(kind), uniform(16))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", [every(1), every(37), lambda r: [r.count - 1], uniform(200)])
def test_every_choice_gives_the_same_frames(clips: Clips, kind: str, choice: Choice) -> None:
    assert_same(clips.path(kind), choice)


def test_damaged_videos_give_the_same_frames_and_notes(tmp_path: Path) -> None:
    options = {"g": "24", "bf": "2"}
    front = encode_clip(tmp_path / "front.mp4", "libx264", options, {"movflags": "faststart"})
    data = front.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * 0.6)])
    assert assert_same(tmp_path / "cut.mp4", uniform(16)).notes
    zeros = tmp_path / "zeros.mp4"  # packets without frames: the choice is asked for again
    zeros.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    counts = list[int]()

    def choice(r: FrameReader) -> Sequence[int]:
        counts.append(r.count)
        return choose_frames(r, 16, None, None)

    assert assert_same(zeros, choice).notes
    assert len(counts) > 2 and len(set(counts)) == 2
    other_stream = {"mpegts_start_pid": "0x200", "mpegts_pmt_start_pid": "0x1100"}
    joined = tmp_path / "joined.ts"
    second = encode_clip(tmp_path / "second.ts", "libx264", options, other_stream)
    joined.write_bytes(
        encode_clip(tmp_path / "first.ts", "libx264", options).read_bytes() + second.read_bytes()
    )
    assert assert_same(joined, uniform(6)).notes


def test_images_animations_and_folders_give_the_same(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((20, 30, 3), 40 * i, np.uint8)) for i in range(5)]
    frames[1].save(tmp_path / "image.png")
    assert assert_same(tmp_path / "image.png", lambda r: [0]).kind == "image"
    frames[0].save(tmp_path / "loop.gif", save_all=True, append_images=frames[1:], duration=200)
    assert assert_same(tmp_path / "loop.gif", every(1)).count == 5
    folder = tmp_path / "folder of images"
    folder.mkdir()
    for i, frame in enumerate(frames):
        frame.save(folder / f"{i}.jpg")
    assert "the folder" in assert_same(folder, every(2)).what


def test_reading_again_starts_another_process(video_file: Path) -> None:
    source = assert_same(video_file, uniform(4))
    (again,) = source.frames(lambda r: [3])
    (expected,) = open_reader(video_file).frames(lambda r: [3])
    np.testing.assert_array_equal(again.image, expected.image)


@pytest.mark.parametrize("name", ["a b'\"\n.mp4", "ü—名.mp4", os.fsdecode(b"\xff\xfe.mp4")])
def test_any_name_reaches_the_process(video_file: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    try:
        path.write_bytes(video_file.read_bytes())
    except OSError:
        pytest.skip("this file system refuses the name")
    assert len(list(IsolatedReader(path, DEFAULT_LIMITS).frames(uniform(4)))) == 4


def test_errors_are_the_readers_own(tmp_path: Path) -> None:
    for name, data in (("none.mp4", None), ("empty.mp4", b""), ("text.mp4", b"no video" * 100)):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(MediaError) as expected:
            open_reader(path)
        with pytest.raises(MediaError) as found:
            IsolatedReader(path, DEFAULT_LIMITS)
        assert str(found.value) == str(expected.value)


def test_limits_hold_in_the_process(video_file: Path) -> None:
    limits = dataclasses.replace(DEFAULT_LIMITS, max_side=32)
    with pytest.raises(MediaError, match="too large"):
        IsolatedReader(video_file, limits)


def test_an_error_of_the_choice_is_raised_as_it_is(video_file: Path) -> None:
    def choice(reader: FrameReader) -> list[int]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(IsolatedReader(video_file, DEFAULT_LIMITS).frames(choice))


# -- its end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign, words", [(signal.SIGKILL, "out of memory"), (signal.SIGSEGV, "SIGSEGV")])
def test_a_process_killed_while_it_decodes(
    child_processes: Children, clips: Clips, sign: int, words: str
) -> None:
    before = child_processes()
    frames = IsolatedReader(clips.path("mpeg-4 in avi"), DEFAULT_LIMITS).frames(every(1))
    next(frames)
    (pid,) = child_processes() - before
    os.kill(pid, sign)
    with pytest.raises(MediaError, match=words) as error:
        list(frames)
    assert "\n" not in str(error.value)


def test_closing_early_and_abandoning_end_the_process(child_processes: Children, clips: Clips) -> None:
    before = child_processes()
    source = IsolatedReader(clips.path("mpeg-4 in avi"), DEFAULT_LIMITS)
    frames = source.frames(every(1))
    next(frames)
    frames.close()  # type: ignore[attr-defined]
    assert child_processes() == before
    unread = IsolatedReader(clips.path("mpeg-4 in avi"), DEFAULT_LIMITS)
    assert child_processes() != before
    del unread
    gc.collect()
    assert child_processes() == before


def test_the_memory_limit_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.fromarray(np.zeros((5000, 5000, 3), np.uint8)).save(path, compress_level=1)
    limits = dataclasses.replace(DEFAULT_LIMITS, memory=300 * 10**6)
    with pytest.raises(MediaError, match="memory"):
        list(IsolatedReader(path, limits).frames(every(1)))
    assert len(list(IsolatedReader(path, DEFAULT_LIMITS).frames(every(1)))) == 1
    tiny = dataclasses.replace(DEFAULT_LIMITS, memory=10**6)
    with pytest.raises(MediaError, match="is too small: a decoding process needs"):
        IsolatedReader(path, tiny)


def test_a_video_that_needs_more_memory_is_not_called_damaged(tmp_path: Path) -> None:
    frames = np.zeros((3, 2176, 4096, 3), np.uint8)
    path = encode_clip(tmp_path / "large.mp4", "mpeg4", {}, frames=frames)
    refused = 0
    for megabytes in (310, 350, 390, 430):
        limits = dataclasses.replace(DEFAULT_LIMITS, memory=megabytes * 10**6)
        try:
            source = IsolatedReader(path, limits)
            numbers = [frame.number for frame in source.frames(every(1))]
        except MediaError as error:
            assert "memory" in str(error) and "damaged" not in str(error)
            refused += 1
        else:
            assert numbers == [0, 1, 2] and not source.notes
    assert refused


def test_ten_at_once(clips: Clips) -> None:
    path = clips.path("h264 with B-frames")
    expected = {frame.number: frame.image for frame in open_reader(path).frames(every(10))}

    def read(_: int) -> None:
        found = {f.number: f.image for f in IsolatedReader(path, DEFAULT_LIMITS).frames(every(10))}
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[i], expected[i]) for i in found)

    with ThreadPoolExecutor(10) as threads:
        list(threads.map(read, range(10)))


def test_the_opening_thread_may_end_before_the_frames_are_read(video_file: Path) -> None:
    """Linux sends "the parent died" when the thread ends that started the child."""
    opened: list[IsolatedReader] = []
    thread = threading.Thread(target=lambda: opened.append(IsolatedReader(video_file, DEFAULT_LIMITS)))
    thread.start()
    thread.join()
    time.sleep(0.3)
    assert len(list(opened.pop().frames(uniform(4)))) == 4


@pytest.mark.parametrize("state", ["waiting", "sending", "stopped"])
def test_the_process_ends_with_its_parent(clips: Clips, state: str) -> None:
    """The parent is killed while the child waits for it, can't go on sending, or can't notice anything."""
    code = (
        "import os, signal, sys, time\n"
        "from ppllava_edge.runtime.media.isolation.reader import IsolatedReader\n"
        "from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS\n"
        f"r = IsolatedReader({str(clips.path('mpeg-4 in avi'))!r}, DEFAULT_LIMITS)\n"
        "pid = r._opened.pid\n"
        f"frames = r.frames(lambda r: range(r.count)); {state!r} == 'waiting' or next(frames)\n"
        f"{state!r} == 'stopped' and os.kill(pid, signal.SIGSTOP)\n"
        "print(pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        try:
            letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if letter == "Z":  # its new parent reaps it
            return
        time.sleep(0.1)
    pytest.fail("the decoding process outlived its parent")


@pytest.mark.parametrize(
    "setup",
    [
        "os.close(0); os.close(1)",  # a daemon
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",  # the system reaps children
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
        "os.chdir(tempfile.mkdtemp()); os.rmdir(os.getcwd())",
        "os.environ.clear(); sys.path.insert(0, '')",
        "threading.stack_size(2**16)",
    ],
)
def test_it_works_in_odd_apps(video_file: Path, setup: str) -> None:
    code = (
        "import os, signal, sys, tempfile, threading\n"
        f"{setup}\n"
        "from ppllava_edge.runtime.media.isolation.reader import IsolatedReader\n"
        "from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS\n"
        f"for _ in range(2): r = IsolatedReader({str(video_file)!r}, DEFAULT_LIMITS)\n"
        "assert len(list(r.frames(lambda r: [0, 5]))) == 2\n"
    )
    run = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=120)
    assert run.returncode == 0 and not run.stderr, run.stderr


def test_without_free_descriptors_it_is_an_error(video_file: Path) -> None:
    code = (
        "import resource, sys\n"
        "from ppllava_edge import MediaError\n"
        "from ppllava_edge.runtime.media.isolation.reader import IsolatedReader\n"
        "from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS\n"
        "for free in range(6):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (3 + free, 4096))\n"
        "    try:\n"
        f"        IsolatedReader({str(video_file)!r}, DEFAULT_LIMITS)\n"
        "    except MediaError as error:\n"
        "        print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and not run.stderr, run.stderr
    assert "can't be started" in run.stdout and "Too many open files" in run.stdout


# -- what the process may do ---------------------------------------------------------------------------------


def test_the_process_is_confined(video_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_APP", "1")
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    limits = dataclasses.replace(DEFAULT_LIMITS, decode_seconds=20)
    source = IsolatedReader(video_file, limits)
    try:
        assert source._opened is not None
        folder = Path(f"/proc/{source._opened.pid}")
        values = {line[:25].strip(): line[25:].split()[:2] for line in (folder / "limits").open()}
        assert values["Max address space"] == [str(limits.memory)] * 2
        assert values["Max core file size"] == values["Max file size"] == ["0", "0"]
        assert values["Max open files"] == ["64", "64"]
        assert values["Max cpu time"][0] == str(40 * (os.cpu_count() or 1) + 10)
        assert (folder / "oom_score_adj").read_text().strip() == "1000"
        assert "NoNewPrivs:\t1" in (folder / "status").read_text()
        assert b"SECRET_OF_THE_APP" not in (folder / "environ").read_bytes()
        targets = [os.readlink(entry) for entry in (folder / "fd").iterdir()]
        assert sum(target.startswith("socket:") for target in targets) == 1
        assert not any(target.startswith("pipe:") for target in targets)
        assert os.getsid(source._opened.pid) != os.getsid(0)
    finally:
        os.close(read_end)
        os.close(write_end)


# -- starting it ---------------------------------------------------------------------------------------------


def test_a_worker_that_cannot_be_imported_says_so(video_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "WORKER", "no_such_module")
    with pytest.raises(MediaError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        IsolatedReader(video_file, DEFAULT_LIMITS)


def test_the_python_of_an_app_without_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An app that embeds or freezes Python must not be started in its place."""
    own = sys.executable
    app = tmp_path / "camera-app"
    app.write_text("#!/bin/sh\nexit 1\n")
    app.chmod(0o755)
    for executable in (str(app), ""):
        monkeypatch.setattr(sys, "executable", executable)
        multiprocessing.set_executable(executable)
        try:
            assert Path(interpreter.find_python()).name.startswith("python")
            with monkeypatch.context() as nowhere:
                nowhere.setattr(sys, "exec_prefix", str(tmp_path))
                nowhere.setattr(sys, "base_exec_prefix", str(tmp_path))
                with pytest.raises(EngineError, match="multiprocessing"):
                    interpreter.find_python()
            multiprocessing.set_executable(own)  # the app names one
            assert interpreter.find_python() == own
        finally:
            multiprocessing.set_executable(own)


def test_relative_entries_of_the_import_path_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder may hold foreign files."""
    monkeypatch.setattr(sys, "path", ["", "modules", *sys.path])
    assert all(os.path.isabs(entry) for entry in interpreter._import_path())


def test_a_time_limit_beyond_all_processor_time(clips: Clips) -> None:
    open_source(clips.path("mpeg-2"), MediaLimits(decode_seconds=1e300), isolate=True)
