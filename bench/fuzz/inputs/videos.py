"""Small videos and images of many formats, encoded with PyAV and Pillow."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

COUNT = 20  # frames
FPS = 25
WIDTH, HEIGHT = 64, 48


class Encoding(NamedTuple):
    """How a seed video is encoded.

    Attributes:
        suffix: Sets the container.
        codec: FFmpeg's name of the encoder.
        options: The encoder's options.
        muxer: The muxer's options.
    """

    suffix: str
    codec: str
    options: Mapping[str, str] = MappingProxyType({})
    muxer: Mapping[str, str] = MappingProxyType({})


H264 = {"g": "8", "bf": "2", "preset": "veryfast", "threads": "1"}
HEVC = {"x265-params": "keyint=8:bframes=2:log-level=none:pools=none:frame-threads=1", "preset": "veryfast"}
AV1 = {"g": "8", "preset": "12", "svtav1-params": "lookahead=0:lp=1"}
VP9 = {"g": "8", "cpu-used": "8", "threads": "1"}
VIDEOS: dict[str, tuple[Encoding, ...]] = {
    "mp4": (
        Encoding("mp4", "libx264", H264),
        Encoding("mp4", "libx264", H264, {"movflags": "frag_keyframe+empty_moov"}),
        Encoding("mp4", "libx265", HEVC),
        Encoding("mp4", "libsvtav1", AV1),
        Encoding("mp4", "libvpx-vp9", VP9),
        Encoding("mp4", "mpeg4", {"g": "8", "bf": "2"}),
        Encoding("mov", "mjpeg", {"strict": "unofficial"}),
        Encoding("mov", "prores_ks"),
    ),
    "mkv": (
        Encoding("mkv", "libx264", H264),
        Encoding("webm", "libvpx-vp9", VP9),
        Encoding("webm", "libvpx", VP9),
        Encoding("mkv", "libx265", HEVC),
        Encoding("mkv", "ffv1"),
        Encoding("webm", "libsvtav1", AV1),
    ),
    "avi": (
        Encoding("avi", "mpeg4", {"g": "8", "bf": "2"}),
        Encoding("avi", "mjpeg", {"strict": "unofficial"}),
    ),
    "ts": (
        Encoding("ts", "libx264", H264),
        Encoding("ts", "mpeg2video", {"g": "8", "bf": "2"}),
        Encoding("ts", "libx265", HEVC),
    ),
    "video": (
        Encoding("mpg", "mpeg2video", {"g": "8", "bf": "2"}),
        Encoding("flv", "flv", {"g": "8"}),
        Encoding("h264", "libx264", H264),
        Encoding("hevc", "libx265", HEVC),
        Encoding("ivf", "libvpx-vp9", VP9),
        Encoding("y4m", "wrapped_avframe"),
        Encoding("mxf", "mpeg2video", {"g": "8"}),
        Encoding("asf", "msmpeg4", {"g": "8"}),
    ),
}
PIXEL_FORMATS = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}
IMAGES = {
    "gif": ("GIF",),
    "png": ("PNG",),
    "jpeg": ("JPEG",),
    "webp": ("WEBP",),
    "tiff": ("TIFF",),
    "bmp": ("BMP",),
    "ppm": ("PPM",),
}


def moving_frames(count: int = COUNT) -> np.ndarray:
    """(count, HEIGHT, WIDTH, 3) uint8: blocks that move, so that frames differ and refer to earlier ones."""
    rng = np.random.default_rng(5)
    blocks = np.repeat(np.repeat(rng.integers(0, 255, (6, 8, 3), np.uint8), 8, 0), 8, 1)
    return np.stack([np.roll(blocks, (i, 2 * i), (0, 1)) // 2 + i % 128 for i in range(count)])


def encode_video(encoding: Encoding, count: int = COUNT) -> bytes | None:
    """A video file of `count` frames; None if this FFmpeg lacks the encoder."""
    import av

    if encoding.codec not in av.codecs_available:
        return None
    with tempfile.TemporaryDirectory() as folder, _quiet_encoders():
        path = Path(folder) / f"video.{encoding.suffix}"
        options = {
            "fflags": "bitexact",
            **encoding.muxer,
        }  # no random numbers, as Matroska's muxer writes them
        with av.open(str(path), "w", container_options=options) as container:
            stream: Any = container.add_stream(encoding.codec, rate=FPS, options=dict(encoding.options))
            stream.width, stream.height = WIDTH, HEIGHT
            stream.pix_fmt = PIXEL_FORMATS.get(encoding.codec, "yuv420p")
            for image in moving_frames(count):
                planes = np.concatenate([image[:, :, 0], image[: HEIGHT // 2, :, 1]])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
            container.mux(stream.encode())
        return path.read_bytes()


def encode_images(name: str) -> list[bytes]:
    """Images of a format (a key of IMAGES): still ones of several modes, and an animation if it has those."""
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in moving_frames()[:6]]
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    exif[0x010E] = "a description"
    variants: list[tuple[str, dict[str, Any]]] = [("RGB", {})]
    if name in ("gif", "png", "webp"):
        animation = {"save_all": True, "append_images": pictures[1:], "duration": 100}
        variants += [("RGB", animation), ("P" if name != "webp" else "RGBA", {})]
    if name in ("png", "jpeg", "webp", "tiff"):
        variants.append(("RGB", {"exif": exif}))
    if name in ("png", "tiff", "bmp", "ppm"):
        variants += [("L", {}), ("1", {})]
    if name == "png":
        variants += [("RGBA", {}), ("I;16", {})]
    if name == "jpeg":
        variants += [("L", {"progressive": True}), ("CMYK", {})]
    if name == "tiff":
        compressions = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4")
        variants += [("1" if c == "group4" else "RGB", {"compression": c}) for c in compressions]
        variants.append(("RGB", {"save_all": True, "append_images": pictures[1:3]}))
    return [_save(pictures[0].convert(mode), IMAGES[name][0], options) for mode, options in variants]


def _save(picture: Any, kind: str, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@contextmanager
def _quiet_encoders() -> Iterator[None]:
    """Quieten SVT-AV1, and keep this process's scheduling policy: as root, SVT-AV1 makes it real-time."""
    os.environ.setdefault("SVT_LOG", "1")
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)
