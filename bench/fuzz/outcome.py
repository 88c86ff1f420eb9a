"""What one input did to the code that reads it, and which outcomes count as findings."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from typing import Any

LONGEST_MESSAGE = 300  # characters of an error's line, without the paths in it


@dataclass
class Outcome:
    """One input's outcome.

    Attributes:
        target: The target's name.
        kind: "ok"; "refused": a PPLLaVAError in one line. Findings: "signal", "exit", "timeout", "memory",
            "exception", "message", "unexpected" (a wrong result), "stdout", "opened", "connected".
        place: What tells findings of one kind apart: the error's type and function, the signal's name.
        detail: A traceback, or the message.
        features: Numbers of the lines of the package that ran and of the messages that were logged, as far
            as the server had not reported them before.
        seconds: Wall clock.
        memory: Peak resident memory above an idle child's, in bytes.
    """

    target: str
    kind: str
    place: str = ""
    detail: str = ""
    features: list[int] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0

    @property
    def is_finding(self) -> bool:
        """Whether the input did what no input should do."""
        return self.kind not in ("ok", "refused")

    @property
    def signature(self) -> str:
        """A short name that inputs with the same fault share: target, kind and place."""
        place = re.sub(r"[^A-Za-z0-9_.]+", "-", self.place).strip("-")[:80]
        return "-".join(part for part in (self.target, self.kind, place) if part)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Outcome:
        """The inverse of vars()."""
        return cls(**value)


def message_problem(message: str, paths: tuple[str, ...]) -> str:
    """What is wrong with an error's message: "" if it is one short, printable line.

    Args:
        message: The message.
        paths: Paths in it that don't count towards its length.
    """
    if "\n" in message or "\r" in message:
        return "several lines"
    if not message.strip():
        return "empty"
    if not message.isprintable():
        return "control characters"
    for path in paths:
        message = message.replace(path, "")
    return f"more than {LONGEST_MESSAGE} characters" if len(message) > LONGEST_MESSAGE else ""


def message_feature(message: str) -> int:
    """A number that messages share which differ only in numbers, addresses and names of files."""
    text = re.sub(r"0x[0-9a-f]+|/\S+|'[^']*'|`[^`]*`|\"[^\"]*\"", "", message[:200])
    return zlib.crc32(re.sub(r"-?\d+(\.\d+)?", "#", text).encode())
