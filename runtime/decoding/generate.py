"""The one loop that generates token ids, over any KV cache."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

from ppllava_edge.runtime.decoding.sequence import Sequence
from ppllava_edge.runtime.language.prompt_lookup import PromptLookup, accept_draft
from ppllava_edge.runtime.language.sampling import Sampler


def generate_ids(
    sequence: Sequence,
    prompt: Any,
    max_new_tokens: int,
    sampler: Sampler,
    stop_ids: Iterable[int] = (),
    lookup: PromptLookup | None = None,
) -> Generator[int, None, None]:
    """Prefill, then one pass of the decoder per token, or per accepted draft.

    Args:
        sequence: The cache; positions already in it precede the prompt.
        prompt: As `sequence.feed` takes it.
        max_new_tokens: Maximum number of ids to yield, 1 or more.
        sampler: Chooses the next id.
        stop_ids: Ids that end the answer; the one that does is yielded too.
        lookup: The source of drafts; needs a greedy sampler. None: one token per pass.

    Yields:
        Token ids, until a stop id, max_new_tokens or the end of the cache. The last one is yielded before it
        is in the cache.
    """
    stops, ids, draft = set(stop_ids), list[int](), list[int]()
    sequence.feed(prompt)
    while True:
        certain = sequence.length - len(draft)  # positions filled by tokens that were chosen

        def ends(token: int, right: int, certain: int = certain) -> bool:
            return token in stops or len(ids) >= max_new_tokens or certain + right >= sequence.capacity

        accepted, ended = yield from accept_draft(
            sequence.chosen(sampler, ids, 1 + len(draft)), draft, ids, ends
        )
        if ended:
            return
        if lookup is not None:
            lookup.count(len(draft), accepted)
        if accepted < len(draft):
            sequence.forget(len(draft) - accepted)
        room = min(sequence.capacity - sequence.length, max_new_tokens - len(ids)) - 1
        draft = lookup.draft(ids, room) if lookup is not None else []
        sequence.verify([ids[-1], *draft])
