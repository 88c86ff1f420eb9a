"""ONNX external data: weights in a file beside the graph; appended when saving, memory-mapped when read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

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
        ValueError: If the data file isn't in that folder.
    """
    dtype = TYPE_NAME[proto.data_type]
    return Weight(Tensor(proto.name, tuple(proto.dims), _mapped(folder, proto, dtype)), dtype)


def inline_weight(proto: onnx.TensorProto) -> Weight:
    """A weight that is stored inside the .onnx file. INT4 values stay packed, as in a data file."""
    dtype = TYPE_NAME[proto.data_type]
    packed = dtype == "int4"
    array = np.frombuffer(proto.raw_data, np.uint8) if packed else numpy_helper.to_array(proto)
    return Weight(Tensor(proto.name, tuple(proto.dims), lambda: array), dtype)


def _mapped(folder: Path, proto: onnx.TensorProto, dtype: str) -> Callable[[], np.ndarray]:
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries["location"]
    if Path(location).name != location:
        raise ValueError(f"{proto.name} is outside the bundle")
    offset = int(entries.get("offset", 0))
    shape = tuple(proto.dims)
    if dtype == "int4":
        packed = stored_bytes(int(np.prod(shape, dtype=np.int64)), dtype)
        return lambda: np.memmap(folder / location, "uint8", "r", offset, packed)
    return lambda: np.memmap(folder / location, dtype, "r", offset, shape)
