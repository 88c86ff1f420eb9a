"""The first inputs of every target: valid files, made at start by the libraries that the package uses."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from ppllava_edge.bench.fuzz.inputs.checkpoints import CONFIGS
from ppllava_edge.bench.fuzz.inputs.videos import IMAGES, VIDEOS, encode_images, encode_video
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.embeddings import FILE
from ppllava_edge.engines.bundle.engine_manifest import Engine, fingerprint, write_engine
from ppllava_edge.engines.bundle.manifest import MANIFEST
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.nano import sample_path
from ppllava_edge.runtime.vision.feature_cache import CachedVideo, FeatureCache

PLAYLISTS = (
    "ffconcat version 1.0\nfile '@FOLDER@/video.mp4'\nduration 1.5\ninpoint 0\n",
    "ffconcat version 1.0\nfile http://127.0.0.1:@PORT@/video.mp4\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:4.0,\n@FOLDER@/video.mp4\n#EXT-X-ENDLIST\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:4.0,\nhttp://127.0.0.1:@PORT@/video.ts\n#EXT-X-ENDLIST\n",
    "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nfile:@FOLDER@/video.mp4\n",
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video @PORT@ RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "1\n00:00:00,000 --> 00:00:02,000\nA text of @FOLDER@/video.mp4\n\n2\n00:00:03,000 --> 00:00:04,000\nx\n",
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT4S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
    'bandwidth="1"><BaseURL>file:@FOLDER@/video.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "[Script Info]\nScriptType: v4.00+\n[Events]\nDialogue: 0,0:00:00.00,0:00:02.00,Default,,0,0,0,,text\n",
    "WEBVTT\n\n00:00.000 --> 00:02.000\ntext\n",
    "RTSPtext\nrtsp://127.0.0.1:@PORT@/video\n",
    ";FFMETADATA1\ntitle=x\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=1000\n",
    "subfile,,start,0,end,0,,:@FOLDER@/video.mp4\n",
    "concat:@FOLDER@/video.mp4|@FOLDER@/video.mp4\n",
)
BATCH_LINES = (
    {"video": "a.mp4", "question": "What is shown?", "text": "a circle", "seconds": 0.25},
    {"video": "b.mp4", "question": "Was ist zu sehen? \u00e4\u4e2d", "error": "b.mp4 is damaged"},
)
QUESTIONS = (
    "What color is the circle?",
    "Is there a </s> in it? <image> <unk>",
    "<a> <|endoftext|> <|im_end|> [PAD]",
    "\u00c4hnlich \u4e2d\u6587 \U0001f600 \u0301 END EN D",
    "# a comment\nWhat?\n\nWhy?\n",
)
LONG = 220  # frames: enough for seeking to pay
CHECKPOINT_TYPES = (np.float32, np.float16, np.float64, np.int8)


@cache
def seeds(target: str) -> tuple[bytes, ...]:
    """The seeds of a target, in a fixed order."""
    if target in VIDEOS:
        encoded = [encode_video(encoding) for encoding in VIDEOS[target]]
        return tuple(data for data in encoded if data is not None)
    if target in IMAGES:
        return tuple(encode_images(target))
    return tuple(OTHERS[target]())


def _mixed_videos() -> list[bytes]:
    """A few videos of every container."""
    return [sample_path().read_bytes(), *seeds("mp4")[:3], *seeds("ts")[:1], *seeds("mkv")[:2]]


def _long_videos() -> list[bytes]:
    """Videos that are long enough for seeking, and the others."""
    encodings = (VIDEOS["mp4"][0], VIDEOS["mp4"][2], VIDEOS["mkv"][0], VIDEOS["mkv"][1], VIDEOS["ts"][0])
    encoded = [encode_video(encoding, LONG) for encoding in encodings]
    return [*(data for data in encoded if data is not None), *_mixed_videos()]


def _bundle_file(*names: str) -> Callable[[], list[bytes]]:
    return lambda: [(packed_bundle() / name).read_bytes() for name in names]


def _engines() -> list[bytes]:
    """engine.json of engines that the package itself writes."""
    with tempfile.TemporaryDirectory() as name:
        manifest = Bundle.open(packed_bundle()).manifest
        found = []
        for number, library in enumerate(("onnxruntime", "tensorrt")):
            staging = Path(name) / f"staging{number}"
            staging.mkdir()
            for file in ("pooling.onnx", "pooling.onnx.data"):
                (staging / file).write_bytes((packed_bundle() / file).read_bytes())
            engine = Engine(
                folder=Path(name) / f"engine{number}",
                target="cpu",
                bundle=fingerprint(manifest),
                made_by={},
                kv_dtype="float16",
                stages={"pooling": ("pooling.onnx",)},
                files={},
                library=library,
                details={"capacity": 512, "windows": [2, 3, 3], "compute": ["8.9"]},
            )
            write_engine(staging, engine)
            found.append((engine.folder / "engine.json").read_bytes())
        return found


def _cache_entries() -> list[bytes]:
    """Entries of the feature cache, of the packed bundle's shapes."""
    facts = {
        "kind": "video", "media": "video", "indices": [5], "times": [0.5], "fps": 10.0, "duration": 2.0,
        "source_frames": 20, "count": 1, "image_size": None, "notes": [],
        "windows": {"kernel": [1, 3, 3], "stride": [1, 3, 3], "output_size": None},
    }  # fmt: skip
    image = {**facts, "kind": "image", "media": "image", "image_size": [48, 64], "windows": None}
    vision = Bundle.open(packed_bundle()).manifest.vision
    features = np.zeros((1, vision.patches, vision.hidden_size), np.float16)
    states = np.zeros((1, vision.states, vision.patches + vision.class_token, vision.hidden_size), np.float16)
    with tempfile.TemporaryDirectory() as name:
        cache = FeatureCache(name)
        videos = (
            CachedVideo({"features": features}, facts),
            CachedVideo({"features": features.astype(np.float32)}, image),
            CachedVideo({"features": features, "states": states}, facts),
        )
        for number, video in enumerate(videos):
            if not cache.store(video, number):
                raise PPLLaVAError("no seed for the feature cache could be written")
        return [cache.path(number).read_bytes() for number in range(len(videos))]


def _checkpoints() -> list[bytes]:
    """Weights as other tools write them."""
    from safetensors.numpy import save

    arrays = {f"layer.{t.__name__}": np.arange(24).reshape(2, 3, 4).astype(t) for t in CHECKPOINT_TYPES}
    return [save(arrays), save({"scalar": np.ones((), np.float32)}, metadata={"format": "pt"})]


def _indexes() -> list[bytes]:
    names = ("embed_tokens", "image_newline")
    shards = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    return [json.dumps({"metadata": {"total_size": 16288}, "weight_map": shards}).encode()]


def _batches() -> list[bytes]:
    lines = [json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in BATCH_LINES]
    return [b"".join(lines), lines[0][:-9], lines[0] + lines[1][:20], b"a foreign text\n", b'{"a": 1}']


OTHERS: dict[str, Callable[[], list[bytes]]] = {
    "range": _long_videos,
    "live": _mixed_videos,
    "isolated": _mixed_videos,
    "playlist": lambda: [text.encode() for text in PLAYLISTS],
    "manifest": _bundle_file(MANIFEST),
    "answer": _bundle_file(MANIFEST),
    "engine": _engines,
    "onnx": _bundle_file("pooling.onnx", "similarity.onnx"),
    "embeddings": _bundle_file(FILE),
    "cache": _cache_entries,
    "checkpoint": _checkpoints,
    "index": _indexes,
    "config": lambda: [json.dumps(config, indent=1).encode() for config in CONFIGS],
    "tokenizer": _bundle_file("tokenizer.json", "question_tokenizer.json"),
    "question-tokenizer": _bundle_file("question_tokenizer.json", "tokenizer.json"),
    "batch": _batches,
    "question": lambda: [text.encode() for text in QUESTIONS],
    "questions": lambda: [text.encode() for text in QUESTIONS],
}
