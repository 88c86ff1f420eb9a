"""Which containers and protocols FFmpeg may open: the options that hold it to them.

FFmpeg knows 300 containers. Some of them, such as playlists, open other files and addresses that the file
names; a text file is recognised as one whatever its suffix. So only containers that hold their frames
themselves are allowed.
"""

from __future__ import annotations

from collections.abc import Mapping

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.limits import MediaLimits
from ppllava_edge.runtime.media.opening.paths import display_name

# Names of FFmpeg's demuxers. None of them opens another file. "mov" also reads MP4, 3GP, HEIC and AVIF, and
# leaves references to other files alone unless enable_drefs is set.
CONTAINERS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "asf", "flv", "ogg", "mxf", "nut", "dv", "dhav", "gif"),
    *("ivf", "obu", "av1", "h264", "hevc", "vvc", "m4v", "mpegvideo", "vc1", "mjpeg", "yuv4mpegpipe"),
)
STREAM_CONTAINERS = (*CONTAINERS, "live_flv", "mpjpeg", "rtsp", "rtp", "sdp")
HLS_CONTAINERS = (*CONTAINERS, "hls", "aac", "mp3", "webvtt")
HLS_SUFFIXES = (".m3u8", ".m3u")
INT_MAX = 2**31 - 1  # the largest value of these options

_HTTP = ("http", "https", "httpproxy", "tcp", "tls")
_RTSP = ("rtsp", "rtsps", "rtp", "srtp", "udp", "tcp", "tls", "http", "https", "httpproxy")
_RTMP = (*_HTTP, "rtmp", "rtmpt", "rtmps", "rtmpts", "rtmpe", "rtmpte", "ffrtmphttp", "ffrtmpcrypt")
PROTOCOLS = {  # by an address's scheme: the protocols that it needs. None of them opens local files.
    "http": _HTTP,
    "https": _HTTP,
    "rtsp": _RTSP,
    "rtsps": _RTSP,
    "rtp": ("rtp", "srtp", "udp"),
    "srtp": ("rtp", "srtp", "udp"),
    "udp": ("udp",),
    "tcp": ("tcp",),
    "tls": ("tls", "tcp"),
    "srt": ("srt",),
    "rist": ("rist",),
    **dict.fromkeys(("rtmp", "rtmpt", "rtmps", "rtmpts", "rtmpe", "rtmpte"), _RTMP),
}


def file_options(descriptor: int, limits: MediaLimits) -> dict[str, str]:
    """FFmpeg's input options for a file that is open already; its address is then "fd:".

    FFmpeg gets a descriptor instead of a name, and no other protocol: it can open no other file, and no
    character of a name has a meaning to it.

    Args:
        descriptor: The open file, at its beginning; FFmpeg duplicates it.
        limits: max_streams and max_frame_pixels are passed on.
    """
    return {
        "fd": str(descriptor),
        "protocol_whitelist": "fd",
        "format_whitelist": ",".join(CONTAINERS),
        **_limit_options(limits),
    }


def address_options(address: str, limits: MediaLimits) -> dict[str, str]:
    """FFmpeg's input options for a stream's address (rtsp://, http://, …).

    Playlists (HLS) are read only if the address asks for one (.m3u8), and then lead to other addresses but
    never to files.

    Args:
        address: The address.
        limits: max_streams and max_frame_pixels are passed on.

    Raises:
        MediaError: If its scheme isn't allowed.
    """
    scheme = scheme_of(address)
    if scheme == "file":
        raise MediaError(f"{display_name(address)}: give a file by its path, without file://")
    if scheme not in PROTOCOLS:
        raise MediaError(f"{display_name(address)}: streams are opened from {', '.join(PROTOCOLS)} addresses")
    path = address.split("?", 1)[0].split("#", 1)[0].lower()
    playlist = scheme in ("http", "https") and path.endswith(HLS_SUFFIXES)
    protocols = (*PROTOCOLS[scheme], "crypto") if playlist else PROTOCOLS[scheme]
    return {
        "protocol_whitelist": ",".join(protocols),
        "format_whitelist": ",".join(HLS_CONTAINERS if playlist else STREAM_CONTAINERS),
        **_limit_options(limits),
    }


def scheme_of(address: str) -> str:
    """The scheme of an address (lower case); "" for a path."""
    return address.split("://", 1)[0].lower() if "://" in address else ""


def decoder_options(options: Mapping[str, str], limits: MediaLimits) -> dict[str, str]:
    """A decoder's options, which refuse a frame that is too large before it is allocated."""
    return {**options, "max_pixels": str(min(limits.max_frame_pixels, INT_MAX))}


def _limit_options(limits: MediaLimits) -> dict[str, str]:
    # One stream more than allowed: video_stream then refuses the file with a clear message.
    return {"max_streams": str(min(limits.max_streams + 1, INT_MAX)), **decoder_options({}, limits)}
