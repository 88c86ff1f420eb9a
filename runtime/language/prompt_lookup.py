"""Prompt lookup decoding: draft tokens from the prompt and the answer so far, verify them in one pass.

Answers repeat words of the question and of themselves. The last tokens are searched for in the prompt and
the answer; the tokens that followed them there are the draft. A wrong draft only costs time: every token is
the same as without lookup.

This holds if a pass over several positions computes the same logits as single steps. Where activations are
rounded to INT8, kernels differ too much (measured: by 2 to 7 % of the logits' spread, in INT4 decoders 4096
wide), so drafting is skipped there. Other engines are measured first, see `disagreement`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ppllava_edge.engines.bundle.engine_manifest import LAST_POSITIONS

LONGEST_MATCH = 3  # tokens
SHORTEST_MATCH = 2  # tokens; a single token has too many different successors
MAX_DRAFT = LAST_POSITIONS - 1  # tokens; the one before them is verified in the same pass
MAX_DISAGREEMENT = 1e-3  # as a share of the logits' standard deviation
LOOKUP_SKIPPED = (
    "looking ahead was left out: on this engine one pass over several positions and single steps give "
    "different logits, so the answer could change"
)


def rounds_activations(decoder: str, target: str) -> bool:
    """Whether a decoder rounds activations to INT8.

    On the CPU, INT4 and INT8 weights are multiplied in INT8; elsewhere only INT8 weights are.

    Args:
        decoder: The decoder's precision in the manifest.
        target: The engine's target.
    """
    return decoder == "int8" or (decoder == "int4" and target == "cpu")


def disagreement(singly: list[np.ndarray], together: np.ndarray) -> float:
    """Compare the logits of single steps with those of one pass over the same tokens.

    Args:
        singly: (V,) of each step.
        together: (n, V) of the pass.

    Returns:
        The largest difference, in standard deviations of the logits.
    """
    steps = np.stack(singly).astype(np.float64)
    return float(np.abs(steps - together).max() / max(float(steps.std()), 1e-30))


@dataclass
class PromptLookup:
    """Drafts for one answer, and statistics of them.

    Attributes:
        prompt: Token ids to search, beside the answer's own.
        max_draft: Maximum number of tokens of a draft.
        passes: Decoder passes after prefill.
        proposed: Tokens drafted.
        accepted: Drafted tokens that were right.
        note: Why drafting was skipped, if it was.
    """

    prompt: Sequence[int] = ()
    max_draft: int = MAX_DRAFT
    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    note: str = ""

    def draft(self, ids: Sequence[int], limit: int) -> list[int]:
        """Guess how the answer continues.

        Args:
            ids: The answer so far.
            limit: Maximum number of tokens to return.

        Returns:
            The tokens after the latest earlier occurrence of the last three tokens, else of the last two;
            none if there is no such occurrence.
        """
        limit = min(limit, self.max_draft, MAX_DRAFT)
        if limit < 1:
            return []
        history = [*self.prompt, *ids]
        for length in range(min(LONGEST_MATCH, len(history) - 1), SHORTEST_MATCH - 1, -1):
            end = history[-length:]
            for start in range(len(history) - length - 1, -1, -1):
                if history[start : start + length] == end:
                    return history[start + length : start + length + limit]
        return []

    def count(self, proposed: int, accepted: int) -> None:
        """Record a pass: how many tokens it verified, and how many were right."""
        self.passes += 1
        self.proposed += proposed
        self.accepted += accepted

    def counts(self) -> dict[str, int]:
        """Return the numbers of passes, proposed and accepted tokens, by name."""
        return {"passes": self.passes, "proposed": self.proposed, "accepted": self.accepted}


def accept_draft(
    chosen: Iterable[int], draft: Sequence[int], ids: list[int], ends: Callable[[int, int], bool]
) -> Generator[int, None, tuple[int, bool]]:
    """Accept a draft's tokens as long as they match the model's choices.

    Args:
        chosen: The model's choice after the token before the draft, then after each token of the draft.
            Consumed one by one, after `ids` has grown.
        draft: Drafted tokens.
        ids: The answer; accepted tokens are appended.
        ends: (token, drafted tokens accepted before it) → whether the answer ends with it.

    Yields:
        The accepted tokens, then the model's choice in place of the first wrong one or after the last.

    Returns:
        How many drafted tokens were right, and whether the answer ended.
    """
    accepted = 0
    for token, guess in zip(chosen, [*draft, None]):
        ids.append(token)
        yield token
        if ends(token, accepted):
            return accepted, True
        if token != guess:
            break
        accepted += 1
    return accepted, False
