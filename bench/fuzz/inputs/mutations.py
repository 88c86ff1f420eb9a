"""Blind mutations of bytes: no knowledge of their structure."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random
from typing import Literal

# Numbers at which sizes, counts, offsets and times overflow, wrap or become negative.
BOUNDARIES = tuple(
    sorted(
        {0, 1, 2, 7, 8, 1000, 65536}
        | {2**n + d for n in (7, 8, 15, 16, 24, 31, 32, 62, 63, 64) for d in (-1, 0, 1)}
    )
)
ORDERS: tuple[Literal["big", "little"], ...] = ("big", "little")
TEXT_NUMBERS = ("0", "-1", "1e999", "NaN", "0.0", "1e-400", "9" * 30, *map(str, BOUNDARIES))
MAX_SIZE = 1 << 18  # bytes of a mutated input

Mutation = Callable[[bytearray, Random], None]


def mutate_bytes(data: bytes, random: Random, times: int) -> bytes:
    """Apply some blind mutations."""
    changed = bytearray(data)
    for _ in range(times):
        random.choice(MUTATIONS)(changed, random)
    return bytes(changed[:MAX_SIZE])


def splice(first: bytes, second: bytes, random: Random) -> bytes:
    """The beginning of one file and the end of another."""
    cut = random.randrange(len(first) + 1)
    other = random.randrange(len(second) + 1)
    return (first[:cut] + second[other:])[:MAX_SIZE]


def number_bytes(random: Random, size: int) -> bytes:
    """A boundary number in `size` bytes, of either byte order."""
    value = random.choice(BOUNDARIES) * random.choice((1, 1, 1, -1))
    return (value % (1 << 8 * size)).to_bytes(size, random.choice(ORDERS))


def position(data: bytearray, random: Random) -> int:
    """A position in the data; often near the beginning, where headers are."""
    if not data:
        return 0
    return random.randrange(min(len(data), 256) if random.random() < 0.3 else len(data))


def _flip_bits(data: bytearray, random: Random) -> None:
    for _ in range(random.choice((1, 1, 2, 8)) if data else 0):
        data[position(data, random)] ^= 1 << random.randrange(8)


def _set_bytes(data: bytearray, random: Random) -> None:
    start = position(data, random)
    for i in range(start, min(start + random.choice((1, 1, 4, 16)), len(data))):
        data[i] = random.choice((0, 0xFF, 0x80, random.randrange(256)))


def _set_number(data: bytearray, random: Random) -> None:
    size = random.choice((1, 2, 4, 4, 8))
    start = position(data, random)
    data[start : start + size] = number_bytes(random, size)


def _add_to_number(data: bytearray, random: Random) -> None:
    size = random.choice((1, 2, 4))
    start, order = position(data, random), random.choice(ORDERS)
    value = int.from_bytes(data[start : start + size], order) + random.randint(-16, 16)
    data[start : start + size] = (value % (1 << 8 * size)).to_bytes(size, order)


def _truncate(data: bytearray, random: Random) -> None:
    del data[random.randrange(len(data) + 1) :]


def _delete(data: bytearray, random: Random) -> None:
    start = position(data, random)
    del data[start : start + random.choice((1, 2, 4, 16, 256))]


def _copy_block(data: bytearray, random: Random) -> None:
    start, to = position(data, random), position(data, random)
    data[to:to] = data[start : start + random.choice((1, 4, 16, 256, 4096))]


def _move_block(data: bytearray, random: Random) -> None:
    start, size = position(data, random), random.choice((4, 16, 256, 1024))
    block = data[start : start + size]
    del data[start : start + size]
    to = position(data, random)
    data[to:to] = block


def _repeat_block(data: bytearray, random: Random) -> None:
    start = position(data, random)
    block = data[start : start + random.choice((1, 4, 64))]
    data[start:start] = block * random.choice((2, 16, 512))


def _change_digits(data: bytearray, random: Random) -> None:
    """Replace a number that is written in digits."""
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data[: 1 << 16]))
    if numbers:
        number = random.choice(numbers)
        data[number.start() : number.end()] = random.choice(TEXT_NUMBERS).encode()


MUTATIONS: tuple[Mutation, ...] = (
    _flip_bits,
    _set_bytes,
    _set_number,
    _set_number,
    _add_to_number,
    _truncate,
    _delete,
    _copy_block,
    _move_block,
    _repeat_block,
    _change_digits,
)
