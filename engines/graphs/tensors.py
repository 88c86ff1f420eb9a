"""Weights of a graph that are loaded only when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  (registers int4 with numpy)
import numpy as np
from onnx import TensorProto

SCALE = ".scale"  # suffix of the names of quantisation scales

ONNX_TYPE = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int4": TensorProto.INT4,
}
TYPE_NAME: dict[Any, str] = {number: name for name, number in ONNX_TYPE.items()}


@dataclass(frozen=True)
class Tensor:
    """A weight that is loaded on demand.

    Attributes:
        name: Its name in the graph.
        shape: The shape of the array that `load` returns. INT4 is loaded packed, two values per byte; the
            shape is the unpacked one.
        load: Returns the values. It is called every time they are needed; nothing is cached.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    def map(
        self, function: Callable[[np.ndarray], np.ndarray], shape: Sequence[int], suffix: str = ""
    ) -> Tensor:
        """The same tensor with a function applied when it is loaded.

        Args:
            function: Maps the loaded array to the new one.
            shape: The shape of the result.
            suffix: Appended to the name.
        """
        return Tensor(self.name + suffix, tuple(shape), lambda: function(self.load()))

    @property
    def T(self) -> Tensor:
        """The transposed matrix."""
        return self.map(np.transpose, self.shape[::-1])

    @property
    def count(self) -> int:
        """The number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    @staticmethod
    def of(name: str, array: np.ndarray) -> Tensor:
        """A tensor whose values are already in memory."""
        return Tensor(name, array.shape, lambda: array)


@dataclass(frozen=True)
class Weight:
    """A tensor and the type in which a graph stores it.

    Attributes:
        tensor: The values.
        dtype: A key of ONNX_TYPE.
    """

    tensor: Tensor
    dtype: str

    @property
    def bytes(self) -> int:
        """Size on disk in bytes."""
        return stored_bytes(self.tensor.count, self.dtype)

    def stored(self) -> np.ndarray:
        """Load the values and convert them to the stored type; INT4 stays packed.

        Raises:
            AssertionError: If the loaded shape isn't the declared one.
        """
        array = self.tensor.load()
        if self.dtype == "int4":
            return array
        array = np.asarray(array, dtype=self.dtype, order="C")
        if array.size == 1:
            array = array.reshape(self.tensor.shape)  # safetensors gives scalars as (1,)
        if array.shape != tuple(self.tensor.shape):
            raise AssertionError(f"{self.tensor.name}: loaded {array.shape}, declared {self.tensor.shape}")
        return array


def stored_bytes(count: int, dtype: str) -> int:
    """The size in bytes of `count` values of a type."""
    return (count + 1) // 2 if dtype == "int4" else count * np.dtype(dtype).itemsize
