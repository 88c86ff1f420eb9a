"""Mutations of structured files: elements are dropped, doubled, swapped, nested; sizes and numbers change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random

from ppllava_edge.bench.fuzz.inputs import more_trees, trees
from ppllava_edge.bench.fuzz.inputs.mutations import BOUNDARIES, mutate_bytes, number_bytes
from ppllava_edge.bench.fuzz.inputs.trees import Element, Tree

Parse = Callable[[bytes], list[Element]]
Write = Callable[[list[Element]], bytes]

GRAMMARS: dict[str, tuple[Parse, Write]] = {
    "boxes": (trees.parse_boxes, trees.write_boxes),
    "ebml": (trees.parse_ebml, trees.write_ebml),
    "riff": (trees.parse_riff, trees.write_riff),
    "png": (trees.parse_png, trees.write_png),
    "jpeg": (trees.parse_jpeg, trees.write_jpeg),
    "gif": (more_trees.parse_gif, more_trees.write_flat),
    "ts": (more_trees.parse_ts, more_trees.write_flat),
    "text": (more_trees.parse_lines, more_trees.write_flat),
    "tiff": (more_trees.parse_tiff, more_trees.write_flat),
    "protobuf": (more_trees.parse_protobuf, more_trees.write_protobuf),
}
NESTED = 200  # levels of an element inside itself
COPIES = (2, 10, 300)
MAX_TREE = 1 << 18  # bytes; a mutation doesn't copy more than this


def mutate_tree(data: bytes, other: bytes, grammar: str, random: Random, times: int) -> bytes:
    """Parse a file, mutate its elements, and write it.

    Args:
        data: The file.
        other: Another file of the same kind, whose elements may be taken.
        grammar: A key of GRAMMARS.
        random: The source of all choices.
        times: How many mutations.

    Returns:
        The mutated file; the data itself if it can't be parsed.
    """
    parse, write = GRAMMARS[grammar]
    try:
        tree, donor = Tree(parse(data), write), Tree(parse(other), write)
    except ValueError:
        return mutate_bytes(data, random, times)
    for _ in range(times):
        places = tree.walk()
        if not places:
            return mutate_bytes(data, random, times)
        siblings, i = random.choice(places)
        random.choice(MUTATIONS)(siblings, i, donor, random)
    return write(tree.elements)


def _drop(siblings: list[Element], i: int, donor: Tree, random: Random) -> None:
    del siblings[i]


def _repeat(siblings: list[Element], i: int, donor: Tree, random: Random) -> None:
    element = siblings[i]
    times = 1 if element.children or len(element.body) > MAX_TREE >> 8 else random.choice(COPIES)
    siblings[i:i] = [copy.deepcopy(element) for _ in range(times)]


def _swap(siblings: list[Element], i: int, donor: Tree, random: Random) -> None:
    j = random.randrange(len(siblings))
    siblings[i], siblings[j] = siblings[j], siblings[i]


def _take(siblings: list[Element], i: int, donor: Tree, random: Random) -> None:
    """Put an element of another file here."""
    places = donor.walk()
    if places:
        others, j = random.choice(places)
        siblings[i : i + random.randrange(2)] = [copy.deepcopy(others[j])]


def _rename(siblings: list[Element], i: int, donor: Tree, random: Random) -> None:
    siblings[i].name = random.choice(siblings).name


def _wrong_size(siblings: list[Element], i: int, donor: Tree, random: Random) -> None:
    size = len(siblings[i].body)
    siblings[i].size = random.choice((size + 1, size - 1, size + 8, size // 2, 2 * size, *BOUNDARIES))


def _number(siblings: list[Element], i: int, donor: Tree, random: Random) -> None:
    """Put a boundary number at an aligned place."""
    element = siblings[i]
    size = random.choice((1, 2, 4, 4, 4, 8))
    last = min(len(element.body), 4096) // size
    at = size * random.randrange(last + 1) if random.random() < 0.7 else 0
    element.body = element.body[:at] + number_bytes(random, size) + element.body[at + size :]


def _bytes(siblings: list[Element], i: int, donor: Tree, random: Random) -> None:
    siblings[i].body = mutate_bytes(siblings[i].body, random, 1)


def _resize(siblings: list[Element], i: int, donor: Tree, random: Random) -> None:
    """Shorten or lengthen the contents; the element's size follows."""
    body = siblings[i].body
    siblings[i].body = random.choice((b"", body[: len(body) // 2], body[:-1], body + body[-16:], body * 2))


def _nest(siblings: list[Element], i: int, donor: Tree, random: Random) -> None:
    """Put an element with children into itself, many times."""
    element = siblings[i]
    if element.children is not None:
        for _ in range(random.choice((1, NESTED))):
            element = Element(element.name, element.body, [element])
        siblings[i] = element


MUTATIONS = (
    _drop,
    _repeat,
    _swap,
    _take,
    _rename,
    _wrong_size,
    _number,
    _number,
    _number,
    _bytes,
    _bytes,
    _resize,
    _nest,
)
