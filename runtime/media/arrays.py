"""arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.engines.plugins.prepare_frame.kernel import is_device_frame
from ppllava_edge.runtime.media.container import check_size
from ppllava_edge.runtime.media.readers import Frame, FrameReader

if TYPE_CHECKING:
    pass


class ArrayReader(FrameReader):
    """Frames that the app has already; all are used."""

    takes_all = True

    def __init__(self, images: Sequence[Any]):
        self.images = [rgb_frame(image, f"frame {i}") for i, image in enumerate(images)]
        if not self.images:
            raise MediaError("there are no frames")
        super().__init__("the frames", len(self.images), 1.0, float(len(self.images)))

    def frames(self, choice: Callable[[FrameReader], Sequence[int]]) -> Iterator[Frame]:
        """As FrameReader says."""
        self.indices = list(choice(self))
        return (Frame(i, self.images[i], float(i)) for i in sorted(set(self.indices)))


def rgb_frame(image: Any, what: str) -> np.ndarray:
    """A frame from the app as RGB uint8 (H,W,3): numpy, or anything that exports DLPack from host memory. Raises MediaError."""
    if is_device_frame(image):
        raise MediaError(
            f"{what} lies in GPU memory; engines on the CPU, and VideoQA.open, take frames in host memory"
        )
    if not isinstance(image, np.ndarray) and hasattr(image, "__dlpack__"):
        try:
            image = np.from_dlpack(image)
        except (RuntimeError, TypeError, ValueError, BufferError) as error:
            raise MediaError(f"{what} can't be taken through DLPack: {str(error).splitlines()[0]}") from None
    array: np.ndarray = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise MediaError(f"{what} must be RGB uint8 (height, width, 3), not {array.dtype} {array.shape}")
    check_size(array.shape[1], array.shape[0], what)
    return array
