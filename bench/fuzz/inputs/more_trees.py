"""Trees of the other formats: GIF, transport streams, TIFF, protocol buffers, lines of text."""

from __future__ import annotations

from typing import Literal

from ppllava_edge.bench.fuzz.inputs.trees import MAX_DEPTH, Element

TS_PACKET = 188  # bytes
GIF_HEADER = 13  # bytes before the colour table


def parse_gif(data: bytes, depth: int = 0) -> list[Element]:
    """The blocks of a GIF: the header with its colours, extensions, pictures."""
    flags = data[10] if len(data) > 10 else 0
    at = GIF_HEADER + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    found = [Element(b"", data[:at])]
    while at < len(data):
        begin = at
        if data[at] == 0x21:
            at += 2
        elif data[at] == 0x2C:
            colours = data[at + 9] if at + 9 < len(data) else 0
            at += 11 + (3 << (colours & 7) + 1 if colours & 0x80 else 0)
        else:
            found.append(Element(b"", data[at:]))
            break
        while at < len(data) and data[at]:
            at += data[at] + 1
        at += 1
        found.append(Element(b"", data[begin:at]))
    return found


def parse_ts(data: bytes, depth: int = 0) -> list[Element]:
    """The packets of a transport stream."""
    return [Element(b"", data[i : i + TS_PACKET]) for i in range(0, len(data), TS_PACKET)]


def parse_lines(data: bytes, depth: int = 0) -> list[Element]:
    """The lines of a text, each with its end."""
    return [Element(b"", line) for line in data.splitlines(keepends=True)]


def write_flat(elements: list[Element]) -> bytes:
    """Write elements one after another: the inverse of parse_gif, parse_ts, parse_lines."""
    return b"".join(e.body for e in elements)


def parse_tiff(data: bytes, depth: int = 0) -> list[Element]:
    """A TIFF file: its header with the pictures' data, and the entries of its directories (12 bytes each)."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    entries = list[tuple[int, int]]()
    at, seen = int.from_bytes(data[4:8], order), set[int]()
    while 8 <= at < len(data) - 2 and at not in seen:
        seen.add(at)
        count = int.from_bytes(data[at : at + 2], order)
        entries += [(at + 2 + 12 * i, at + 14 + 12 * i) for i in range(min(count, 100))]
        at = int.from_bytes(data[at + 2 + 12 * count : at + 6 + 12 * count], order)
    found, last = list[Element](), 0
    for begin, end in sorted(entries):
        found += [Element(b"", data[last:begin]), Element(b"", data[begin:end])]
        last = end
    return [*found, Element(b"", data[last:])]


# -- protocol buffers: key (number and kind), then a number, 8 or 4 bytes, or a size and contents --------


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number at a position, and the position behind it. Raises IndexError at the end of the data."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80 or shift > 63:
            return value, at


def write_varint(value: int) -> bytes:
    """A number in groups of 7 bits."""
    value %= 1 << 64
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def parse_protobuf(data: bytes, depth: int = 0) -> list[Element]:
    """The fields of a message. Contents that read as messages are taken for messages.

    Raises:
        ValueError: The data is no message.
    """
    found, at = list[Element](), 0
    try:
        while at < len(data):
            key, behind = read_varint(data, at)
            kind, name = key & 7, data[at:behind]
            if kind == 2:
                size, begin = read_varint(data, behind)
                at = begin + size
                found.append(_field(name, data[begin:at], depth))
            elif kind == 0:
                _, at = read_varint(data, behind)
                found.append(Element(name, data[behind:at]))
            elif kind in (1, 5):
                at = behind + (8 if kind == 1 else 4)
                found.append(Element(name, data[behind:at]))
            else:
                raise ValueError("an unknown kind of field")
            if key >> 3 == 0 or at > len(data):
                raise ValueError("no field")
    except IndexError:
        raise ValueError("cut off") from None
    return found


def _field(name: bytes, body: bytes, depth: int) -> Element:
    may_be_text = body.isascii() and body[:1] not in (b"\x08", b"\x0a")
    if depth < MAX_DEPTH and not may_be_text:
        try:
            return Element(name, b"", parse_protobuf(body, depth + 1))
        except ValueError:
            pass
    return Element(name, body)


def write_protobuf(elements: list[Element]) -> bytes:
    """The inverse of parse_protobuf."""
    parts = []
    for e in elements:
        if e.name and e.name[0] & 7 == 2:
            body = write_protobuf(e.children) if e.children is not None else e.body
            parts.append(e.name + write_varint(len(body) if e.size is None else e.size) + body)
        else:
            parts.append(e.name + e.body)
    return b"".join(parts)
