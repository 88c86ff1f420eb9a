"""Findings that are known and can't be mended here: faults of the libraries in which files are decoded."""

from __future__ import annotations

import re

# pattern of a signature → what is known about it
KNOWN: dict[str, str] = {}


def known_reason(signature: str) -> str:
    """What is known about a finding; "" if it is new."""
    return next((reason for pattern, reason in KNOWN.items() if re.fullmatch(pattern, signature)), "")
