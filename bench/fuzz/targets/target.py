"""What a target is, and what it may report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppllava_edge.runtime.media.limits import MediaLimits

# Small, so that the memory and time of a child show whether they are kept.
LIMITS = MediaLimits(
    max_side=4096,
    max_frame_pixels=1 << 21,
    max_pixels=1 << 27,
    max_animation_pixels=1 << 25,
    max_packets=100_000,
    max_files=10_000,
    decode_seconds=5.0,
    memory=1 << 30,
)


class Unexpected(Exception):
    """A target found a wrong result. The text before the first colon tells findings apart."""


@dataclass(frozen=True)
class Target:
    """Code that reads files, and the files it reads.

    Attributes:
        name: Its name on the command line.
        run: Called with the input's path and an empty folder. Raises PPLLaVAError for an input that it
            refuses, Unexpected for a wrong result.
        suffix: The suffix of its inputs.
        grammar: The structure of its inputs, by its name in inputs/trees.py; "": mutated blindly only.
        weight: How often it is chosen, relative to others.
    """

    name: str
    run: Callable[[Path, Path], None]
    suffix: str
    grammar: str = ""
    weight: float = 1.0


def expect(condition: Any, what: str) -> None:
    """Raise Unexpected unless a condition holds."""
    if not condition:
        raise Unexpected(what)
