"""Frames that the app passes in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.engines.plugins.prepare_frame.kernel import is_device_frame
from ppllava_edge.runtime.media.container import check_size
from ppllava_edge.runtime.media.readers import Frame, FrameReader


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


def rgb_frame(image: Any, what: str) -> np.ndarray:
    """Check a frame from the app and view it as a numpy array.

    Args:
        image: A numpy array, or any object that exports DLPack from host memory.
        what: The frame's name, for error messages.

    Returns:
        RGB uint8 (H, W, 3); shares memory with the image where possible.

    Raises:
        MediaError: For GPU memory, another shape or dtype, or an unusable size.
    """
    if is_device_frame(image):
        raise MediaError(
            f"{what} is in GPU memory; engines on the CPU, and VideoQA.open, take frames in host memory"
        )
    if not isinstance(image, np.ndarray) and hasattr(image, "__dlpack__"):
        try:
            image = np.from_dlpack(image)
        except (RuntimeError, TypeError, ValueError, BufferError) as error:
            raise MediaError(f"{what} can't be read through DLPack: {str(error).splitlines()[0]}") from None
    array: np.ndarray = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise MediaError(f"{what} must be RGB uint8 (height, width, 3), not {array.dtype} {array.shape}")
    check_size(array.shape[1], array.shape[0], what)
    return array
