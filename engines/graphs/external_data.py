"""ONNX external data: weights in a file beside the graph; appended when saving, memory-mapped when read."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from ppllava_edge.engines.bundle.untrusted import file_size
from ppllava_edge.engines.errors import BundleError
from ppllava_edge.engines.graphs.tensors import ONNX_TYPE, TYPE_NAME, Tensor, Weight, stored_bytes

INLINE_BYTES = 1024  # smaller weights stay inside the .onnx file
ALIGNMENT = 4096  # bytes; weights in the data file are aligned so that they can be memory-mapped


def write_weight(name: str, weight: Weight, file: BinaryIO, location: str) -> onnx.TensorProto:
    """Append a weight to a data file, or keep it in the returned proto if it is small.

    Args:
        name: The initializer's name.
        weight: Loaded here and not kept.
        file: The open data file.
        location: Its name, relative to the .onnx file.

    Returns:
        The initializer that refers to the data.

    Raises:
        OSError: If the file can't be written.
    """
    proto = TensorProto(name=name, data_type=ONNX_TYPE[weight.dtype], dims=weight.tensor.shape)
    array = weight.stored()
    if array.nbytes <= INLINE_BYTES:
        proto.raw_data = array.tobytes()
        return proto
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", file.tell()), ("length", array.nbytes)):
        proto.external_data.add(key=key, value=str(value))
    file.write(np.ascontiguousarray(array).data.cast("B"))  # numpy's tofile hides that a disk is full
    return proto


def external_weight(folder: Path, proto: onnx.TensorProto) -> Weight:
    """A weight that is memory-mapped from its data file whenever it is loaded.

    Args:
        folder: The folder of the .onnx file.
        proto: An initializer with external data.

    Raises:
        BundleError: If the data file isn't in that folder.
        FileNotFoundError: If there is no such file.
        ValueError: If the file is too short, or the weight is of a type that graphs don't have.
    """
    dtype = _type_name(proto)
    return Weight(Tensor(proto.name, tuple(proto.dims), _mapped(folder, proto, dtype)), dtype)


def inline_weight(proto: onnx.TensorProto) -> Weight:
    """A weight that is stored inside the .onnx file. INT4 values stay packed, as in a data file.

    Raises:
        ValueError: If it holds fewer values than its shape says, or is of a type that graphs don't have.
    """
    dtype = _type_name(proto)
    packed = dtype == "int4"
    array = np.frombuffer(proto.raw_data, np.uint8) if packed else numpy_helper.to_array(proto)
    return Weight(Tensor(proto.name, tuple(proto.dims), lambda: array), dtype)


def _type_name(proto: onnx.TensorProto) -> str:
    name = TYPE_NAME.get(proto.data_type)
    if name is None:
        raise ValueError(f"{proto.name} is of type {proto.data_type}")
    return name


def _mapped(folder: Path, proto: onnx.TensorProto, dtype: str) -> Callable[[], np.ndarray]:
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    if Path(location).name != location:
        raise BundleError(f"{proto.name} is outside the bundle")
    offset, shape = int(entries.get("offset", 0)), tuple(proto.dims)
    size = stored_bytes(math.prod(shape), dtype)
    held = file_size(folder, folder / location)
    if any(side < 0 for side in shape) or not 0 <= offset <= held - size:
        raise ValueError(f"{location} has {held} bytes, too few for {proto.name}")
    if dtype == "int4":
        return lambda: np.memmap(folder / location, "uint8", "r", offset, size)
    return lambda: np.memmap(folder / location, dtype, "r", offset, shape)
