"""Names of sources: odd ones work, and only regular files are ever opened."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.commands import frame_number
from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.live.source import LiveSource
from ppllava_edge.runtime.media.opening.paths import display_name, open_regular, source_name
from ppllava_edge.runtime.media.pictures import natural_order
from ppllava_edge.runtime.media.readers import open_reader
from ppllava_edge.runtime.vision.frame_choice import read_frames

ODD_NAMES = [
    "cam:1.mp4",
    "http:clip.mp4",
    "100%d.mp4",
    "frame%03d.mp4",
    "what?.mp4",
    "a*b[c].mp4",
    "-i.mp4",
    "two\nlines.mp4",
    "  spaces  ",
    "concat:a|b.mp4",
    "pipe:0",
    "ça va — 映像.mp4",
    os.fsdecode(b"not \xff utf-8.mp4"),
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_only_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video_file: Path, name: str
) -> None:
    shutil.copy(video_file, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for source in (name, os.fsencode(name), Path(name)):
        assert [frame_number(image) for image in read_frames(source, 2).images] == [5, 17]
    live = LiveSource(name, lambda t: True, lambda image, t: None, realtime=False)
    live.read(threading.Event(), lambda: None)
    assert live.seen == 24


@pytest.mark.parametrize("name", ODD_NAMES)
def test_errors_about_odd_names_are_one_printable_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no video at all" * 99)
    with pytest.raises(MediaError) as caught:
        open_reader(tmp_path / name)
    assert str(caught.value).isprintable() and str(caught.value).encode()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "empty"),
        (b"", "empty"),
        ("a\0b.mp4", "null"),
        ("x" * 5000, "can't be opened"),
        (None, "not NoneType"),
        (42, "not int"),
        (object(), "not object"),
    ],
)
def test_what_is_no_name(source: object, words: str) -> None:
    with pytest.raises(MediaError, match=words) as caught:
        open_reader(source)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 500
    with pytest.raises(MediaError, match=words):
        source_name(source)
        open_reader(source)  # type: ignore[arg-type]


def test_a_pipe_is_refused_without_being_opened(tmp_path: Path) -> None:
    """Opening it would wait until somebody writes."""
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "pipe.mp4")
    for name in ("pipe.mp4", "link.mp4"):
        with pytest.raises(MediaError, match="is a named pipe, not a regular file"):
            open_reader(tmp_path / name)
        with pytest.raises(MediaError, match="is a named pipe, not a regular file"):
            LiveSource(tmp_path / name, lambda t: True, lambda image, t: None)


def test_devices_and_sockets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.mp4")
        (tmp_path / "zero.mp4").symlink_to("/dev/zero")
        for name, kind in (("socket.mp4", "a socket"), ("zero.mp4", "a device"), ("/dev/zero", "a device")):
            with pytest.raises(MediaError, match=kind):
                open_reader(name)
            with pytest.raises(MediaError, match=kind):
                LiveSource(name, lambda t: True, lambda image, t: None)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs /proc")
def test_files_of_the_kernel_hold_no_video() -> None:
    for name in ("/proc/self/mem", "/proc/self/environ", "/proc/self/fd"):
        with pytest.raises(MediaError):
            open_reader(name)


def test_a_file_that_becomes_a_pipe_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pipe = tmp_path / "file.mp4", tmp_path / "pipe"
    path.write_bytes(b"x")
    os.mkfifo(pipe)
    real_open = os.open

    def swapped(name: str, *arguments: int) -> int:
        os.replace(pipe, path)
        return real_open(name, *arguments)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(MediaError, match="named pipe"), open_regular(path):
        pass


def test_links(tmp_path: Path, video_file: Path) -> None:
    (tmp_path / "link.mp4").symlink_to(video_file)
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "nowhere.mp4").symlink_to(tmp_path / "missing")
    assert len(read_frames(tmp_path / "link.mp4", 2).images) == 2
    with pytest.raises(MediaError, match="can't be opened"):
        open_reader(tmp_path / "loop.mp4")
    with pytest.raises(MediaError, match="no such file"):
        open_reader(tmp_path / "nowhere.mp4")


def test_a_folder_with_pipes_and_links_among_its_images(tmp_path: Path, moving_frames: np.ndarray) -> None:
    Image.fromarray(moving_frames[3]).save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.png")
    (tmp_path / "3.png").symlink_to("/dev/zero")
    (tmp_path / "4.png").symlink_to(tmp_path)
    (tmp_path / "5.png").symlink_to(tmp_path / "missing")
    (tmp_path / "6.png").symlink_to(tmp_path / "1.png")
    found = read_frames(tmp_path, 2)
    assert found.count == 2 and [frame_number(image) for image in found.images] == [3, 3]


def test_numbers_in_names_are_sorted_as_numbers(tmp_path: Path, moving_frames: np.ndarray) -> None:
    for i, name in enumerate(["a1.png", "a2.png", "a10.png"]):
        Image.fromarray(moving_frames[i]).save(tmp_path / name)
    Image.fromarray(moving_frames[9]).save(tmp_path / "1²2.png")  # isdigit() is true of ², int() refuses it
    frames = open_reader(tmp_path).frames(lambda reader: range(reader.count))
    assert [frame_number(frame.image) for frame in frames] == [9, 0, 1, 2]
    names = ["x٣.png", "x2.png", "².png", "²3.png", "12", "-1", "", os.fsdecode(b"\xff1.png"), "9" * 200]
    assert sorted(names, key=natural_order) == sorted(sorted(names), key=natural_order)


def test_names_in_messages_are_short_and_printable() -> None:
    assert display_name("a\nb\x1b[31m\udcff—é.mp4") == r"a\nb\x1b[31m\udcff—é.mp4"
    assert len(display_name("x" * 10_000)) < 400


def test_a_camera_that_is_not_plugged_in_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "cam").symlink_to("/dev/video99")
    for name in ("/dev/video99", "/dev/v4l/by-id/usb-none", tmp_path / "cam"):
        source = LiveSource(name, lambda t: True, lambda image, t: None)
        assert not source.is_file and source.format == "v4l2"


@pytest.mark.parametrize("address", ["http://127.0.0.1/x.mp4", "rtsp://user:secret@camera/1", "udp://@:1234"])
def test_an_address_opened_as_a_file_is_referred_to_a_live_view(address: str) -> None:
    with pytest.raises(MediaError, match=r"no such file.*--live"):
        open_reader(address)


def test_half_a_surrogate_pair_is_no_name() -> None:
    with pytest.raises(MediaError, match=r"^\\ud800.mp4: half a surrogate pair"):
        source_name("\ud800.mp4")


@pytest.mark.parametrize(
    "address", [" rtsp://me:secret@host/x", "live: http://me:secret@host", "rtsp:/me:secret@h"]
)
def test_no_message_shows_a_password(address: str) -> None:
    assert "***@h" in display_name(address) and "secret" not in display_name(address)
