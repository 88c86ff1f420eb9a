"""Draw docs/images/architecture.svg from the code: the rooms, the path of a frame and of a question.

    python docs/scripts/draw_architecture.py

Rooms come from the import contracts in pyproject.toml, what lives in them from their `__init__`, files
from the folders. Every step names a function that must exist and must call the names listed with it, so the
picture can't show a path that the code doesn't take. tests/project/test_architecture.py runs the same checks.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PICTURE = ROOT / "docs" / "images" / "architecture.svg"


@dataclass(frozen=True)
class Step:
    """One step of a path. calls: names that its function must call."""

    file: str
    function: str
    does: str
    calls: tuple[str, ...] = ()

    @property
    def room(self) -> str:
        """The room that the file lies in: "session" for runtime/session/video.py, "engines" for engines."""
        parts = Path(self.file).parts
        return parts[1].removesuffix(".py") if parts[0] == "runtime" else parts[0]


FRAME = (
    Step("runtime/video_qa.py", "VideoQA.open", "a video is opened", ("encode_source",)),
    Step("runtime/encoding/encode_source.py", "_encode", "source → features", ("_chosen", "run")),
    Step("runtime/encoding/encode_source.py", "_chosen", "which frames", ("choose_frames",)),
    Step("runtime/vision/frame_choice.py", "choose_frames", "the middle of equal parts"),
    Step("runtime/media/readers.py", "VideoReader.frames", "decoded from the key frame before each"),
    Step(
        "runtime/encoding/frame_encoder.py",
        "FrameEncoder.run",
        "in the background",
        ("prefetch", "_prepare"),
    ),
    Step("runtime/media/prefetch.py", "prefetch", "ahead of the engine"),
    Step(
        "runtime/encoding/frame_encoder.py",
        "FrameEncoder._prepare",
        "frame after frame",
        ("preprocess_video",),
    ),
    Step("runtime/vision/preprocess.py", "preprocess_video", "resized and normalised"),
    Step("runtime/pipeline/clip.py", "ClipEncoder.add", "a batch at a time", ("encode_trunk",)),
    Step("runtime/pipeline/cpu.py", "CpuPipeline.encode_trunk", "vision tower → states", ("trunk",)),
    Step("runtime/pipeline/cpu.py", "CpuPipeline.branch", "all frames of the clip → features", ("stage",)),
    Step("engines/backends/onnxruntime_stage.py", "Stage.__call__", "each stage is one graph"),
)
QUESTION = (
    Step("runtime/session/video.py", "Video.ask", "a question is asked", ("stream",)),
    Step(
        "runtime/session/answer_stream.py",
        "AnswerRun._admit",
        "waits for admission",
        ("_turn", "_admission", "_prepare"),
    ),
    Step(
        "runtime/session/answer_stream.py",
        "AnswerRun._prepare",
        "the video is pooled for it",
        ("prepare", "_generate"),
    ),
    Step(
        "runtime/session/video.py",
        "Video._pool",
        "stage by stage",
        ("question_ids", "encode_question", "visual_tokens"),
    ),
    Step("runtime/language/text_processor.py", "TextProcessor.question_ids", "question → token ids"),
    Step("runtime/pipeline/cpu.py", "CpuPipeline.encode_question", "question tower → q", ("stage",)),
    Step(
        "runtime/pipeline/base.py",
        "BasePipeline.window_weights",
        "similarity of every patch",
        ("patch_weights",),
    ),
    Step("runtime/pipeline/cpu.py", "CpuPipeline.pool_windows", "features → visual tokens", ("stage",)),
    Step("runtime/session/answer_stream.py", "AnswerRun._generate", "one token a turn", ("stream_text",)),
    Step("runtime/decoding/generate.py", "generate_ids", "prefill, then decode", ("feed", "verify")),
    Step("runtime/decoding/kv_cache.py", "InPlaceSequence.feed", "KV cache, written in place"),
    Step("runtime/language/detokenizer.py", "stream_text", "token ids → text"),
)


def rooms() -> list[str]:
    """The rooms of runtime from top to bottom, as the import contract in pyproject.toml lists them."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    at = lines.index('containers = ["ppllava_edge.runtime"]')
    layers = next(line for line in lines[at:] if line.startswith("layers = "))
    return [*ast.literal_eval(layers.removeprefix("layers = ")), "engines"]


def summary(room: str) -> str:
    """The first sentence of a room's docstring."""
    folder = ROOT / room if room == "engines" else ROOT / "runtime" / room
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split())
    return text.split(". ")[0].rstrip(".")


def files(room: str) -> list[str]:
    """Names of a room's files or, for engines, its rooms."""
    folder = ROOT / room if room == "engines" else ROOT / "runtime" / room
    if not folder.is_dir():
        return []
    inner = [path.name for path in folder.iterdir() if path.is_dir() and (path / "__init__.py").is_file()]
    modules = [] if room == "engines" else [p.stem for p in folder.glob("*.py") if p.stem != "__init__"]
    return sorted(inner + modules)


def function_node(step: Step) -> ast.AST | None:
    """The function or method of a step in its file's syntax tree; None if it isn't there."""
    node: ast.AST | None = ast.parse((ROOT / step.file).read_text())
    for name in step.function.split("."):
        inner = getattr(node, "body", [])
        node = next((n for n in inner if getattr(n, "name", None) == name), None)
    return node


def mistakes() -> list[str]:
    """What the steps say that the code doesn't; empty if the picture is true."""
    found = []
    for step in (*FRAME, *QUESTION):
        node = function_node(step)
        if node is None:
            found.append(f"{step.file} has no {step.function}")
            continue
        called = {n.func for n in ast.walk(node) if isinstance(n, ast.Call)}
        names = {
            f.id if isinstance(f, ast.Name) else f.attr
            for f in called
            if isinstance(f, ast.Name | ast.Attribute)
        }
        found += [
            f"{step.file}: {step.function} doesn't call {name}" for name in step.calls if name not in names
        ]
    return found + [
        f"{s.file} is in no room of the contract" for s in (*FRAME, *QUESTION) if s.room not in rooms()
    ]


WIDTH, LEFT, MIDDLE, LINE, PAD = 1180, 330, 520, 17, 12
COLORS = {"frame": "#0b6e99", "question": "#a3480c"}
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.room{font-weight:600;font-size:14px}"
    ".band{fill:#f6f7f8;stroke:#dcdfe3}.says{fill:#444}.files{fill:#777;font-size:11px}.step{font-size:11.5px}.number{fill:#fff;font-weight:600;font-size:10px}"
)


def draw() -> str:
    """The picture as SVG."""
    steps = {"frame": FRAME, "question": QUESTION}
    y, bands, dots = 64, [], {"frame": dict[int, tuple[int, int]](), "question": dict[int, tuple[int, int]]()}
    for room in rooms():
        here = {
            way: [i for i, s in enumerate(way_steps) if s.room == room] for way, way_steps in steps.items()
        }
        says, names = wrapped(summary(room), 72), wrapped(", ".join(files(room)), 80)
        rows = max(len(here["frame"]), len(here["question"]), 1 + len(says) + len(names))
        height = rows * LINE + 2 * PAD
        bands.append(band(room, y, height, says, names))
        for way, numbers in here.items():
            for row, number in enumerate(numbers):
                x = 26 if way == "frame" else LEFT + MIDDLE + 26
                dots[way][number] = (x, y + PAD + row * LINE + 8)
                bands.append(label(steps[way][number], x + 14, dots[way][number][1] + 4))
        y += height + 6
    circles = [circle(at, n, COLORS[way]) for way in steps for n, at in sorted(dots[way].items())]
    heads = [
        heading(20, "path of a frame"),
        heading(LEFT + 20, "rooms: each imports only rooms below it"),
        heading(LEFT + MIDDLE + 20, "path of a question"),
    ]
    size = f'width="{WIDTH}" height="{y + 10}" viewBox="0 0 {WIDTH} {y + 10}"'
    box = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    back = f'<rect width="{WIDTH}" height="{y + 10}" fill="#fff"/>'
    return "\n".join([box, f"<style>{STYLE}</style>", back, *heads, *bands, *circles, "</svg>"]) + "\n"


def heading(x: int, text: str) -> str:
    """A column's title."""
    return f'<text x="{x}" y="34" class="room">{text}</text>'


def wrapped(text: str, width: int) -> list[str]:
    """Text in lines of at most `width` characters."""
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def band(room: str, y: int, height: int, says: list[str], names: list[str]) -> str:
    """A room: its name, what lives there, its files."""
    x, at = LEFT + 16, y + PAD + 11
    parts = [
        f'<rect x="8" y="{y}" width="{WIDTH - 16}" height="{height}" rx="6" class="band"/>',
        f'<rect x="{LEFT}" y="{y}" width="{MIDDLE}" height="{height}" fill="#eceff2"/>',
        f'<text x="{x}" y="{at}" class="room">{escape(f"{room}/" if names else f"{room}.py")}</text>',
    ]
    for kind, lines in (("says", says), ("files", names)):
        for text in lines:
            at += LINE
            parts.append(f'<text x="{x}" y="{at}" class="{kind}">{escape(text)}</text>')
    return "\n".join(parts)


def label(step: Step, x: int, y: int) -> str:
    """A step's function, and what it does."""
    does = f' <tspan fill="#666">{escape(step.does)}</tspan>' if step.does else ""
    return f'<text x="{x}" y="{y}" class="step">{escape(step.function.split(".")[-1])}{does}</text>'


def circle(at: tuple[int, int], number: int, color: str) -> str:
    """A step's number."""
    x, y = at
    text = f'<text x="{x}" y="{y + 3.5}" class="number" text-anchor="middle">{number + 1}</text>'
    return f'<circle cx="{x}" cy="{y}" r="8" fill="{color}"/>{text}'


def main() -> int:
    """Write the picture. Returns 1, and says why, if a step isn't in the code."""
    found = mistakes()
    if found:
        print("\n".join(found), file=sys.stderr)
        return 1
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
