"""Pooling windows: kernel, stride and output size, resolved for the length of a clip.

Two of the three determine the third, by upstream's rules (`get_size`). Combinations that those rules can't
resolve are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from ppllava_edge.engines.errors import PPLLaVAError

Extent = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Triple = tuple[Extent, Extent, Extent]
_AXES = ("frames", "rows", "columns")


@dataclass(frozen=True)
class Windows:
    """Pooling windows over (frames, rows, columns). One or two of the three attributes are None."""

    kernel: Triple | None = None
    stride: Triple | None = None
    output_size: Triple | None = None

    def resolve(self, size: Triple) -> tuple[Triple, Triple, Triple]:
        """Compute the windows for one input, as upstream's get_size does.

        Args:
            size: The input's (frames, rows, columns).

        Returns:
            Output size, kernel and stride.

        Raises:
            PPLLaVAError: Windows that don't fit the input, or an output size that kernel and stride don't
                produce (where upstream fails or returns scrambled values).
        """
        output, kernel, stride = self._complete(size)
        for axis, i, k, s, o in zip(_AXES, size, kernel, stride, output):
            _check_axis(axis, i, k, s, o)
        return output, kernel, stride

    def _complete(self, size: Triple) -> tuple[Triple, Triple, Triple]:
        """Output size, kernel and stride by upstream's rules, unchecked."""
        kernel, stride, output = self.kernel, self.stride, self.output_size
        if output and not kernel and not stride:
            stride = _each(lambda i, o: i // o, size, output)
            kernel = _each(lambda i, o, s: i - (o - 1) * s, size, output, stride)
        elif kernel and stride and not output:
            output = _each(lambda i, k, s: (i - k) // s + 1, size, kernel, stride)
        elif output and stride and not kernel:
            kernel = _each(lambda i, o, s: i - (o - 1) * s, size, output, stride)
        elif output and kernel and not stride:
            stride = _each(lambda i, o, k: (i - k) // (o - 1) if o > 1 else max(i, 1), size, output, kernel)
        else:
            raise PPLLaVAError(
                "pooling needs exactly one or two of kernel, stride and output size "
                "(kernel alone and stride alone are not enough)"
            )
        assert kernel and stride and output
        return output, kernel, stride

    def check(self, grid: tuple[int, int], what: str) -> None:
        """Refuse, at export, windows that can't work for any clip. The frame axis is resolved later.

        Args:
            grid: Patches of a frame, (rows, columns).
            what: Begins the error messages, like "the video pooling".

        Raises:
            PPLLaVAError: The windows can't work.
        """
        parts = [part for part in (self.kernel, self.stride, self.output_size) if part]
        if any(value < 1 for part in parts for value in part):
            raise PPLLaVAError(f"{what}: kernel, stride and output size must be 1 or more")
        if not parts or len(parts) == 3 or (len(parts) == 1 and not self.output_size):
            raise PPLLaVAError(
                f"{what} needs kernel and stride, or an output size, "
                "or an output size with one of the others; "
                f"not {self}"
            )
        one_frame = Windows(
            *(part and (1, part[1], part[2]) for part in (self.kernel, self.stride, self.output_size))
        )
        try:
            one_frame.resolve((1, *grid))
        except PPLLaVAError as error:
            raise PPLLaVAError(f"{what} over a grid of {grid[0]}x{grid[1]} patches: {error}") from None

    def min_frames(self) -> int:
        """The fewest frames that fill one window."""
        if self.kernel:
            return self.kernel[0]
        assert self.output_size
        return (self.output_size[0] - 1) * (self.stride[0] if self.stride else 1) + 1

    def __str__(self) -> str:
        parts = (("kernel", self.kernel), ("stride", self.stride), ("output size", self.output_size))
        return ", ".join(f"{name} {','.join(map(str, part))}" for name, part in parts if part) or "nothing"

    def as_json(self) -> dict[str, list[int] | None]:
        """The form in manifest.json."""
        return {
            "kernel": list(self.kernel) if self.kernel else None,
            "stride": list(self.stride) if self.stride else None,
            "output_size": list(self.output_size) if self.output_size else None,
        }

    @staticmethod
    def from_json(value: Any) -> Windows:
        """The inverse of as_json.

        Raises:
            ValueError: A part isn't a triple of whole numbers from 1 to 4096.
        """
        try:
            return msgspec.convert(value, Windows)
        except msgspec.ValidationError as error:
            raise ValueError(f"pooling windows: {error}") from None


def within_budget(windows: Windows, size: Triple, tokens: int) -> Windows:
    """Choose windows that give as many visual tokens as a budget allows. They don't overlap.

    Windows grow along time first, then over rows and columns, so a longer video costs no more than a short
    one.

    Args:
        windows: The model's own windows; their rows and columns are kept where the budget allows.
        size: The input's (frames, rows, columns).
        tokens: The budget: maximum number of visual tokens.

    Raises:
        PPLLaVAError: The budget is below 1.
    """
    if tokens < 1:
        raise PPLLaVAError(f"tokens must be 1 or more, not {tokens}")
    _, kernel, _ = windows.resolve(size)
    frames, rows, columns = size
    for grow in range(max(rows, columns)):
        height = min(kernel[1] + grow, rows)
        width = min(kernel[2] + grow, columns)
        per_frame = (rows // height) * (columns // width)
        if per_frame <= tokens:
            window = (-(-frames // min(frames, tokens // per_frame)), height, width)
            return Windows(window, window, None)
    raise AssertionError("one window over all patches gives one token a frame")


def _check_axis(axis: str, size: int, kernel: int, stride: int, output: int) -> None:
    """Refuse windows that don't fit along one axis."""
    if kernel > size:
        raise PPLLaVAError(
            f"pooling windows don't fit: a window of {kernel} {axis} is larger than the {size} there are"
        )
    if kernel < 1 or stride < 1 or output < 1:
        raise PPLLaVAError(
            f"pooling windows don't fit: {size} {axis} can't give {output} windows of {kernel} "
            f"with stride {stride}"
        )
    windows = (size - kernel) // stride + 1
    if windows != output:
        raise PPLLaVAError(
            f"pooling of {size} {axis} with window {kernel} and stride {stride} gives {windows} windows, "
            f"not the {output} of the output size"
        )


def _each(rule: Callable[..., int], *triples: Triple) -> Triple:
    """Apply a rule along each axis."""
    a, b, c = (rule(*values) for values in zip(*triples))
    return a, b, c
