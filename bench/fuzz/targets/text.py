"""Targets that read texts: questions, files of questions, earlier outputs of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from ppllava_edge.bench.fuzz.targets.target import Target, expect
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.errors import MediaError, PPLLaVAError
from ppllava_edge.runtime.batch import read_questions, run_batch
from ppllava_edge.runtime.language.detokenizer import Detokenizer
from ppllava_edge.runtime.language.text_processor import TextProcessor, clean_question


class NoVideos:
    """Stands in for a VideoQA in a batch whose videos can't be opened."""

    def open(self, path: Path, **options: Any) -> NoReturn:
        """Refuse every video."""
        raise MediaError(f"{path.name} is not opened here")


def continue_batch(path: Path, scratch: Path) -> None:
    """Resume a batch whose output holds this text: what isn't its own must stay as it is."""
    before = path.read_bytes()
    videos, output = scratch / "videos", scratch / "answers.jsonl"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(b"0")
    output.write_bytes(before)
    try:
        run_batch(NoVideos(), videos, ["What is shown?"], output)  # type: ignore[arg-type]
    except PPLLaVAError:
        expect(output.read_bytes() == before, "output: refused, but changed")
        raise
    whole = before[: before.rfind(b"\n") + 1]
    expect(output.read_bytes().startswith(whole), "output: lines were lost")


def ask_text(path: Path, scratch: Path) -> None:
    """Tokenize a question that a user typed: no special token may come of it."""
    from tokenizers import Tokenizer

    question = clean_question(path.read_bytes().decode(errors="replace"))
    text = TextProcessor(Bundle.open(scratch.parent / "bundle"))
    ids, _ = text.question_ids(question)
    plain, _ = text.question_ids("what")
    expect(ids[0, -1] == plain[0, -1], "question: its last token isn't the end token")
    added = Tokenizer.from_file(str(text.bundle.file("tokenizer.json"))).get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}

    def count(pieces: list[list[int]]) -> int:
        return sum(i in special for piece in pieces for i in piece)

    expect(count(text.prompt_pieces(question)) == count(text.prompt_pieces("what")), "prompt: special tokens")
    follow_up = text.follow_up_ids(question)
    expect(count([follow_up]) == count([text.follow_up_ids("what")]), "follow-up: special tokens")
    detokenizer = Detokenizer(text.tokenizer.decode, ["END"])
    pieces = [detokenizer.push(i) for i in follow_up]
    expect("END" not in "".join(pieces) + detokenizer.finish(), "detokenizer: a stop string came out")


def list_questions(path: Path, scratch: Path) -> None:
    """Read a file of questions."""
    expect(all(question.strip() for question in read_questions(str(path))), "questions: an empty one")


TEXT_TARGETS: tuple[Target, ...] = (
    Target("batch", continue_batch, ".jsonl", "text"),
    Target("question", ask_text, ".txt", "text", 0.7),
    Target("questions", list_questions, ".txt", "text", 0.3),
)
