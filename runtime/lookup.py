"""Prompt lookup: guessing the next tokens from what was said before, so that one pass of the decoder verifies several.

Answers repeat the question's words and their own. The last tokens are searched for in prompt and answer; what followed them there is the draft.
A draft that is wrong costs a wider pass and nothing else: every token is the one that would have been chosen without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LONGEST_MATCH, SHORTEST_MATCH = 3, 2  # tokens; a single one is followed by too many things
MOST_DRAFT = 7  # with the token before them, as many positions as an engine gives logits of


@dataclass
class Lookup:
    """prompt: token ids in which drafts are looked for, beside the answer's own. most: tokens of a draft. passes, proposed, accepted: counts."""

    prompt: Sequence[int] = ()
    most: int = MOST_DRAFT
    passes: int = 0
    proposed: int = 0
    accepted: int = 0

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """What may follow the answer so far: at most `most` tokens, [] if its end occurs nowhere before."""
        most = min(most, self.most, MOST_DRAFT)
        if most < 1:
            return []
        history = [*self.prompt, *ids]
        for length in range(min(LONGEST_MATCH, len(history) - 1), SHORTEST_MATCH - 1, -1):
            end = history[-length:]
            for start in range(len(history) - length - 1, -1, -1):
                if history[start : start + length] == end:
                    return history[start + length : start + length + most]
        return []

    def count(self, proposed: int, accepted: int) -> None:
        """Note what became of a draft."""
        self.passes += 1
        self.proposed += proposed
        self.accepted += accepted
