"""One mutated input from one or two others."""

from __future__ import annotations

from random import Random

from ppllava_edge.bench.fuzz.inputs.json_mutations import mutate_json, mutate_safetensors
from ppllava_edge.bench.fuzz.inputs.mutations import MAX_SIZE, mutate_bytes, splice
from ppllava_edge.bench.fuzz.inputs.tree_mutations import mutate_tree

BLIND = 0.35  # of the inputs with a known structure are mutated blindly
BLIND_JSON = 0.1  # the parser refuses nearly all of these; the other code sees only what they can parse
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
    try:
        return _mutate(data, other, grammar, random, times)[:MAX_SIZE]
    except RecursionError:  # values that are nested too deeply to be copied or written
        return mutate_bytes(data, random, times)


def _mutate(data: bytes, other: bytes, grammar: str, random: Random, times: int) -> bytes:
    blind = BLIND_JSON if grammar in ("json", "safetensors") else BLIND
    if not grammar or random.random() < blind:
        return mutate_bytes(data, random, times)
    if grammar == "json":
        return mutate_json(data, other, random, times)
    if grammar == "safetensors":
        return mutate_safetensors(data, other, random, times)
    return mutate_tree(data, other, grammar, random, times)
