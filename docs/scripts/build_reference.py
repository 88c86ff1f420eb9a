"""Write docs/reference.md from the public API's docstrings.

python docs/scripts/build_reference.py            # --check: only say whether it is up to date
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ForwardRef

import ppllava_edge
from ppllava_edge.runtime.batch import BatchResult, run_batch
from ppllava_edge.runtime.live.status import LiveStatus
from ppllava_edge.runtime.live.watch import Watch

TARGET = Path(__file__).parent.parent / "reference.md"
INTRODUCTION = """\
# API reference

Made from the docstrings by `python docs/scripts/build_reference.py`. How things fit together:
[runtime.md](runtime.md).
"""
ORDER = (
    "VideoQA",
    "Video",
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "Moment",
    "Live",
    "LiveStatus",
    "Watch",
    "Sampling",
    "FeatureCache",
    "MediaLimits",
    "Memory",
    "run_batch",
    "BatchResult",
    "Pipeline",
    "PPLLaVAError",
    "BundleError",
    "MediaError",
    "PromptError",
    "EngineError",
    "BusyError",
)
ELSEWHERE = {"LiveStatus": LiveStatus, "Watch": Watch, "run_batch": run_batch, "BatchResult": BatchResult}
INTERNAL = {  # public between the runtime's modules, but nothing for an app
    "VideoQA": ("check_usable", "check_process", "forked", "register", "load", "report", "report_later"),
    "Video": ("arrays", "release", "turn", "prepare", "empty_answer", "take_encoding_times"),
    "Live": ("arrays", "release"),
    "AnswerStream": ("request_close",),
}
LINE_LENGTH = 88  # of a signature; longer ones have a line per parameter
SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises):")
TITLES = {"Args": "Arguments"}
LISTS = ("Args", "Attributes", "Raises")
ITEM = re.compile(r"([\w*., ]+): (.*)", re.S)  # "start, end: Seconds."


def reference() -> str:
    """The whole page."""
    chapters = [INTRODUCTION]
    for name in ORDER:
        chapters += chapter(name, ELSEWHERE[name] if name in ELSEWHERE else getattr(ppllava_edge, name))
    return "\n".join(chapters).rstrip() + "\n"


def chapter(name: str, thing: Any) -> list[str]:
    """The Markdown of a class with its members, or of a function."""
    module = "ppllava_edge" if hasattr(ppllava_edge, name) else thing.__module__
    lines = [f"## {name}", "", f"`from {module} import {name}`", ""]
    is_error = inspect.isclass(thing) and issubclass(thing, Exception)
    if not is_error:
        lines += code_block(signature(name if inspect.isclass(thing) else f"def {name}", thing))
    lines += [markdown(thing.__doc__), ""]
    if inspect.isclass(thing):
        for member, value in public_members(thing):
            if member not in INTERNAL.get(name, ()):
                lines += member_lines(name, member, value)
    return lines


def public_members(cls: type) -> Iterator[tuple[str, Any]]:
    """Names and values of a class's documented members: its own, then those that it inherits from ours."""
    seen = set()
    for owner in cls.__mro__:
        if not owner.__module__.startswith("ppllava_edge"):
            continue
        for member, value in vars(owner).items():
            if not member.startswith("_") and member not in seen:
                seen.add(member)
                yield member, value


def member_lines(owner: str, member: str, value: Any) -> list[str]:
    """The Markdown of a property or a method; nothing for anything else."""
    function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
    if isinstance(function, (property, cached_property)):
        getter = function.fget if isinstance(function, property) else function.func
        return [f"### `{owner}.{member}`", "", markdown(getter.__doc__), ""]
    if not inspect.isfunction(function):
        return []
    keyword = "async def" if inspect.iscoroutinefunction(function) else "def"
    call = signature(f"{keyword} {member}", function)
    return [f"### `{owner}.{member}()`", "", *code_block(call), markdown(function.__doc__), ""]


def code_block(text: str) -> list[str]:
    """A fenced block of Python."""
    return ["```python", text, "```", ""]


# -- signatures ----------------------------------------------------------------------------------------------


def signature(name: str, thing: Any) -> str:
    """How a function or class is called, without self; only the name of what can't be called."""
    if inspect.isabstract(thing):
        return name
    try:
        plain = inspect.signature(thing)
    except (TypeError, ValueError):
        return name
    parameters = [
        parameter.replace(annotation=_as_written(parameter.annotation))
        for parameter_name, parameter in plain.parameters.items()
        if parameter_name not in ("self", "cls")
    ]
    result = "" if inspect.isclass(thing) else _as_written(plain.return_annotation)
    call = plain.replace(parameters=parameters, return_annotation=result or inspect.Signature.empty)
    one_line = f"{name}{call}".replace(" = <factory>", " = …")
    if len(one_line) <= LINE_LENGTH:
        return one_line
    return _one_parameter_a_line(name, call).replace(" = <factory>", " = …")


def _one_parameter_a_line(name: str, call: inspect.Signature) -> str:
    lines, keyword_only = [f"{name}("], False
    for parameter in call.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            lines.append("    *,")
            keyword_only = True
        lines.append(f"    {parameter},")
    returns = "" if call.return_annotation is call.empty else f" -> {call.return_annotation!r}"
    return "\n".join([*lines, f"){returns}"])


class _AsWritten:
    """An annotation that prints as it stands in the source."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _as_written(annotation: Any) -> Any:
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    return _AsWritten(annotation) if isinstance(annotation, str) else annotation


# -- docstrings ----------------------------------------------------------------------------------------------


def markdown(docstring: str | None) -> str:
    """A Google-style docstring as Markdown: arguments, attributes and errors become lists."""
    text, *sections = _sections(inspect.cleandoc(docstring or ""))
    blocks = [_escaped(text[1])]
    for title, body in sections:
        heading = f"{TITLES.get(title, title)}:"
        items = _items(body)
        if title in LISTS:
            blocks.append("\n".join([heading, "", *(_list_item(item) for item in items)]))
        else:
            blocks.append(f"{heading} {_escaped(' '.join(items))}")
    return "\n\n".join(block for block in blocks if block)


def _sections(text: str) -> list[tuple[str, list[str] | str]]:
    """("", the text before the sections), then (title, indented lines) of every section."""
    sections: list[tuple[str, Any]] = [("", [])]
    for line in text.splitlines():
        match = SECTION.fullmatch(line)
        if match:
            sections.append((match[1], []))
        else:
            sections[-1][1].append(line)
    return [("", "\n".join(sections[0][1]).strip()), *sections[1:]]


def _items(lines: list[str] | str) -> list[str]:
    """The items of a section: what is indented further continues the line above it."""
    items: list[str] = []
    for line in lines:
        if line.startswith("        ") and items:
            items[-1] += " " + line.strip()
        elif line.strip():
            items.append(line.strip())
    return items


def _list_item(item: str) -> str:
    match = ITEM.fullmatch(item)
    if not match:
        return f"- {_escaped(item)}"
    names = ", ".join(f"`{name.strip()}`" for name in match[1].split(","))
    return f"- {names}: {_escaped(match[2])}"


def _escaped(text: str) -> str:
    """Text in which Markdown finds no HTML and no emphasis; `code` stays."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;").replace("*", "\\*") for part in parts
    )


if __name__ == "__main__":
    page = reference()
    if "--check" in sys.argv:
        up_to_date = TARGET.read_text(encoding="utf-8") == page
        sys.exit(0 if up_to_date else f"docs/reference.md is out of date: python {sys.argv[0]}")
    TARGET.write_text(page, encoding="utf-8")
