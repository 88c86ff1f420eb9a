"""Write docs/reference.md from the public API's docstrings.

python docs/build_reference.py            # --check: only say whether it is up to date
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import ppllava_edge
from ppllava_edge.runtime import batch
from ppllava_edge.runtime.live.status import LiveStatus
from ppllava_edge.runtime.live.watch import Watch

TARGET = Path(__file__).parent / "reference.md"
ORDER = (
    "VideoQA",
    "Video",
    "Answer",
    "AnswerStream",
    "Moment",
    "Live",
    "LiveStatus",
    "Watch",
    "Sampling",
    "FeatureCache",
    "run_batch",
    "Pipeline",
    "PPLLaVAError",
    "BundleError",
    "MediaError",
    "PromptError",
    "EngineError",
    "BusyError",
)
ELSEWHERE = {"LiveStatus": LiveStatus, "Watch": Watch, "run_batch": batch.run_batch}
INHERITED = {"with_traceback", "add_note", "count", "index"}  # not ours


def signature(thing: Any) -> str:
    """As it is called, "" if Python can't say."""
    try:
        plain = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    parameters = [
        p.replace(annotation=_unquoted(p.annotation))
        for name, p in plain.parameters.items()
        if name not in ("self", "cls")
    ]
    return str(
        plain.replace(parameters=parameters, return_annotation=_unquoted(plain.return_annotation))
    ).replace(" = <factory>", "")


class _Words:
    """An annotation that prints as it was written."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _unquoted(annotation: Any) -> Any:
    return _Words(annotation) if isinstance(annotation, str) else annotation


def document(name: str, thing: Any) -> list[str]:
    """A chapter about a class or a function."""
    where = thing.__module__
    lines = [
        f"## {name}",
        "",
        f"`{'from ppllava_edge import ' + name if hasattr(ppllava_edge, name) else f'from {where} import {name}'}`",
        "",
    ]
    if not (inspect.isclass(thing) and issubclass(thing, Exception)):
        lines += ["```python", f"{name}{signature(thing)}", "```", ""]
    lines += [inspect.cleandoc(thing.__doc__ or ""), ""]
    if not inspect.isclass(thing):
        return lines
    for member, value in _members(thing).items():
        if member.startswith("_") or member in INHERITED:
            continue
        raw = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if isinstance(raw, property) or type(raw).__name__ == "cached_property":
            text = inspect.cleandoc((raw.fget if isinstance(raw, property) else raw.func).__doc__ or "")  # type: ignore[attr-defined]
            lines += [f"**`.{member}`** {text}", ""]
        elif inspect.isfunction(raw):
            lines += [
                f"**`{'async ' if inspect.iscoroutinefunction(raw) else ''}.{member}{signature(raw)}`**",
                "",
                inspect.cleandoc(raw.__doc__ or ""),
                "",
            ]
    return lines


def _members(thing: type) -> dict[str, Any]:
    """A class's own attributes, then those of its base classes in this package."""
    members: dict[str, Any] = {}
    for cls in thing.__mro__:
        if cls.__module__.startswith("ppllava_edge."):
            members |= {name: value for name, value in vars(cls).items() if name not in members}
    return members


def reference() -> str:
    """The whole page."""
    lines = [
        "# API reference",
        "",
        "Made from the docstrings by `python docs/build_reference.py`. How things fit together: [runtime.md](runtime.md).",
        "",
    ]
    for name in ORDER:
        lines += document(name, ELSEWHERE[name] if name in ELSEWHERE else getattr(ppllava_edge, name))
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    made = reference()
    if "--check" in sys.argv:
        sys.exit(
            0
            if TARGET.read_text(encoding="utf-8") == made
            else "docs/reference.md is out of date: python docs/build_reference.py"
        )
    TARGET.write_text(made, encoding="utf-8")
