"""Predictions of disk space and memory from a model's shape alone, and advice on how to make a model fit."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ppllava_edge.engines.bundle.engine_manifest import CAPACITY_STEP
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.machine.model_shape import Shape
from ppllava_edge.engines.terminal import human_bytes

RUNTIME_BASE = 110e6  # bytes resident before a model is opened: Python, numpy, PyAV, tokenizers, ONNX Runtime
EXPORT_BASE = 150e6  # resident bytes of an export, with onnx and graphs without weights
FEWER_FRAMES = (16, 8, 4)  # what suggest() tries
SHOWN = 5  # maximum number of suggestions


@dataclass(frozen=True)
class Estimate:
    """Predicted sizes, bytes.

    Attributes:
        bundle: The bundle on disk, engines/cpu included.
        export: Peak resident memory of the export.
        run: Peak resident memory of an answer.
        largest: The largest single allocation of an answer.
        cache: The KV cache.
    """

    bundle: float
    export: float
    run: float
    largest: float
    cache: float

    def rows(self) -> list[tuple[str, str]]:
        """(what, size) for a table."""
        return [
            ("bundle on disk", human_bytes(self.bundle)),
            ("peak memory of the export", human_bytes(self.export)),
            ("peak memory of an answer", human_bytes(self.run)),
            ("of that, KV cache", human_bytes(self.cache)),
            ("largest single allocation", human_bytes(self.largest)),
        ]


def estimate(s: Shape) -> Estimate:
    """Predict all sizes for one shape."""
    stored = sum(stage.stored for stage in s.stages) + s.embeddings
    engine = sum(stage.engine for stage in s.stages) if s.engine else 0.0
    capacity = min(-(-s.prompt // CAPACITY_STEP) * CAPACITY_STEP, s.context)
    cache = 2.0 * s.layers * s.kv_heads * s.head_size * capacity * s.kv_bytes
    largest_weight = max(stage.largest for stage in s.stages)
    return Estimate(
        bundle=stored + engine,
        # the largest matrix as it is read, and its rounded or copied form
        export=EXPORT_BASE + largest_weight * (s.source_bytes + 1.5),
        run=RUNTIME_BASE + max(_encoding(s), _answering(s, cache)),
        largest=max(cache / (2 * s.layers), _features(s) * s.states, float(largest_weight)),
        cache=cache,
    )


def suggest(s: Shape, limit: float, int4: Shape | None) -> list[str]:
    """Say what to change so that an answer fits in memory.

    Args:
        s: The model's shape.
        limit: Available memory, bytes.
        int4: The same model at --precision int4; None if it is int4 already.

    Returns:
        Lines to print; suggestions start with the smallest change.
    """
    needed = estimate(s).run
    if needed <= limit:
        return [
            f"it fits: {human_bytes(needed)} of {human_bytes(limit)}, "
            f"prompts of up to {_longest_prompt(s, limit)} positions fit"
        ]
    sizes = {change: estimate(shape).run for change, shape in _smaller_shapes(s, int4).items()}
    fitting = [f"{change}: {human_bytes(size)}" for change, size in sizes.items() if size <= limit]
    if fitting:
        return [
            f"it doesn't fit {human_bytes(limit)}: it needs {human_bytes(needed)}; these options would fit:",
            *fitting[:SHOWN],
        ]
    least = min(sizes.values(), default=needed)
    return [
        f"no option makes it fit {human_bytes(limit)}: "
        f"the minimum, with int4, 4 frames and an INT8 cache, is {human_bytes(least)}"
    ]


def parse_size(text: str) -> float:
    """Parse a size like "8GB", "500 MB" or "2GiB", or a number of bytes.

    Returns:
        Bytes.

    Raises:
        PPLLaVAError: The text isn't a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not match or float(match[1]) <= 0:
        raise PPLLaVAError(f"{text!r} is not a size; write one like 8GB or 500MB")
    base = 1024.0 if match[3] else 1000.0
    return float(match[1]) * base ** " kmgt".index(match[2] or " ")


def _features(s: Shape) -> float:
    """Bytes of the clip's features."""
    return 4.0 * s.frames * s.frame_tokens * s.vision_width


def _encoding(s: Shape) -> float:
    """Bytes while a clip is encoded, before the decoder is opened: towers, hidden states and activations."""
    frames_per_call = max(1, min(4, 2400 // s.frame_tokens))
    trunk = 4.0 * frames_per_call * s.frame_tokens * (8 * s.vision_width + 2 * s.vision_mlp)
    branch = 0.0
    if s.states > 1:
        branch = 4.0 * s.frames * s.frame_tokens * (6 * s.vision_width + 2 * s.vision_mlp)
    towers = sum(stage.resident for stage in s.stages if stage.name in ("trunk", "temporal"))
    return towers + (s.states + 1) * _features(s) + max(trunk, branch)


def _answering(s: Shape, cache: float) -> float:
    """Bytes while a question is answered: all weights, KV cache, features, and the activations of prefill."""
    prefill = 4.0 * s.prompt * (3 * s.decoder_mlp + 8 * s.decoder_width)
    return sum(stage.resident for stage in s.stages) + cache + _features(s) + prefill


def _longest_prompt(s: Shape, limit: float) -> int:
    """Positions of the longest prompt that fits, in steps of the cache's capacity."""
    while s.context > s.prompt + CAPACITY_STEP:
        longer = replace(s, visual_tokens=s.visual_tokens + CAPACITY_STEP)
        if estimate(longer).run > limit:
            break
        s = longer
    return s.prompt


def _smaller_shapes(s: Shape, int4: Shape | None) -> dict[str, Shape]:
    """Command options that shrink a model → the resulting shape, the smallest change first."""
    shapes: dict[str, Shape] = {}
    for base, precision in ((s, ""), (int4, "--precision int4")):
        if base is None:
            continue
        for frames in (s.frames, *(count for count in FEWER_FRAMES if count < s.frames)):
            for kv_bytes in (s.kv_bytes, 1):
                smaller = replace(
                    base,
                    frames=frames,
                    visual_tokens=s.visual_tokens * frames // s.frames,
                    kv_bytes=min(base.kv_bytes, kv_bytes),
                )
                options = [precision] if precision else []
                if smaller.kv_bytes < base.kv_bytes:
                    options = [f"{precision or '--precision …'},kv=int8"]
                if frames < s.frames:
                    options.append(f"--frames {frames}")
                if options:
                    shapes.setdefault(" ".join(options), smaller)
    return shapes
