"""Prompt lookup: guessing the next tokens from what was said before, so that one pass of the decoder verifies several.

Answers repeat the question's words and their own. The last tokens are searched for in prompt and answer; what followed them there is the draft.
A draft that is wrong costs a wider pass and nothing else: every token is the one that would have been chosen without it.

That holds where a pass over several positions computes what single steps compute. Where activations are rounded to INT8, the smallest difference
between two kernels is blown up (measured: 2 to 7 % of the logits' spread for 4096-wide INT4 decoders), so drafts are left out there; any other
engine is tried first.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ppllava_edge.engines.bundle.engine_manifest import LAST_POSITIONS

LONGEST_MATCH, SHORTEST_MATCH = 3, 2  # tokens; a single one is followed by too many things
MAX_DRAFT = LAST_POSITIONS - 1  # the token before them is in the pass too


MAX_DISAGREEMENT = 1e-3  # of the logits' standard deviation
LOOKUP_SKIPPED = "looking ahead was left out: this engine computes several positions at once differently from one by one, so the answer could change"


def rounds_activations(decoder: str, target: str) -> bool:
    """Whether a decoder's activations become INT8 on the way. decoder: its precision in the manifest; target: of the engine.

    On the CPU INT4 and INT8 weights are multiplied in INT8; elsewhere only INT8 x INT8 products are.
    """
    return decoder == "int8" or (decoder == "int4" and target == "cpu")


def disagreement(singly: list[np.ndarray], together: np.ndarray) -> float:
    """How far the logits (V,) of single steps lie from those (n,V) of one pass over the same tokens, in standard deviations."""
    steps = np.stack(singly).astype(np.float64)
    return float(np.abs(steps - together).max() / max(float(steps.std()), 1e-30))


@dataclass
class PromptLookup:
    """prompt: token ids in which drafts are looked for, beside the answer's own. most: tokens of a draft. passes, proposed, accepted: counts.
    note: why drafts were left out, if they were."""

    prompt: Sequence[int] = ()
    most: int = MAX_DRAFT
    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    note: str = ""

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """What may follow the answer so far: at most `most` tokens, [] if its end occurs nowhere before."""
        most = min(most, self.most, MAX_DRAFT)
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

    def counts(self) -> dict[str, int]:
        """Passes, tokens proposed and tokens accepted so far, by name."""
        return {"passes": self.passes, "proposed": self.proposed, "accepted": self.accepted}


def accept_draft(
    chosen: Iterable[int], draft: Sequence[int], ids: list[int], ends: Callable[[int, int], bool]
) -> Generator[int, None, tuple[int, bool]]:
    """Yield what was chosen, for as long as the draft foresaw it. Returns how many of the draft were right, and whether the answer ended.

    chosen: what follows the tokens before the draft, then each of the draft's; consumed one by one, after ids has grown. ends: (token, drafts
    that were right before it) → whether nothing follows it.
    """
    right = 0
    for token, guess in zip(chosen, [*draft, None]):
        ids.append(token)
        yield token
        if ends(token, right):
            return right, True
        if token != guess:
            break
        right += 1
    return right, False
