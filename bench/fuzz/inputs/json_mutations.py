"""Mutations of JSON: values are swapped, dropped, doubled, nested; numbers go to their boundaries."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

from ppllava_edge.bench.fuzz.inputs.mutations import BOUNDARIES, mutate_bytes

STRINGS = (
    "", "..", "/", "../../etc/passwd", "/dev/zero", "con\u0000", "\ud800", "\u202e\u0007\x1b[2J",
    "a" * 70_000, "nan", "<image>", "{}", "\U0001f600", "manifest.json", "CON", "a/b", "a\nb", "%d%n%s",
)  # fmt: skip
NUMBERS = (
    *BOUNDARIES,
    *(-n for n in BOUNDARIES),
    10**30,
    10**400,
    0.5,
    -0.0,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
)
RAW = (  # texts that JSON parsers treat differently
    b"[" * 50_000, b'{"a":' * 20_000, b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"nul", b"1e99999", b"[1,]",
    b'{"a":1,"a":2}', b'"\\ud800"', b"9" * 5000, b"",
)  # fmt: skip
SIZE_BYTES = 8  # of the size before a safetensors header


def mutate_json(data: bytes, other: bytes, random: Random, times: int) -> bytes:
    """Mutate a JSON text; one that can't be parsed is mutated blindly.

    Args:
        data: The text.
        other: Another one, whose values may be taken.
        random: The source of all choices.
        times: How many mutations.
    """
    if random.random() < 0.02:
        return random.choice(RAW)
    try:
        value, donor = json.loads(data), json.loads(other)
    except (ValueError, RecursionError):
        return mutate_bytes(data, random, times)
    for _ in range(times):
        places = _places(value)
        if not places:
            break
        container, key = random.choice(places)
        random.choice(MUTATIONS)(container, key, donor, random)
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):  # nested too deeply
        return data


def mutate_safetensors(data: bytes, other: bytes, random: Random, times: int) -> bytes:
    """Mutate the header of a safetensors file; its size is right, most often."""
    header, rest = _split(data)
    other_header, _ = _split(other)
    changed = mutate_json(header, other_header, random, times)
    size = len(changed) if random.random() < 0.9 else random.choice(BOUNDARIES)
    if random.random() < 0.2:
        rest = mutate_bytes(rest, random, 1)
    return (size % (1 << 64)).to_bytes(SIZE_BYTES, "little") + changed + rest


def _split(data: bytes) -> tuple[bytes, bytes]:
    end = SIZE_BYTES + int.from_bytes(data[:SIZE_BYTES], "little")
    return data[SIZE_BYTES:end], data[end:]


Place = tuple[Any, Any]


def _places(value: Any) -> list[Place]:
    """Every value inside, as its container and its key or index."""
    found, stack = list[Place](), [value]
    while stack:
        container = stack.pop()
        keys: Any = ()
        if isinstance(container, dict):
            keys = list(container)
        elif isinstance(container, list):
            keys = range(len(container))
        for key in keys:
            found.append((container, key))
            stack.append(container[key])
    return found


def _another_value(container: Any, key: Any, donor: Any, random: Random) -> None:
    container[key] = random.choice((None, True, False, 0, -1, 1.5, "", "x", [], {}, [[]], [None], {"": None}))


def _another_number(container: Any, key: Any, donor: Any, random: Random) -> None:
    old = container[key]
    near = (
        (old - 1, old + 1, -old, old * 2, str(old), float(old))
        if type(old) is int and abs(old) < 1 << 64
        else ()
    )
    container[key] = random.choice((*near, *NUMBERS))


def _another_string(container: Any, key: Any, donor: Any, random: Random) -> None:
    old = container[key]
    if isinstance(old, str) and random.random() < 0.5:
        container[key] = mutate_bytes(old.encode(errors="replace"), random, 1).decode("latin-1")
    else:
        container[key] = random.choice(STRINGS)


def _inside_a_string(container: Any, key: Any, donor: Any, random: Random) -> None:
    """Mutate JSON that stands in a string, as in the metadata of safetensors files."""
    old = container[key]
    if isinstance(old, str) and old[:1] in ("{", "["):
        container[key] = mutate_json(old.encode(errors="replace"), b"{}", random, 1).decode(errors="replace")


def _drop(container: Any, key: Any, donor: Any, random: Random) -> None:
    del container[key]


def _take(container: Any, key: Any, donor: Any, random: Random) -> None:
    places = _places(donor)
    if places:
        other, other_key = random.choice(places)
        container[key] = copy.deepcopy(other[other_key])


def _repeat(container: Any, key: Any, donor: Any, random: Random) -> None:
    value = container[key]
    if isinstance(value, list) and len(value) < 1000:
        container[key] = value * random.choice((2, 100))
    elif isinstance(value, dict) and len(value) < 1000:
        some = list(value.items())
        container[key] = {
            **value,
            **{f"{name}{i}": v for name, v in some for i in range(random.choice((1, 20)))},
        }


def _rename(container: Any, key: Any, donor: Any, random: Random) -> None:
    if isinstance(container, dict):
        container[random.choice((*STRINGS, *map(str, container)))] = container.pop(key)


def _nest(container: Any, key: Any, donor: Any, random: Random) -> None:
    value = container[key]
    for _ in range(random.choice((1, 2, 300))):
        value = [value] if random.random() < 0.5 else {"a": value}
    container[key] = value


MUTATIONS: tuple[Callable[[Any, Any, Any, Random], None], ...] = (
    _another_value,
    _another_number,
    _another_number,
    _another_number,
    _another_string,
    _inside_a_string,
    _inside_a_string,
    _drop,
    _take,
    _repeat,
    _rename,
    _nest,
)
