"""One mutated input from one or two others."""

from __future__ import annotations

from random import Random

from ppllava_edge.bench.fuzz.inputs.mutations import MAX_SIZE, mutate_bytes, splice

BLIND = 0.4  # of the inputs with a known structure are mutated blindly
SPLICED = 0.08


def mutate(data: bytes, other: bytes, grammar: str, random: Random) -> bytes:
    """Mutate an input.

    Args:
        data: The input.
        other: Another input of the same target, for splices.
        grammar: The name of the structure; "": unknown.
        random: The source of all choices.

    Returns:
        At most MAX_SIZE bytes.
    """
    if random.random() < SPLICED:
        data = splice(data, other, random)
    times = random.choice((1, 1, 2, 4))
    return mutate_bytes(data, random, times)[:MAX_SIZE]
