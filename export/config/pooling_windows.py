"""The pooling windows of a checkpoint: kernel, stride and output size, for videos and for images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ppllava_edge.engines.bundle.windows import Windows
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.export.config.model import Overrides


def read_windows(config: dict[str, Any], overrides: Overrides, pooling: str) -> tuple[Windows, Windows]:
    """Read the windows for videos and for images.

    A kernel, stride or output size on the command line replaces all three of the checkpoint.

    Raises:
        PPLLaVAError: A value in config.json is not three whole numbers.
    """
    pooled_shape = parse_triple(config.get("pllava_pooling_shape"), "pllava_pooling_shape")
    video = Windows(
        parse_triple(config.get("pooling_kernel"), "pooling_kernel"),
        parse_triple(config.get("pooling_stride"), "pooling_stride"),
        pooled_shape if pooling == "ppllava" else None,
    )
    overridden = bool(overrides.kernel or overrides.stride or overrides.output_size)
    if overridden:
        video = Windows(overrides.kernel, overrides.stride, overrides.output_size)
    if pooling == "pllava_npu":
        output = overrides.output_size or pooled_shape
        return Windows(None, None, output), Windows(None, None, output)
    return video, _image_windows(config, overrides, video, overridden)


def _image_windows(config: dict[str, Any], overrides: Overrides, video: Windows, overridden: bool) -> Windows:
    """overridden: whether the command line sets the video's windows."""
    kernel = parse_triple(config.get("image_pooling_kernel"), "image_pooling_kernel")
    stride = parse_triple(config.get("image_pooling_stride"), "image_pooling_stride")
    if overrides.image_kernel or overrides.image_stride:
        return Windows(
            overrides.image_kernel or overrides.image_stride,
            overrides.image_stride or overrides.image_kernel,
            None,
        )
    if not overridden:
        return replace(video, kernel=kernel or video.kernel, stride=stride or video.stride)
    if kernel:
        return Windows(kernel, stride or kernel, None)
    return _one_frame(video)


def _one_frame(video: Windows) -> Windows:
    """The video's windows, one frame deep: the fallback for images without windows of their own."""
    return Windows(_flat(video.kernel), _flat(video.stride), _flat(video.output_size))


def _flat(triple: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
    return None if triple is None else (1, triple[1], triple[2])


def parse_triple(value: object, name: str) -> tuple[int, int, int] | None:
    """Parse (frames, rows, columns): a list, or a string like "(2, 3, 3)"; None stays None.

    Raises:
        PPLLaVAError: The value is not three whole numbers. The message names the setting by `name`.
    """
    if value is None:
        return None
    parts = value.strip("()[] ").split(",") if isinstance(value, str) else value
    try:
        t, h, w = (int(part) for part in parts)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise PPLLaVAError(
            f"{name} must be three whole numbers (frames, rows, columns), not {value!r}"
        ) from None
    return t, h, w
