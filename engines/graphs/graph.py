"""A small writer and reader of ONNX graphs whose weights stay on disk until they are written.

Graphs are written node by node, as the mathematics reads. A weight is a `Tensor`: a name, a shape and a way to load it. It is loaded when
the graph is saved, appended to the external data file, and dropped, so that a graph's weights are never in memory together. A graph that
was read back holds such tensors too, so whatever rewrites graphs (quantisation, engines) works on both alike.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (makes int4 known to numpy)
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 24, 11  # written explicitly: newer defaults are refused by today's ONNX Runtime
DOMAIN = "ppllava_edge"
INLINE_BYTES = 1024  # smaller weights stay inside the .onnx file
ALIGNMENT = 4096  # of weights in the data file, so that they can be memory-mapped

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
    """A weight that is loaded when it is needed. shape: of what load() returns (int4: packed, two in a byte; shape is the unpacked one)."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    def map(
        self, function: Callable[[np.ndarray], np.ndarray], shape: Sequence[int], suffix: str = ""
    ) -> Tensor:
        """The same weight after a transformation."""
        return Tensor(self.name + suffix, tuple(shape), lambda: function(self.load()))

    @property
    def T(self) -> Tensor:
        """Transposed (rows and columns of a matrix)."""
        return self.map(np.transpose, self.shape[::-1])

    @property
    def count(self) -> int:
        """How many values it has."""
        return int(np.prod(self.shape, dtype=np.int64))

    @staticmethod
    def of(name: str, array: np.ndarray) -> Tensor:
        """A tensor that is already in memory."""
        return Tensor(name, array.shape, lambda: array)


@dataclass(frozen=True)
class Weight:
    """A tensor and the type that it is stored in."""

    tensor: Tensor
    dtype: str

    @property
    def bytes(self) -> int:
        """Size when stored."""
        return stored_bytes(self.tensor.count, self.dtype)

    def stored(self) -> np.ndarray:
        """Its values as they are stored. int4: the packed bytes."""
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
    """Bytes of so many values."""
    return (count + 1) // 2 if dtype == "int4" else count * np.dtype(dtype).itemsize


class Graph:
    """One stage's graph. `g.MatMul(x, w)` adds a node and returns the name of its output.

    dtype: the floating type that weights are stored in and the stage computes in ("float32" or "float16").
    """

    def __init__(self, name: str, dtype: str = "float32"):
        self.name, self.dtype = name, dtype
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.weights: dict[str, Weight] = {}
        self.constants: dict[str, onnx.TensorProto] = {}
        self.functions: list[onnx.FunctionProto] = []
        self.domains: set[str] = set()  # vendor operator sets that engine-time rewrites brought in
        self.opset, self.ir_version = OPSET, IR_VERSION
        self._scopes: list[str] = []
        self._count = 0

    # -- structure ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def scope(self, name: str | int) -> Iterator[None]:
        """Nodes added inside are called "name/…", so that a graph viewer shows the layers."""
        self._scopes.append(str(name))
        yield
        self._scopes.pop()

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare an input; strings in the shape are symbolic dimensions."""
        self.inputs.append(helper.make_tensor_value_info(name, ONNX_TYPE[dtype], list(shape)))
        return name

    def output(self, value: str, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare an output; value is what some node produced."""
        if value != name:
            self.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self.outputs.append(helper.make_tensor_value_info(name, ONNX_TYPE[dtype], list(shape)))

    def op(
        self, kind: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any
    ) -> str:
        """Add one node with one output and return the output's name. An empty input name is an omitted optional input."""
        self._count += 1
        name = "/".join([*self._scopes, f"{kind}_{self._count}"])
        self.nodes.append(
            helper.make_node(kind, list(inputs), [output or name], name=name, domain=domain, **attributes)
        )
        return output or name

    def __getattr__(self, kind: str) -> Callable[..., str]:
        if not kind[:1].isupper():
            raise AttributeError(kind)
        return lambda *inputs, **attributes: self.op(kind, *inputs, **attributes)

    def add_function(self, function: onnx.FunctionProto) -> None:
        """Make a model-local function known to the graph."""
        self.functions.append(function)

    # -- constants and weights ---------------------------------------------------------------------------------------

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self._constant("i" + "_".join(map(str, values)), np.array(values, np.int64))

    def integer(self, value: int) -> str:
        """A constant int64 scalar."""
        return self._constant(f"i_{value}", np.array(value, np.int64))

    def number(self, value: float, dtype: str | None = None) -> str:
        """A constant scalar in the graph's type (or another)."""
        dtype = dtype or self.dtype
        return self._constant(f"f_{value!r}_{dtype}", np.array(value, dtype))

    def _constant(self, name: str, array: np.ndarray) -> str:
        if name not in self.constants:
            self.constants[name] = helper.make_tensor(
                name, ONNX_TYPE[str(array.dtype)], array.shape, array.tobytes(), raw=True
            )
        return name

    def weight(self, tensor: Tensor, dtype: str | None = None) -> str:
        """Make a weight known, to be stored in the graph's floating type (or another), and return its name."""
        self.weights.setdefault(tensor.name, Weight(tensor, dtype or self.dtype))
        return tensor.name

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a small constant, or None if the name is no constant."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights when stored."""
        return sum(weight.bytes for weight in self.weights.values())

    @property
    def parameters(self) -> int:
        """Values of all weights; quantisation scales are not counted."""
        return sum(weight.tensor.count for name, weight in self.weights.items() if not name.endswith(SCALE))

    # -- rewriting ---------------------------------------------------------------------------------------------------

    def copy(self) -> Graph:
        """Another graph over the same weights, whose nodes may be changed."""
        other = Graph(self.name, self.dtype)
        other.nodes = [_copied(node) for node in self.nodes]
        other.inputs, other.outputs = [_copied(v) for v in self.inputs], [_copied(v) for v in self.outputs]
        other.weights, other.constants = dict(self.weights), dict(self.constants)
        other.functions, other.domains, other._count = list(self.functions), set(self.domains), self._count
        other.opset, other.ir_version = self.opset, self.ir_version
        return other

    def producers(self) -> dict[str, onnx.NodeProto]:
        """Value name → the node that makes it."""
        return {output: node for node in self.nodes for output in node.output}

    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """Value name → the nodes that read it."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    def prune(self) -> None:
        """Drop nodes, weights and constants that no output needs."""
        needed, kept = {v.name for v in self.outputs}, []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                kept.append(node)
                needed.update(node.input)
        self.nodes = kept[::-1]
        self.weights = {name: weight for name, weight in self.weights.items() if name in needed}
        self.constants = {name: value for name, value in self.constants.items() if name in needed}

    # -- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: Path) -> Graph:
        """A graph from a file. Its weights are mapped from the data file when they are loaded."""
        model = onnx.load(str(path), load_external_data=False)
        g = cls(model.graph.name)
        g.nodes, g.inputs, g.outputs = (
            list(model.graph.node),
            list(model.graph.input),
            list(model.graph.output),
        )
        g.functions, g._count = list(model.functions), len(g.nodes)
        g.domains = {o.domain for o in model.opset_import} - {"", DOMAIN}
        g.opset, g.ir_version = next(o.version for o in model.opset_import if not o.domain), model.ir_version
        for proto in model.graph.initializer:
            dtype = TYPE_NAME[proto.data_type]
            if proto.data_location == TensorProto.EXTERNAL:
                g.weights[proto.name] = Weight(
                    Tensor(proto.name, tuple(proto.dims), _mapped(path.parent, proto, dtype)), dtype
                )
            elif not _CONSTANT.match(proto.name):  # a small weight
                g.weights[proto.name] = Weight(Tensor.of(proto.name, numpy_helper.to_array(proto)), dtype)
            else:
                g.constants[proto.name] = proto
        floats = {w.dtype for name, w in g.weights.items() if not name.endswith(SCALE)} & {
            "float16",
            "float32",
        }
        g.dtype = "float16" if "float16" in floats else "float32"
        return g

    def save(self, path: Path, wrote: Callable[[int], None] | None = None, check: bool = True) -> None:
        """Write the graph to path and its weights, one after the other, to path.data. wrote: called with the bytes of every weight.

        check: whether onnx's checker must agree; pieces whose outputs have no known shape can't be checked.
        """
        data, initializers = path.with_name(path.name + ".data"), list(self.constants.values())
        with open(data, "wb") as file:
            for name, weight in self.weights.items():
                initializers.append(_store(name, weight, file, data.name))
                if wrote:
                    wrote(weight.bytes)
        if data.stat().st_size == 0:
            data.unlink()
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, initializers)
        domains = sorted(self.domains | ({DOMAIN} if self.functions else set()))
        opsets = [
            helper.make_opsetid("", self.opset),
            *(helper.make_opsetid(domain, 1) for domain in domains),
        ]
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            functions=self.functions,
            ir_version=self.ir_version,
            producer_name="ppllava-edge",
        )
        path.write_bytes(model.SerializeToString(deterministic=True))
        if check:
            onnx.checker.check_model(str(path))


SCALE = ".scale"  # names of quantisation scales end so
_CONSTANT = re.compile(r"(i|f_)[-_\d]")  # as ints, int and number name them


def _copied(message: Any) -> Any:
    other = type(message)()
    other.CopyFrom(message)
    return other


def _store(name: str, weight: Weight, file: Any, location: str) -> onnx.TensorProto:
    """Append a weight to the data file (or keep it in the proto if it is small)."""
    proto = TensorProto(name=name, data_type=ONNX_TYPE[weight.dtype], dims=weight.tensor.shape)
    array = weight.stored()
    if array.nbytes <= INLINE_BYTES:
        proto.raw_data = array.tobytes()
        return proto
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", file.tell()), ("length", array.nbytes)):
        proto.external_data.add(key=key, value=str(value))
    file.write(np.ascontiguousarray(array).data.cast("B"))  # tofile would not say that a disk is full
    return proto


def _mapped(folder: Path, proto: onnx.TensorProto, dtype: str) -> Callable[[], np.ndarray]:
    where = {entry.key: entry.value for entry in proto.external_data}
    path, offset, shape = folder / where["location"], int(where.get("offset", 0)), tuple(proto.dims)
    if Path(where["location"]).name != where["location"]:
        raise ValueError(f"{proto.name} lies outside the bundle")
    stored, count = (
        ("uint8", stored_bytes(int(np.prod(shape, dtype=np.int64)), dtype))
        if dtype == "int4"
        else (dtype, shape)
    )
    return lambda: np.memmap(path, stored, "r", offset, count)
