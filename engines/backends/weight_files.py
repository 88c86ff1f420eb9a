"""Where an ONNX graph's weights are: names of its external data files, read without the package onnx.

ONNX Runtime before 1.24 opens any file that a graph names as its weights, also outside the bundle, and treats
one such name as an address in memory. Later versions refuse both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ppllava_edge.engines.bundle.manifest_parser import LARGEST_GRAPH, file_name_problem
from ppllava_edge.engines.bundle.untrusted import file_size, read_limited
from ppllava_edge.engines.errors import BundleError

# ONNX messages on the way to TensorProto.external_data: field number → message.
FIELDS = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
ENTRY = "StringStringEntryProto"
KEY, VALUE = 1, 2  # fields of an entry
VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5  # wire types of protobuf


def check_weight_files(path: Path) -> None:
    """Check that a graph takes its weights from its own folder only.

    Args:
        path: The .onnx file.

    Raises:
        BundleError: It names another place, or isn't an ONNX graph.
    """
    try:
        graph = memoryview(read_limited(path.parent, path, LARGEST_GRAPH))
        for location in _locations(graph):
            name = bytes(location).decode("utf-8", "replace")
            if problem := file_name_problem([name]):
                raise BundleError(f"{path}: weights: {problem}")
            file_size(path.parent, path.parent / name)
    except FileNotFoundError as error:
        raise BundleError(f"{path} or its weights are missing: {error.filename}") from None
    except (IndexError, ValueError):
        raise BundleError(f"{path} is not an ONNX graph; the bundle is damaged, export it again") from None


def _locations(graph: memoryview) -> Iterator[memoryview]:
    """The locations of all external data. Raises IndexError or ValueError if the bytes aren't protobuf."""
    unread = [("ModelProto", graph)]
    while unread:
        kind, message = unread.pop()
        fields = _fields(message)
        if kind == ENTRY:
            entry = list(fields)
            if any(number == KEY and part == b"location" for number, part in entry):
                yield from (part for number, part in entry if number == VALUE)
            continue
        inner = FIELDS[kind]
        unread += ((inner[number], part) for number, part in fields if number in inner)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """A message's fields of the wire type "length-delimited": number and contents."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == VARINT:
            _, at = _varint(message, at)
        elif kind == LENGTH:
            size, at = _varint(message, at)
            if size > end - at:
                raise ValueError("a field is longer than its message")
            yield tag >> 3, message[at : at + size]
            at += size
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            at += 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError("not a wire type of ONNX")
    if at > end:
        raise ValueError("a field is longer than its message")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of at most 64 bits, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number has more than 64 bits")
