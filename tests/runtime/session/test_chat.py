"""Chats: later questions reuse the visual tokens and the KV cache."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import SAMPLE
from helpers.gpu_engine import asking
from helpers.stream_server import wait_until
from ppllava_edge import BusyError, EngineError, MediaError, PromptError, VideoQA
from ppllava_edge.runtime.session.chat import Chat

QUESTION, ANSWER, DESCRIBE = "What color is the circle?", "red", "Describe the video."


@pytest.fixture(scope="module")
def qa() -> VideoQA:
    return VideoQA(device="cpu")


def test_a_chat_prefills_only_new_tokens_and_answers_as_a_full_prompt_would(
    tiny_bundle: Path, video_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every turn the kept cache gives the same answer as prefilling the whole conversation."""
    qa = VideoQA(tiny_bundle, device="cpu")
    lengths: list[int] = []
    generate = qa.pipeline.generate

    def counted(prompt: Any, *arguments: Any) -> Any:
        lengths.append(len(prompt))
        return generate(prompt, *arguments)

    monkeypatch.setattr(qa.pipeline, "generate", counted)
    kept, whole = (qa.open(video_file, frames=8, keep="tokens") for _ in range(2))
    said = []
    for n, question in enumerate(["What moves?", "And then?", "Why is it red?"]):
        answer = kept.ask(question, max_new_tokens=9)
        chat = whole._chat
        assert chat is not None
        chat._drop_cache()  # everything is prefilled again
        again = whole.ask(question, max_new_tokens=9)
        said.append((answer.text, again.text))
        if n:
            assert answer.timings["pooling"] == answer.timings["question"] == answer.timings["vision"] == 0
            assert lengths[-2] < 60 < lengths[-1], "the kept cache prefills the new turn only"
    assert all(a == b for a, b in said), said


def test_prefix_answers_as_if_nothing_had_been_asked_before(qa: VideoQA) -> None:
    video = qa.open(SAMPLE, keep="prefix")
    first = video.ask(QUESTION)
    other = video.ask("How many objects are there?")
    assert first.text == ANSWER and video.ask(QUESTION).text == ANSWER
    assert other.visual_tokens == first.visual_tokens
    assert other.timings["pooling"] == 0 and other.moments == []


def test_a_chat_continues_after_a_closed_answer_and_ends_at_the_context(qa: VideoQA) -> None:
    video = qa.open(SAMPLE, keep="tokens")
    stream = video.stream(DESCRIBE)
    next(stream)
    stream.close()
    assert video.ask(QUESTION, max_new_tokens=4).text is not None
    with pytest.raises(PromptError, match=r"the conversation has \d+ tokens, the model's context is 512"):
        for _ in range(100):
            video.ask(DESCRIBE, max_new_tokens=60)
    with pytest.raises(MediaError, match="keep must be"):
        qa.open(SAMPLE, keep="everything")


def test_one_question_at_a_time_in_a_chat(qa: VideoQA) -> None:
    video = qa.open(SAMPLE, keep="prefix")
    open_one = video.stream(QUESTION)
    next(open_one)
    with pytest.raises(PromptError, match="last answer is not finished"):
        video.ask(QUESTION)
    found: list[str] = []
    waiting = video.stream(QUESTION)
    thread = threading.Thread(target=lambda: found.extend(waiting))
    thread.start()
    time.sleep(0.1)
    waiting.close()
    thread.join(5)
    assert not thread.is_alive() and not found and waiting.answer.finish == "cancelled"
    errors: list[Exception] = []

    def late() -> None:
        try:
            video.ask(QUESTION, timeout=0.1)
        except BusyError as error:
            errors.append(error)

    thread = threading.Thread(target=late)
    thread.start()
    thread.join(5)
    assert "still being answered" in str(errors[0])
    open_one.close()
    assert video.ask(QUESTION).text == ANSWER and qa.admission.held == 0


def test_a_chat_keeps_one_cache_while_it_has_room(qa: VideoQA) -> None:
    video = qa.open(SAMPLE, keep="tokens")
    chat = video._chat
    assert isinstance(chat, Chat)
    caches = set()
    for _ in range(4):
        video.ask(QUESTION, max_new_tokens=4)
        caches.add(id(chat.sequence))
        filled = chat.prefix + len(chat.after)
        assert filled - 1 <= chat.sequence.length <= filled
    assert len(caches) == 1


def test_prefix_over_a_cache_that_cannot_forget(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lowered graphs on a GPU: the cache is dropped and the prompt read anew, no question token is lost.

    The second question is longer than the first one with its answer: it would be read from behind those.
    """
    longer = "Is there a red circle, and where is the blue square, and what color is the circle?"
    pipeline, *_ = opened("orin-jp6")
    qa, prompts, make_prompt = asking(pipeline), list[tuple[int, list[int]]](), pipeline.prompt

    def recorded(before: Any, visual: Any, after: Any) -> Any:
        prompts.append((len(visual), list(after)))
        return make_prompt(before, visual, after)

    monkeypatch.setattr(pipeline, "prompt", recorded)
    chat = qa.open(SAMPLE, keep="prefix")
    answers = [chat.ask(question, max_new_tokens=8).text for question in ("Is there a red circle?", longer)]
    assert prompts[1] == (36, qa.text.prompt_pieces(longer)[1])
    assert answers[0] == "yes" and answers[1]


@pytest.mark.parametrize("failure", ["too long", "closed before the first token", "engine error"])
def test_a_chat_whose_first_question_failed_begins_afresh(
    qa: VideoQA, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    want = qa.open(SAMPLE, keep="tokens").ask(QUESTION)
    video = qa.open(SAMPLE, keep="tokens")
    if failure == "too long":
        with pytest.raises(PromptError):
            video.ask("Where is the blue square? " * 400)
    elif failure == "engine error":
        generate = qa.pipeline.generate

        def broken(*arguments: Any) -> Iterator[int]:
            yield from itertools.islice(generate(*arguments), 2)
            raise EngineError("out of memory")

        monkeypatch.setattr(qa.pipeline, "generate", broken)
        with pytest.raises(EngineError, match="out of memory"):
            video.ask(DESCRIBE)
        monkeypatch.undo()
    else:
        stream = video.stream(DESCRIBE)
        prepare = video.prepare

        def cancelled(*arguments: Any) -> Any:
            prepared = prepare(*arguments)
            stream.close()  # after the video was pooled for this question
            return prepared

        monkeypatch.setattr(video, "prepare", cancelled)
        assert stream.exhaust().finish == "cancelled" and stream.answer.new_tokens == 0
        monkeypatch.undo()
    answer = video.ask(QUESTION)
    assert (answer.text, answer.text_tokens) == (want.text, want.text_tokens) == (ANSWER, want.text_tokens)
    assert answer.timings["pooling"] > 0, "it pools for this question"
    assert video.ask(QUESTION).timings["pooling"] == 0, "now the chat has begun"
    assert qa.admission.held == 0


def test_an_engine_error_in_a_later_answer_leaves_the_chat_as_it_was(
    qa: VideoQA, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, whole = (qa.open(SAMPLE, keep="tokens") for _ in range(2))
    assert broken.ask(QUESTION).text == whole.ask(QUESTION).text
    generate = qa.pipeline.generate

    def failing(*arguments: Any) -> Iterator[int]:
        yield from itertools.islice(generate(*arguments), 2)
        raise EngineError("out of memory")

    monkeypatch.setattr(qa.pipeline, "generate", failing)
    with pytest.raises(EngineError):
        broken.ask(DESCRIBE)
    monkeypatch.undo()
    assert broken.ask(DESCRIBE).text == whole.ask(DESCRIBE).text


def test_questions_that_wait_for_a_chat_hold_no_slot_and_are_bounded() -> None:
    qa = VideoQA(device="cpu", parallel=2, queue=3)
    chat, other = qa.open(SAMPLE, keep="prefix"), qa.open(SAMPLE)
    unfinished, answers, errors = chat.stream(QUESTION), list[str](), list[Exception]()
    next(unfinished)

    def ask() -> None:
        try:
            answers.append(chat.ask(QUESTION).text)
        except BusyError as error:
            errors.append(error)

    assert chat._chat is not None
    waiting = [threading.Thread(target=ask) for _ in range(3)]
    for n, thread in enumerate(waiting):
        thread.start()
        assert wait_until(lambda n=n: chat._chat.turn.waiting == n + 1)  # type: ignore[misc, union-attr]
    assert qa.admission.held == 1 and qa.admission.waiting == 0
    fourth = threading.Thread(target=ask)
    fourth.start()
    fourth.join(10)
    assert [str(error) for error in errors] == [
        "3 questions of this chat are waiting already, 1 under way; try again later"
    ]
    found: list[str] = []
    elsewhere = threading.Thread(target=lambda: found.append(other.ask(QUESTION, timeout=20).text))
    elsewhere.start()
    elsewhere.join(20)
    assert found == [ANSWER]
    unfinished.close()
    for thread in waiting:
        thread.join(20)
    assert answers == [ANSWER] * 3 and qa.admission.held == chat._chat.turn.held == 0


def test_a_thread_with_an_unfinished_answer_does_not_wait_for_a_chat() -> None:
    """The chat's question may be waiting for this thread's slot."""
    qa = VideoQA(device="cpu", parallel=1, queue=2)
    chat, other = qa.open(SAMPLE, keep="tokens"), qa.open(SAMPLE)
    answers: list[str] = []
    with other.stream(DESCRIBE) as unfinished:
        next(unfinished)
        thread = threading.Thread(target=lambda: answers.append(chat.ask(QUESTION).text))
        thread.start()  # takes the turn, waits for the slot
        assert wait_until(lambda: qa.admission.waiting == 1)
        with pytest.raises(BusyError, match="1 unfinished answer itself"):
            chat.ask(QUESTION)
    thread.join(20)
    assert answers == [ANSWER] and chat.ask(QUESTION).text and qa.admission.held == 0


def test_closing_the_model_wakes_questions_that_wait_for_a_chat() -> None:
    qa = VideoQA(device="cpu", parallel=2)
    chat = qa.open(SAMPLE, keep="tokens")
    unfinished, errors = chat.stream(DESCRIBE), list[Exception]()
    next(unfinished)
    waiting = chat.stream(QUESTION)

    def work() -> None:
        try:
            waiting.exhaust()
        except EngineError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert chat._chat is not None and wait_until(lambda: chat._chat.turn.waiting == 1)  # type: ignore[union-attr]
    qa.close()
    thread.join(10)
    assert len(errors) == 1 and "closed" in str(errors[0]) and waiting.answer.finish == "error"
    assert unfinished.exhaust().finish == "cancelled" and chat._chat.turn.held == qa.admission.held == 0
