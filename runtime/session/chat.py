"""A chat about one video: it keeps the first question's visual tokens and the KV cache.

Only new tokens are prefilled, and the model sees the earlier turns. The cost: the video stays pooled for the
first question (docs/runtime.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import BusyError, EngineError, PromptError
from ppllava_edge.runtime.language.text_processor import TextProcessor
from ppllava_edge.runtime.pipeline.base import BasePipeline
from ppllava_edge.runtime.session.admission import EndedEarly, FairSemaphore, Holder, Patience, Slot
from ppllava_edge.runtime.session.answer import GenerationOptions
from ppllava_edge.runtime.session.prepared import PooledVideo, PreparedQuestion

HEADROOM = 512  # positions that a new cache reserves for later turns


class Chat:
    """One video's visual tokens, the token ids around them, and a KV cache over the prefilled part.

    Args:
        pipeline: The model.
        text: Its tokenizers and prompt template.
        history: Whether the model sees the earlier turns.
        waiting: How many questions may wait for the last answer's end; None: any number.

    Attributes:
        answered: Whether a question was answered, in part at least. Until then the next one is the first.
        before: Token ids before the visual tokens.
        after: Token ids of everything that follows them: questions and answers.
        sequence: The KV cache; None until the first turn, and after a turn that produced no token.
        turn: Held while a question is answered: one at a time.
    """

    def __init__(
        self, pipeline: BasePipeline, text: TextProcessor, history: bool = True, waiting: int | None = None
    ):
        self.pipeline, self.text, self.history = pipeline, text, history
        self.answered = False
        self.pooled: PooledVideo | None = None
        self.before: list[int] = []
        self.after: list[int] = []
        self.sequence: Any = None
        self._is_answering = self._is_released = False
        self.turn = FairSemaphore(
            waiting=waiting,
            what="questions of this chat",
            unfinished="answer",
            advice="exhaust or close its streams first, or use `with video.stream(…) as stream:`",
        )

    def take_turn(self, patience: Patience, holder: Holder, elsewhere: int) -> Slot:
        """Wait for the last answer's end.

        Args:
            patience: When to give up.
            holder: The thread that takes the answer's pieces.
            elsewhere: Unfinished answers of the calling thread. If it has any it doesn't wait, because the
                chat may wait for one of their slots.

        Returns:
            The turn; release it after the answer.

        Raises:
            PromptError: If the calling thread's own last answer in this chat is not finished.
            BusyError: At the deadline, if too many wait, or if the calling thread may not wait.
            EndedEarly: If the question was cancelled.
        """
        if self.turn.held_here():
            raise PromptError(
                "the chat's last answer is not finished: exhaust its stream, or close it, first"
            )
        slot = self.turn.acquire(patience, holder, elsewhere)
        if slot is not None:
            return slot
        if patience.cancelled():
            raise EndedEarly("cancelled")
        raise BusyError(f"the chat's last question was still being answered after {patience.timeout:g} s")

    def prepare(
        self,
        question: str,
        options: GenerationOptions,
        timings: dict[str, float],
        pool: Callable[[], PooledVideo],
    ) -> PreparedQuestion:
        """Continue the chat with a question. The caller holds the turn.

        Args:
            question: The question.
            options: How to answer it.
            timings: Records seconds of question tower and pooling: 0 from the second turn on.
            pool: Pools the video, for the first turn.

        Returns:
            The question, ready to be answered.

        Raises:
            EngineError: If the options ask for look-ahead.
        """
        if options.look_ahead:
            raise EngineError('looking ahead and keep="tokens" or "prefix" don\'t go together')
        pooled, text_ids, new_ids = self._turn(question, timings, pool)
        return PreparedQuestion(pooled, text_ids, lambda lookup: self.generate(new_ids, options))

    def _turn(
        self, question: str, timings: dict[str, float], pool: Callable[[], PooledVideo]
    ) -> tuple[PooledVideo, list[int], list[int]]:
        """The pooled video, the prompt's token ids for the answer, and the ids to read."""
        if self.pooled is None or not self.answered:
            pooled = pool()
            before, new_ids = self.text.prompt_pieces(question)
            self.begin(pooled, before)
            return pooled, [*before, *new_ids], new_ids
        timings |= {"question": 0.0, "select": 0.0, "pooling": 0.0}
        new_ids = self.next_ids(question)
        return replace(self.pooled, moments=list), new_ids, new_ids  # no weights, so no moments

    def begin(self, pooled: PooledVideo, before: Sequence[int]) -> None:
        """Start with the video, pooled for the first question, and the token ids before it."""
        self.pooled, self.before, self.after = pooled, list(before), []

    @property
    def prefix(self) -> int:
        """Positions up to the last visual token."""
        return len(self.before) + (len(self.pooled.visual) if self.pooled is not None else 0)

    def next_ids(self, question: str) -> list[int]:
        """The token ids that a follow-up question adds to the prompt.

        With history: the end of the last answer, the roles, the question. Without: what follows the visual
        tokens; earlier questions and answers are taken out of the cache, or the cache is dropped if it can't
        take positions back.
        """
        if self.history:
            return self.text.follow_up_ids(question)
        self.after = []
        if self.sequence is not None and self.sequence.length > self.prefix:
            if self.sequence.can_forget:
                self.sequence.forget(self.sequence.length - self.prefix)
            else:
                self._drop_cache()
        return self.text.prompt_pieces(question)[1]

    def generate(self, new_ids: Sequence[int], options: GenerationOptions) -> Generator[int, None, None]:
        """Prefill the new part of the prompt, yield the answer's token ids, and record them.

        Args:
            new_ids: The first question's ids after the visual tokens, or next_ids.
            options: How to answer.
        """
        stop_ids = self.pipeline.manifest.stop_ids
        self._is_answering = True
        answer, earlier, is_kept = list[int](), list(self.after), True
        self.after += new_ids
        try:
            prompt, most = self._unread(options.max_new_tokens), options.max_new_tokens
            ids = self.pipeline.generate(prompt, most, stop_ids, options.sampling, None, self.sequence)
            with contextlib.closing(ids):
                for token in ids:
                    answer.append(token)
                    yield token
        except GeneratorExit:  # the answer was ended early: the chat goes on from there
            raise
        except BaseException:
            is_kept = False
            raise
        finally:
            if answer and is_kept:
                self.answered = True
                self.after += [
                    token for token in answer if token not in stop_ids
                ]  # the template writes the end
            else:  # not everything was read, or the engine failed: as if the question hadn't been asked
                self.after = earlier
                self._drop_cache()
            self._is_answering = False
            if self._is_released:
                self._drop_cache()

    def release(self) -> None:
        """The model is closed: release the KV cache, at once or at the end of the answer under way."""
        self._is_released = True  # before the other flag is read; `generate` does it the other way round
        if not self._is_answering:
            self._drop_cache()

    def _unread(self, new_tokens: int) -> Any:
        """The part of the prompt that the cache doesn't hold; creates a cache if none has room."""
        assert self.pooled is not None
        pipeline, sequence, context = self.pipeline, self.sequence, self.pipeline.manifest.decoder.context
        total = self.prefix + len(self.after)
        if total >= context:
            raise PromptError(
                f"the conversation has {total} tokens, the model's context is {context}: "
                "open the video again to start a new one"
            )
        if sequence is not None and self.prefix <= sequence.length < total:
            has_room = total + new_tokens <= sequence.capacity or sequence.capacity == context
            if has_room:
                no_visual = np.zeros((0, pipeline.manifest.decoder.hidden_size), np.float32)
                return pipeline.prompt([], no_visual, self.after[sequence.length - self.prefix :])
        self._drop_cache()
        self.sequence = pipeline.decoder.start(total, new_tokens + HEADROOM)
        return pipeline.prompt(self.before, self.pooled.visual, self.after)

    def _drop_cache(self) -> None:
        sequence, self.sequence = self.sequence, None
        if sequence is not None:
            self.pipeline.finish(sequence)
