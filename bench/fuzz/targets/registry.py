"""All targets by name, and what a server imports before it forks."""

from __future__ import annotations

import importlib
from pathlib import Path

from ppllava_edge.bench.fuzz.targets.cache import CACHE_TARGETS
from ppllava_edge.bench.fuzz.targets.checkpoint import CHECKPOINT_TARGETS
from ppllava_edge.bench.fuzz.targets.media import MEDIA_TARGETS
from ppllava_edge.bench.fuzz.targets.misbehaviour import MISBEHAVIOUR
from ppllava_edge.bench.fuzz.targets.model import MODEL_TARGETS, prepare_bundle
from ppllava_edge.bench.fuzz.targets.target import Target
from ppllava_edge.bench.fuzz.targets.text import TEXT_TARGETS

# All but the one that only tests run.
TARGETS: dict[str, Target] = {
    t.name: t for t in (*MEDIA_TARGETS, *MODEL_TARGETS, *CACHE_TARGETS, *CHECKPOINT_TARGETS, *TEXT_TARGETS)
}
RUNNABLE = {**TARGETS, MISBEHAVIOUR.name: MISBEHAVIOUR}
IMPORTED = (  # not onnxruntime: importing it starts a thread, and a process with threads must not fork
    "av",
    "PIL.Image",
    "PIL.ImageOps",
    "tokenizers",
    "safetensors.numpy",
    "ppllava_edge.runtime.media.seeking",
)


def preload(folder: Path) -> None:
    """Import what children need, so that they don't have to, and make the files that targets share.

    Args:
        folder: The server's folder.
    """
    for name in IMPORTED:
        importlib.import_module(name)
    from av import logging as av_logging
    from PIL import Image

    Image.init()
    av_logging.restore_default_callback()  # FFmpeg's messages go to stderr: they show which code ran
    prepare_bundle(folder)
