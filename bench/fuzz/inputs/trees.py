"""Structured files as trees of named elements, so that mutations keep the rest of a file valid.

An element is a box of an MP4 file, an EBML element of a Matroska file, a chunk of RIFF or PNG, a segment of a
JPEG, a field of a protocol buffer, or a packet. Sizes and checksums are computed when the tree is written.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_DEPTH = 12
MAX_ELEMENTS = 20_000


@dataclass
class Element:
    """One element of a file.

    Attributes:
        name: Its type, as it stands in the file.
        body: Its contents; those before its children, if it has children.
        children: Its child elements; None if it can't have any.
        size: A wrong size to write instead of its own; None: the right one.
        tail: Bytes that follow it and belong to it (a checksum's place is left out).
    """

    name: bytes
    body: bytes = b""
    children: list[Element] | None = None
    size: int | None = None
    tail: bytes = b""


@dataclass
class Tree:
    """A file's elements, and how they are written.

    Attributes:
        elements: The outermost ones.
        write: Turns elements into bytes.
    """

    elements: list[Element]
    write: Callable[[list[Element]], bytes] = field(repr=False)

    def walk(self) -> list[tuple[list[Element], int]]:
        """Every element, as the list it is in and its place there."""
        found: list[tuple[list[Element], int]] = []
        stack = [self.elements]
        while stack and len(found) < MAX_ELEMENTS:
            siblings = stack.pop()
            for i, element in enumerate(siblings):
                found.append((siblings, i))
                if element.children:
                    stack.append(element.children)
        return found


# -- MP4 and MOV: size (4 bytes), type (4), contents -----------------------------------------------------

BOXES_WITH_CHILDREN = {
    name.encode(): skip
    for skip, names in {
        0: "moov trak mdia minf stbl edts dinf udta mvex moof traf mfra ilst gmhd",
        4: "meta",
        8: "stsd dref",
        78: "avc1 hvc1 hev1 av01 vp09 mp4v jpeg apcn apch",
    }.items()
    for name in names.split()
}


def parse_boxes(data: bytes, depth: int = 0) -> list[Element]:
    """The boxes of an MP4 file."""
    found, at = list[Element](), 0
    while at + 8 <= len(data):
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + size if 8 <= size <= len(data) - at else len(data)
        body = data[at + 8 : end]
        skip = BOXES_WITH_CHILDREN.get(name)
        if skip is None or depth >= MAX_DEPTH or len(body) < skip:
            found.append(Element(name, body))
        else:
            found.append(Element(name, body[:skip], parse_boxes(body[skip:], depth + 1)))
        at = end
    if at < len(data) and found:
        found[-1].tail = data[at:]
    return found


def write_boxes(elements: list[Element]) -> bytes:
    """The inverse of parse_boxes."""
    parts = []
    for e in elements:
        body = e.body + (write_boxes(e.children) if e.children else b"")
        size = len(body) + 8 if e.size is None else e.size
        parts.append((size % (1 << 32)).to_bytes(4, "big") + e.name + body + e.tail)
    return b"".join(parts)


# -- Matroska: id and size as numbers of 1 to 8 bytes, contents ------------------------------------------

_MASTER_IDS = (
    "1a45dfa3 18538067 114d9b74 4dbb 1549a966 1654ae6b ae e0 e1 1f43b675 a0 1c53bb6b bb b7 "
    "1254c367 7373 63c0 67c8 1043a770 45b9 b6 6d80 6240 5035 55b0 1941a469 61a7"
)
MASTERS = {bytes.fromhex(text) for text in _MASTER_IDS.split()}  # elements with children


def parse_ebml(data: bytes, depth: int = 0) -> list[Element]:
    """The elements of a Matroska or WebM file."""
    found, at = list[Element](), 0
    while at < len(data):
        id_length = 9 - data[at].bit_length()
        if not 1 <= id_length <= 4 or at + id_length >= len(data):
            break
        start = at + id_length
        size_length = 9 - data[start].bit_length()
        if size_length > 8:
            break
        size = int.from_bytes(data[start : start + size_length], "big") & ((1 << 7 * size_length) - 1)
        begin = start + size_length
        unknown = size == (1 << 7 * size_length) - 1
        end = len(data) if unknown else min(begin + size, len(data))
        name, body = data[at:start], data[begin:end]
        if name in MASTERS and depth < MAX_DEPTH:
            found.append(Element(name, b"", parse_ebml(body, depth + 1)))
        else:
            found.append(Element(name, body))
        at = end
    return found


def write_ebml(elements: list[Element]) -> bytes:
    """The inverse of parse_ebml; every size takes 8 bytes."""
    parts = []
    for e in elements:
        body = e.body + (write_ebml(e.children) if e.children else b"")
        size = len(body) if e.size is None else e.size
        parts.append(e.name + (size % (1 << 56) | 1 << 56).to_bytes(8, "big") + body + e.tail)
    return b"".join(parts)


# -- RIFF (AVI and WebP): type (4 bytes), size (4, little-endian), contents, even ------------------------


def parse_riff(data: bytes, depth: int = 0) -> list[Element]:
    """The chunks of an AVI or WebP file."""
    found, at = list[Element](), 0
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        end = min(at + 8 + size, len(data))
        body = data[at + 8 : end]
        nested = {b"RIFF": 4, b"LIST": 4, b"ANMF": 16}.get(name)
        if nested is not None and depth < MAX_DEPTH:
            found.append(Element(name, body[:nested], parse_riff(body[nested:], depth + 1)))
        else:
            found.append(Element(name, body))
        at = end + size % 2
    return found


def write_riff(elements: list[Element]) -> bytes:
    """The inverse of parse_riff."""
    parts = []
    for e in elements:
        body = e.body + (write_riff(e.children) if e.children else b"")
        size = len(body) if e.size is None else e.size
        parts.append(e.name + (size % (1 << 32)).to_bytes(4, "little") + body + b"\0" * (len(body) % 2))
    return b"".join(parts)


# -- PNG: size (4 bytes), type (4), contents, checksum (4) -----------------------------------------------

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def parse_png(data: bytes, depth: int = 0) -> list[Element]:
    """The chunks of a PNG file."""
    found, at = list[Element](), len(PNG_SIGNATURE)
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        end = min(at + 8 + size, len(data))
        found.append(Element(data[at + 4 : at + 8], data[at + 8 : end]))
        at = end + 4
    return found


def write_png(elements: list[Element]) -> bytes:
    """The inverse of parse_png, with right checksums."""
    parts = [PNG_SIGNATURE]
    for e in elements:
        size = len(e.body) if e.size is None else e.size
        checksum = zlib.crc32(e.name + e.body).to_bytes(4, "big")
        parts.append((size % (1 << 32)).to_bytes(4, "big") + e.name + e.body + checksum)
    return b"".join(parts)


# -- JPEG: marker (2 bytes), size (2), contents; the picture's data belongs to the segment before it -----


def parse_jpeg(data: bytes, depth: int = 0) -> list[Element]:
    """The segments of a JPEG file."""
    found, at = list[Element](), 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        name = data[at : at + 2]
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        end = min(at + 2 + max(size, 2), len(data))
        segment = Element(name, data[at + 4 : end])
        if name == b"\xff\xda":  # the coded picture follows, up to a marker that isn't part of it
            begin = end
            while end + 1 < len(data) and (data[end] != 0xFF or data[end + 1] in (0, *range(0xD0, 0xD8))):
                end += 1
            segment.tail = data[begin:end]
        found.append(segment)
        at = end
    return found


def write_jpeg(elements: list[Element]) -> bytes:
    """The inverse of parse_jpeg."""
    parts = [b"\xff\xd8"]
    for e in elements:
        size = len(e.body) + 2 if e.size is None else e.size
        parts.append(e.name + (size % (1 << 16)).to_bytes(2, "big") + e.body + e.tail)
    return b"".join([*parts, b"\xff\xd9"])
