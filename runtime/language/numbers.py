"""Numbers from the app: checked before they are used, with errors of one line."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import PPLLaVAError, PromptError


def finite_number(name: str, value: Any, error: type[PPLLaVAError] = PromptError) -> float:
    """A finite number as a float.

    Args:
        name: The argument's name, for the error.
        value: Python's numbers, numpy's, and what else converts to float; no text, no truth value.
        error: The error to raise.

    Raises:
        PPLLaVAError: If the value is something else, infinite or NaN.
    """
    try:
        number = math.nan if isinstance(value, str | bytes | bool | np.bool_) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise error(f"{name} must be a finite number, not {_shown(value)}")
    return number


def integer(
    name: str, value: Any, least: int, most: int | None = None, error: type[PPLLaVAError] = PromptError
) -> int:
    """An integer within limits.

    Args:
        name: The argument's name, for the error.
        value: Python's integers and numpy's; no truth value.
        least, most: The smallest and the largest value allowed.
        error: The error to raise.

    Raises:
        PPLLaVAError: If the value is something else, or out of range.
    """
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except (TypeError, RuntimeError):
        number = None
    if number is None or number < least or (most is not None and number > most):
        limits = f"an integer, {least} or more" if most is None else f"an integer from {least} to {most}"
        raise error(f"{name} must be {limits}, not {_shown(value)}")
    return number


def _shown(value: object) -> str:
    """A wrong value for an error message: one short line."""
    try:
        text = repr(value)
    except Exception:  # of the app's own class, or an integer of thousands of digits
        text = ""
    return text if 0 < len(text) <= 40 and text.isprintable() else f"of type {type(value).__name__}"
