"""Frames that the app passes in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.engines.plugins.prepare_frame.kernel import is_device_frame
from ppllava_edge.runtime.media.limits import check_size
from ppllava_edge.runtime.media.readers import Frame, FrameReader

CHANNELS = {"rgb": 3, "bgr": 3, "rgba": 4, "bgra": 4, "gray": 1}  # of an array, by colour order


class ArrayReader(FrameReader):
    """A reader over frames in memory. All of them are used, one second apart.

    Args:
        images: RGB uint8 (H, W, 3) each, as `rgb_frame` accepts them.

    Raises:
        MediaError: If there are none, or one of them isn't such an image.
    """

    takes_all = True

    def __init__(self, images: Sequence[Any]):
        self.images = [rgb_frame(image, f"frame {i}") for i, image in enumerate(images)]
        if not self.images:
            raise MediaError("there are no frames")
        super().__init__("the frames", len(self.images), 1.0, float(len(self.images)))

    def frames(self, choice: Callable[[FrameReader], Sequence[int]]) -> Iterator[Frame]:
        """See FrameReader.frames."""
        self.indices = list(choice(self))
        return (Frame(i, self.images[i], float(i)) for i in sorted(set(self.indices)))


def rgb_frame(image: Any, what: str, color: str = "rgb") -> np.ndarray:
    """Check a frame from the app and view it as an RGB numpy array.

    Args:
        image: A numpy array, or any object that exports DLPack from host memory: uint8 (H, W, 3) for "rgb"
            and "bgr" (OpenCV's order), (H, W, 4) for "rgba" and "bgra" (alpha is ignored), (H, W) or
            (H, W, 1) for "gray".
        what: The frame's name, for error messages.
        color: The order of the channels.

    Returns:
        RGB uint8 (H, W, 3); shares memory with the image where the order allows a view. A grey frame's view
        is read-only.

    Raises:
        MediaError: For GPU memory, another shape or dtype, an unknown colour order, or an unusable size.
    """
    if color not in CHANNELS:
        raise MediaError(f"color must be {', '.join(CHANNELS)}, not {color!r}")
    if is_device_frame(image):
        raise MediaError(
            f"{what} is in GPU memory; engines on the CPU, and VideoQA.open, take frames in host memory"
        )
    if not isinstance(image, np.ndarray) and hasattr(image, "__dlpack__"):
        try:
            image = np.from_dlpack(image)
        except (RuntimeError, TypeError, ValueError, BufferError) as error:
            raise MediaError(f"{what} can't be read through DLPack: {str(error).splitlines()[0]}") from None
    try:
        array: np.ndarray = np.asarray(image)
    except (TypeError, ValueError) as error:
        raise MediaError(f"{what} is not an array ({str(error).splitlines()[0]})") from None
    if color == "gray" and array.ndim == 2:
        array = array[:, :, None]
    channels = CHANNELS[color]
    if array.ndim != 3 or array.shape[2] != channels or array.dtype != np.uint8:
        raise MediaError(_wrong_array(array, what, color))
    check_size(array.shape[1], array.shape[0], what)
    if color == "rgb":
        return array
    if color == "gray":
        return np.broadcast_to(array, (*array.shape[:2], 3))
    return array[:, :, :3] if color == "rgba" else array[:, :, 2::-1]


def _wrong_array(array: np.ndarray, what: str, color: str) -> str:
    """What is wrong with an array that isn't a frame, and what to do about it."""
    channels = CHANNELS[color]
    wanted = "(height, width)" if color == "gray" else f"(height, width, {channels})"
    hint = ""
    if array.dtype == object:
        return f"{what} is not a frame: {color} needs a uint8 array {wanted}"
    if array.dtype != np.uint8:
        scale = "; scale values from 0..1 by 255 and round" if array.dtype.kind == "f" else ""
        hint = f"; convert it to uint8, values 0 to 255{scale}"
    elif array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        hint = "; the channels come first: pass frame.transpose(1, 2, 0)"
    elif array.ndim == 4:
        hint = "; pass its frames one by one"
    else:
        found = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
        fitting = [name for name, n in CHANNELS.items() if n == found]
        hint = f"; did you mean color={' or '.join(map(repr, fitting))}?" if fitting else ""
    name = color.upper() if color != "gray" else "grey"
    return f"{what} must be {name} uint8 {wanted}, not {array.dtype} {array.shape}{hint}"
