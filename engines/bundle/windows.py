"""Which windows pooling looks through: kernel, stride and output size, resolved for a clip's length.

Any two of the three give the third; upstream's rules (`get_size`) decide how, and what they can't make sense of is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ppllava_edge.engines.errors import PPLLaVAError

Triple = tuple[int, int, int]
_AXES = ("frames", "rows", "columns")


@dataclass(frozen=True)
class Windows:
    """Pooling windows over (frames, rows, columns). One or two of the three are None."""

    kernel: Triple | None
    stride: Triple | None
    output_size: Triple | None

    def resolve(self, size: Triple) -> tuple[Triple, Triple, Triple]:
        """Output size, kernel and stride for an input of size (T, rows, columns), as upstream's get_size does.

        Raises PPLLaVAError where upstream fails or returns scrambled values: windows that don't fit, or an output size that kernel and
        stride don't give.
        """
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
                "pooling needs exactly one or two of kernel, stride and output size (kernel alone and stride alone are not enough)"
            )
        assert kernel and stride and output
        for axis, i, k, s, o in zip(_AXES, size, kernel, stride, output):
            if k > i:
                raise PPLLaVAError(
                    f"pooling windows don't fit: a window of {k} {axis} is larger than the {i} there are"
                )
            if k < 1 or s < 1 or o < 1:
                raise PPLLaVAError(
                    f"pooling windows don't fit: {i} {axis} can't give {o} windows of {k} with stride {s}"
                )
            if (i - k) // s + 1 != o:
                raise PPLLaVAError(
                    f"pooling of {i} {axis} with window {k} and stride {s} gives {(i - k) // s + 1} windows, not the {o} of the output size"
                )
        return output, kernel, stride

    def check(self, grid: tuple[int, int], what: str) -> None:
        """Refuse at export what can't work for any clip: the frame axis is resolved later, with a clip's length."""
        parts = [part for part in (self.kernel, self.stride, self.output_size) if part]
        if any(value < 1 for part in parts for value in part):
            raise PPLLaVAError(f"{what}: kernel, stride and output size must be 1 or more")
        if not parts or len(parts) == 3 or (len(parts) == 1 and not self.output_size):
            raise PPLLaVAError(
                f"{what} needs kernel and stride, or an output size, or an output size with one of the others; not {self}"
            )
        frames = self.min_frames()
        flat = Windows(
            *(part and (1, part[1], part[2]) for part in (self.kernel, self.stride, self.output_size))
        )
        try:
            flat.resolve((1, *grid))
        except PPLLaVAError as error:
            raise PPLLaVAError(f"{what} over a grid of {grid[0]}x{grid[1]} patches: {error}") from None
        assert frames >= 1

    def min_frames(self) -> int:
        """The fewest frames that fill a window."""
        if self.kernel:
            return self.kernel[0]
        assert self.output_size
        return (self.output_size[0] - 1) * (self.stride[0] if self.stride else 1) + 1

    def __str__(self) -> str:
        parts = (("kernel", self.kernel), ("stride", self.stride), ("output size", self.output_size))
        return ", ".join(f"{name} {','.join(map(str, part))}" for name, part in parts if part) or "nothing"

    def as_json(self) -> dict[str, list[int] | None]:
        """The manifest's form."""
        return {
            name: list(part) if part else None
            for name, part in (
                ("kernel", self.kernel),
                ("stride", self.stride),
                ("output_size", self.output_size),
            )
        }

    @staticmethod
    def from_json(value: dict[str, list[int] | None]) -> Windows:
        """The inverse of as_json. Raises ValueError for anything but triples of positive whole numbers."""
        parts = []
        for name in ("kernel", "stride", "output_size"):
            part = value.get(name)
            if part is not None and (
                len(part) != 3 or any(not isinstance(v, int) or not 1 <= v <= 4096 for v in part)
            ):
                raise ValueError(f"{name} must be three whole numbers from 1 to 4096")
            parts.append(None if part is None else (part[0], part[1], part[2]))
        return Windows(*parts)


def within_budget(windows: Windows, size: Triple, tokens: int) -> Windows:
    """Windows over (T, rows, columns) that give at most `tokens` visual tokens, as many of them as can be: windows grow along time first, then
    over the patches, so that a longer video costs no more than a short one. They don't overlap.

    windows: the model's own; its rows and columns are kept where the budget allows. Raises PPLLaVAError for a budget below 1.
    """
    if tokens < 1:
        raise PPLLaVAError(f"--tokens must be 1 or more, not {tokens}")
    _, kernel, _ = windows.resolve(size)
    frames, rows, columns = size
    for grow in range(max(rows, columns)):  # each time a coarser grid of patches
        high, wide = min(kernel[1] + grow, rows), min(kernel[2] + grow, columns)
        each = (rows // high) * (columns // wide)
        if each <= tokens:
            window = (-(-frames // min(frames, tokens // each)), high, wide)
            return Windows(window, window, None)
    raise AssertionError("one window over all patches gives one token a frame")


def _each(rule: Callable[..., int], *triples: Triple) -> Triple:
    a, b, c = (rule(*values) for values in zip(*triples))
    return a, b, c
