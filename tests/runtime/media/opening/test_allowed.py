"""Files that name other files or addresses: they are refused, and what they name is never opened."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import pytest

from helpers.encoded_clips import COUNT, encode_clip
from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.live.source import LiveSource
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS
from ppllava_edge.runtime.media.opening.allowed import address_options
from ppllava_edge.runtime.vision.frame_choice import read_frames

IN_OPEN = 0x20  # inotify


class Watched:
    """A copy of a video that nobody may open."""

    def __init__(self, path: Path):
        self.path = path
        libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self._inotify, bytes(path), IN_OPEN) >= 0

    def close(self) -> None:
        """End the watch."""
        os.close(self._inotify)

    @property
    def opened(self) -> bool:
        """Whether anybody opened it since the last look."""
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(self._inotify, 4096))
        return False


@pytest.fixture
def canary(tmp_path: Path, video_file: Path) -> Iterator[Watched]:
    """A video whose opening is noticed."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs inotify")
    (tmp_path / "elsewhere").mkdir()
    canary = Watched(Path(shutil.copy(video_file, tmp_path / "elsewhere/canary.mp4")))
    canary.path.read_bytes()
    assert canary.opened and not canary.opened  # the watch works
    yield canary
    canary.close()


def _ffconcat(target: Path) -> str:
    return f"ffconcat version 1.0\nfile '{target}'\n"


def _playlist(target: Path) -> str:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n"


def _playlist_by_url(target: Path) -> str:
    return _playlist(Path(f"file:{target}"))


def _dash(target: Path) -> str:
    return f"""<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"
 mediaPresentationDuration="PT2S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1"
 bandwidth="1000"><BaseURL>file:{target}</BaseURL></Representation></AdaptationSet></Period></MPD>"""


def _session_description(target: Path) -> str:
    return "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 45454 RTP/AVP 96\n"


@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "txt"])
@pytest.mark.parametrize("text", [_ffconcat, _playlist, _playlist_by_url, _dash, _session_description])
def test_a_text_that_names_a_video_opens_nothing(
    tmp_path: Path, canary: Watched, text: Callable[[Path], str], suffix: str
) -> None:
    path = tmp_path / f"list.{suffix}"
    for target in (canary.path, Path("elsewhere/canary.mp4")):
        path.write_text(text(target))
        with pytest.raises(MediaError, match="not a video that can be read"):
            read_frames(path, 4)
        assert not canary.opened


def test_a_playlist_given_as_a_live_file_opens_nothing(tmp_path: Path, canary: Watched) -> None:
    (tmp_path / "list.mp4").write_text(_ffconcat(canary.path))
    source = LiveSource(tmp_path / "list.mp4", lambda t: True, lambda image, t: None)
    with pytest.raises(MediaError, match="not a video"):
        source.read(threading.Event(), lambda: None)
    assert not canary.opened


@pytest.mark.parametrize(
    "name",
    [
        "concat:{0}|{0}",
        "subfile,,start,0,end,100000,,:{0}",
        "file:{0}",
        "crypto:{0}",
        "cache:{0}",
        "async:{0}",
        "movie={0}",
        "testsrc=size=64x64:rate=5",
        "pipe:0",
        "fd:0",
        "data:video/mp4;base64,AAAA",
        "file://{0}",
        "concat://{0}",
        "unix://{0}",
    ],
)
def test_names_with_a_meaning_to_ffmpeg_are_only_names(canary: Watched, name: str) -> None:
    name = name.format(canary.path)
    with pytest.raises(MediaError, match="no such file"):
        read_frames(name, 4)
    with pytest.raises(MediaError, match=r"no such file|addresses|by its path"):
        LiveSource(name, lambda t: True, lambda image, t: None)
    assert not canary.opened


def _grown(data: bytes, boxes: list[int], at: int, old: bytes, new: bytes) -> bytes:
    """Replace bytes of an MP4 file and correct the sizes of the boxes around them."""
    changed = bytearray(data)
    for box in boxes:
        size = struct.unpack_from(">I", changed, box)[0]
        struct.pack_into(">I", changed, box, size + len(new) - len(old))
    changed[at : at + len(old)] = new
    return bytes(changed)


def _external_reference(data: bytes, target: Path) -> bytes:
    """An MP4 file whose video track is in another file: a Macintosh alias with an absolute path."""
    boxes = [data.index(kind) - 4 for kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref")]
    entry = boxes[-1] + 16  # behind the dref box's size, type, version and count
    old = data[entry : entry + struct.unpack_from(">I", data, entry)[0]]
    name = str(target).encode()
    alias = bytes(10) + b"\x01v".ljust(28, b"\0") + bytes(12) + b"\x06canary".ljust(64, b"\0")
    alias += bytes(16) + bytes(4 + 16)
    alias += struct.pack(">HH", 2, len(name)) + name + b"\0" * (len(name) % 2) + struct.pack(">HH", 0xFFFF, 0)
    body = b"alis" + bytes(4) + alias
    return _grown(data, boxes, entry, old, struct.pack(">I", len(body) + 4) + body)


def test_a_video_whose_frames_are_in_another_file(tmp_path: Path, canary: Watched, video_file: Path) -> None:
    data = _external_reference(video_file.read_bytes(), canary.path)
    path = tmp_path / "reference.mp4"
    path.write_bytes(data)
    with av.open(str(path), options={"enable_drefs": "1", "use_absolute_path": "1"}) as container:
        list(container.demux())
    assert canary.opened  # the file does refer to it
    with contextlib.suppress(MediaError):
        read_frames(path, 4)
    assert not canary.opened


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serves tmp_path/www over HTTP on loopback; the address of that folder."""
    (tmp_path / "www").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    handler = partial(Quiet, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def _frames_of(address: str) -> int:
    """How many frames a live source delivers until it ends."""
    source = LiveSource(address, lambda t: True, lambda image, t: None, timeout=5)
    with contextlib.suppress(MediaError):
        source.read(threading.Event(), lambda: None)
    return source.seen


@pytest.mark.parametrize("text", [_playlist, _playlist_by_url, _ffconcat, _dash])
@pytest.mark.parametrize("name", ["list.m3u8", "video.mp4"])
def test_a_playlist_from_the_network_opens_no_file(
    tmp_path: Path, canary: Watched, server: str, text: Callable[[Path], str], name: str
) -> None:
    (tmp_path / "www" / name).write_text(text(canary.path))
    assert _frames_of(f"{server}/{name}") == 0
    assert not canary.opened


def test_playlists_are_read_if_the_address_asks_for_one(tmp_path: Path, server: str) -> None:
    encode_clip(tmp_path / "www/part.ts", "libx264", {"g": "24"})
    for name in ("list.m3u8", "hidden.ts"):
        (tmp_path / "www" / name).write_text(_playlist(Path("part.ts")))
    assert _frames_of(f"{server}/list.m3u8") > COUNT / 2
    assert _frames_of(f"{server}/hidden.ts") == 0
    assert _frames_of(f"{server}/part.ts") > COUNT / 2
    source = LiveSource(f"{server}/hidden.ts?as=.m3u8", lambda t: True, lambda image, t: None, timeout=5)
    with pytest.raises(MediaError, match=r"a playlist's must end in \.m3u8"):
        source.read(threading.Event(), lambda: None)


def test_no_scheme_lets_a_stream_open_files() -> None:
    for scheme in ("rtsp", "rtsps", "http", "https", "udp", "tcp", "srt", "rtp", "rtmp", "rtmps"):
        for address in (f"{scheme}://host/live", f"{scheme}://host/list.m3u8?a=b"):
            allowed = address_options(address, DEFAULT_LIMITS)
            protocols = set(allowed["protocol_whitelist"].split(","))
            assert not protocols & {"file", "fd", "pipe", "concat", "subfile", "data", "cache", "async"}
            playlists = set(allowed["format_whitelist"].split(",")) & {"hls", "concat", "dash", "image2"}
            assert playlists == ({"hls"} if scheme.startswith("http") and "m3u8" in address else set())
    for address in ("file:///x", "ftp://x", "concat://x", "://x", "cache:http://x", "HTTPX://x"):
        with pytest.raises(MediaError):
            address_options(address, DEFAULT_LIMITS)


def test_a_description_of_a_session_opens_no_port(tmp_path: Path) -> None:
    """An SDP text would have FFmpeg wait for packets on ports that the text names."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path / "session.mp4"
    path.write_text(_session_description(path).replace("45454", str(port)))
    with pytest.raises(MediaError, match="not a video"):
        read_frames(path, 2)
