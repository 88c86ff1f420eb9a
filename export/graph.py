"""A small writer of ONNX graphs whose weights go straight to disk.

Graphs are written node by node, as the mathematics reads. A weight is a `Tensor`: a name, a shape and a way to load it; it is loaded
when the graph stores it, appended to the external data file, and dropped, so that a graph's weights are never in memory together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

OPSET, IR_VERSION = 24, 11  # written explicitly: newer defaults are refused by today's ONNX Runtime
DOMAIN = "ppllava_edge"
INLINE_BYTES = 1024  # smaller weights stay inside the .onnx file
ALIGNMENT = 4096  # of weights in the data file, so that they can be memory-mapped

_ONNX_TYPE = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64, "int32": TensorProto.INT32, "bool": TensorProto.BOOL}


@dataclass(frozen=True)
class Tensor:
    """A weight that is loaded when it is needed. shape: of what load() returns."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    def map(self, function: Callable[[np.ndarray], np.ndarray], shape: Sequence[int], suffix: str = "") -> Tensor:
        """The same weight after a transformation."""
        return Tensor(self.name + suffix, tuple(shape), lambda: function(self.load()))

    @property
    def T(self) -> Tensor:
        """Transposed (rows and columns of a matrix)."""
        return self.map(np.transpose, self.shape[::-1])

    @staticmethod
    def of(name: str, array: np.ndarray) -> Tensor:
        """A tensor that is already in memory."""
        return Tensor(name, array.shape, lambda: array)


class Graph:
    """One stage's graph. `g.MatMul(x, w)` adds a node and returns the name of its output.

    dtype: the floating type that weights are stored in and the stage computes in ("float32" or "float16").
    data: path of the external data file; None for a dry run, which adds up sizes and loads nothing. wrote: called with the bytes of
    every weight that was stored.
    """

    def __init__(self, name: str, dtype: str = "float32", data: Path | None = None, wrote: Callable[[int], None] | None = None):
        self.name, self.dtype, self.data, self._wrote = name, dtype, data, wrote
        self.parameters = self.weight_bytes = 0
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._functions: list[onnx.FunctionProto] = []
        self._scopes: list[str] = []
        self._count = 0
        self._file = open(data, "wb") if data else None  # noqa: SIM115  (closed by save or close)

    # -- structure ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def scope(self, name: str | int) -> Iterator[None]:
        """Nodes added inside are called "name/…", so that a graph viewer shows the layers."""
        self._scopes.append(str(name))
        yield
        self._scopes.pop()

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare an input; strings in the shape are symbolic dimensions."""
        self._inputs.append(helper.make_tensor_value_info(name, _ONNX_TYPE[dtype], list(shape)))
        return name

    def output(self, value: str, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare an output; value is what some node produced."""
        if value != name:
            self._nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self._outputs.append(helper.make_tensor_value_info(name, _ONNX_TYPE[dtype], list(shape)))

    def op(self, kind: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Add one node with one output and return the output's name. An empty input name is an omitted optional input."""
        self._count += 1
        name = "/".join([*self._scopes, f"{kind}_{self._count}"])
        self._nodes.append(helper.make_node(kind, list(inputs), [output or name], name=name, domain=domain, **attributes))
        return output or name

    def __getattr__(self, kind: str) -> Callable[..., str]:
        if not kind[:1].isupper():
            raise AttributeError(kind)
        return lambda *inputs, **attributes: self.op(kind, *inputs, **attributes)

    def add_function(self, function: onnx.FunctionProto) -> None:
        """Make a model-local function known to the graph."""
        self._functions.append(function)

    # -- constants and weights ---------------------------------------------------------------------------------------

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self._constant("i" + "_".join(map(str, values)), np.array(values, np.int64))

    def int(self, value: int) -> str:
        """A constant int64 scalar."""
        return self._constant(f"i_{value}", np.array(value, np.int64))

    def number(self, value: float, dtype: str | None = None) -> str:
        """A constant scalar in the graph's type (or another)."""
        dtype = dtype or self.dtype
        return self._constant(f"f_{value!r}_{dtype}", np.array(value, dtype))

    def _constant(self, name: str, array: np.ndarray) -> str:
        if name not in self._initializers:
            self._initializers[name] = helper.make_tensor(name, _ONNX_TYPE[str(array.dtype)], array.shape, array.tobytes(), raw=True)
        return name

    def weight(self, tensor: Tensor, dtype: str | None = None) -> str:
        """Store a weight in the graph's floating type (or another) and return its name."""
        dtype = dtype or self.dtype
        if tensor.name in self._initializers:
            return tensor.name
        count = int(np.prod(tensor.shape, dtype=np.int64))
        size = count * np.dtype(dtype).itemsize
        self.parameters += count
        self.weight_bytes += size
        proto = TensorProto(name=tensor.name, data_type=_ONNX_TYPE[dtype], dims=tensor.shape)
        self._initializers[tensor.name] = proto
        if self._file is None:
            return tensor.name
        array = np.asarray(tensor.load(), dtype=dtype, order="C")
        if array.size == 1:
            array = array.reshape(tensor.shape)  # safetensors gives scalars as (1,)
        if array.shape != tuple(tensor.shape):
            raise AssertionError(f"{tensor.name}: loaded {array.shape}, declared {tensor.shape}")
        if self._wrote:
            self._wrote(size)
        if size <= INLINE_BYTES:
            proto.raw_data = array.tobytes()
            return tensor.name
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        assert self.data is not None
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.data.name), ("offset", self._file.tell()), ("length", size)):
            proto.external_data.add(key=key, value=str(value))
        array.tofile(self._file)
        return tensor.name

    # -- finish ------------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the graph; its weights are in the data file already. The data file is removed if nothing needed it."""
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, list(self._initializers.values()))
        opsets = [helper.make_opsetid("", OPSET)] + ([helper.make_opsetid(DOMAIN, 1)] if self._functions else [])
        model = helper.make_model(
            graph, opset_imports=opsets, functions=self._functions, ir_version=IR_VERSION, producer_name="ppllava-edge"
        )
        self.close()
        if self.data is not None and self.data.stat().st_size == 0:
            self.data.unlink()
        path.write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(path))

    def close(self) -> None:
        """Close the data file."""
        if self._file is not None:
            self._file.close()
