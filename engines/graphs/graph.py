"""A small writer and reader of ONNX graphs whose weights stay on disk.

Graphs are written node by node, in the order of the mathematics. A weight is a `Tensor`: a name, a shape and
a function that loads it. Saving a graph loads its weights one by one and appends them to the external data
file, so that they are never in memory together. A graph that was read from a file holds such tensors too;
passes that rewrite graphs (quantisation, engine builds) work on both alike.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from ppllava_edge.engines.bundle.untrusted import printable
from ppllava_edge.engines.errors import BundleError
from ppllava_edge.engines.graphs.external_data import external_weight, inline_weight, write_weight
from ppllava_edge.engines.graphs.tensors import ONNX_TYPE, SCALE, Tensor, Weight

# Set explicitly: current ONNX Runtime versions refuse the newer defaults of onnx.
OPSET = 24
IR_VERSION = 11
DOMAIN = "ppllava_edge"
_CONSTANT = re.compile(r"(i|f_)[-_\d]")  # names assigned by `ints`, `integer` and `number`


class Graph:
    """One stage's graph. `g.MatMul(x, w)` adds a node and returns the name of its output.

    Attributes:
        name: The stage's name.
        dtype: The floating type of the weights and the computation: "float32" or "float16".
        nodes: In topological order.
        inputs, outputs: The stage's interface.
        weights: Tensors by name, loaded when the graph is saved.
        constants: Small constants by name: shapes, axes, scalars.
        functions: Model-local functions.
        domains: Operator domains that passes for one engine added, such as "com.microsoft".
        opset, ir_version: Versions of the default domain and of the file format.
    """

    def __init__(self, name: str, dtype: str = "float32"):
        self.name = name
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.weights: dict[str, Weight] = {}
        self.constants: dict[str, onnx.TensorProto] = {}
        self.functions: list[onnx.FunctionProto] = []
        self.domains: set[str] = set()
        self.opset = OPSET
        self.ir_version = IR_VERSION
        self._scopes: list[str] = []
        self._count = 0  # nodes so far; numbers their names

    # -- nodes, inputs and outputs ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def scope(self, name: str | int) -> Iterator[None]:
        """Prefix the names of the nodes added inside with "name/", so that graph viewers show the layers."""
        self._scopes.append(str(name))
        yield
        self._scopes.pop()

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare an input and return its name. Strings in the shape are symbolic dimensions."""
        self.inputs.append(helper.make_tensor_value_info(name, ONNX_TYPE[dtype], list(shape)))
        return name

    def output(self, value: str, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare an output.

        Args:
            value: The value that a node produced.
            name: The output's name; an Identity node is added if it differs.
            dtype: A key of ONNX_TYPE.
            shape: Integers, or strings for symbolic dimensions.
        """
        if value != name:
            self.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self.outputs.append(helper.make_tensor_value_info(name, ONNX_TYPE[dtype], list(shape)))

    def op(
        self, kind: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node with one output.

        Args:
            kind: The operator.
            inputs: Value names; "" omits an optional input.
            output: The output's name; None: the node's generated name.
            domain: The operator's domain.
            attributes: The node's attributes.

        Returns:
            The output's name.
        """
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
        """Add a model-local function."""
        self.functions.append(function)

    # -- constants and weights -------------------------------------------------------------------------------

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self._constant("i" + "_".join(map(str, values)), np.array(values, np.int64))

    def integer(self, value: int) -> str:
        """A constant int64 scalar."""
        return self._constant(f"i_{value}", np.array(value, np.int64))

    def number(self, value: float, dtype: str | None = None) -> str:
        """A constant scalar in the graph's floating type, or in `dtype`."""
        dtype = dtype or self.dtype
        return self._constant(f"f_{value!r}_{dtype}", np.array(value, dtype))

    def _constant(self, name: str, array: np.ndarray) -> str:
        if name not in self.constants:
            self.constants[name] = helper.make_tensor(
                name, ONNX_TYPE[str(array.dtype)], array.shape, array.tobytes(), raw=True
            )
        return name

    def weight(self, tensor: Tensor, dtype: str | None = None) -> str:
        """Add a weight, stored in the graph's floating type or in `dtype`, and return its name."""
        self.weights.setdefault(tensor.name, Weight(tensor, dtype or self.dtype))
        return tensor.name

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a small constant; None if the name isn't one."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    @property
    def weight_bytes(self) -> int:
        """Size of all weights on disk in bytes."""
        return sum(weight.bytes for weight in self.weights.values())

    @property
    def parameters(self) -> int:
        """The number of values of all weights, without quantisation scales."""
        return sum(weight.tensor.count for name, weight in self.weights.items() if not name.endswith(SCALE))

    # -- rewriting -------------------------------------------------------------------------------------------

    def copy(self) -> Graph:
        """A graph over the same weights whose nodes, inputs and outputs can be changed."""
        other = Graph(self.name, self.dtype)
        other.nodes = [_copied(node) for node in self.nodes]
        other.inputs = [_copied(value) for value in self.inputs]
        other.outputs = [_copied(value) for value in self.outputs]
        other.weights = dict(self.weights)
        other.constants = dict(self.constants)
        other.functions = list(self.functions)
        other.domains = set(self.domains)
        other.opset = self.opset
        other.ir_version = self.ir_version
        other._count = self._count
        return other

    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that produces each value, by value name."""
        return {output: node for node in self.nodes for output in node.output}

    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read each value, by value name."""
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        return readers

    def prune(self) -> None:
        """Drop the nodes, weights and constants that no output depends on."""
        needed = {value.name for value in self.outputs}
        kept = []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                kept.append(node)
                needed.update(node.input)
        self.nodes = kept[::-1]
        self.weights = {name: weight for name, weight in self.weights.items() if name in needed}
        self.constants = {name: value for name, value in self.constants.items() if name in needed}

    # -- files -----------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: Path) -> Graph:
        """Read a graph. Its weights are mapped from the data file when they are loaded.

        Raises:
            BundleError: It isn't an ONNX graph, or its weights aren't in its folder; in one line.
        """
        try:
            return cls._parse(path, onnx.load(str(path), load_external_data=False))
        except (DecodeError, OSError, KeyError, ValueError, StopIteration) as error:
            reason = printable(error)
            raise BundleError(
                f"{path} is not a graph that ppllava-export wrote ({reason}); export the bundle again"
            ) from None

    @classmethod
    def _parse(cls, path: Path, model: onnx.ModelProto) -> Graph:
        g = cls(model.graph.name)
        g.nodes = list(model.graph.node)
        g.inputs = list(model.graph.input)
        g.outputs = list(model.graph.output)
        g.functions = list(model.functions)
        g.domains = {opset.domain for opset in model.opset_import} - {"", DOMAIN}
        g.opset = next(opset.version for opset in model.opset_import if not opset.domain)
        g.ir_version = model.ir_version
        g._count = len(g.nodes)
        for proto in model.graph.initializer:
            if proto.data_location == TensorProto.EXTERNAL:
                g.weights[proto.name] = external_weight(path.parent, proto)
            elif _CONSTANT.match(proto.name):
                g.constants[proto.name] = proto
            else:  # a weight that is too small for the data file
                g.weights[proto.name] = inline_weight(proto)
        stored = {weight.dtype for name, weight in g.weights.items() if not name.endswith(SCALE)}
        g.dtype = "float16" if "float16" in stored else "float32"
        return g

    def save(self, path: Path, wrote: Callable[[int], None] | None = None, check: bool = True) -> None:
        """Write the graph to `path`, and its weights one by one to `path`.data.

        Args:
            path: The .onnx file.
            wrote: Called with the size in bytes of every weight after it is written.
            check: Run onnx's checker. It rejects operators of other domains, and outputs without a known
                shape (pieces of a graph).

        Raises:
            OSError: If a file can't be written.
            onnx.checker.ValidationError: If the checker rejects the graph.
        """
        data = path.with_name(path.name + ".data")
        initializers = list(self.constants.values())
        with open(data, "wb") as file:
            for name, weight in self.weights.items():
                initializers.append(write_weight(name, weight, file, data.name))
                if wrote:
                    wrote(weight.bytes)
        if data.stat().st_size == 0:
            data.unlink()
        path.write_bytes(self._model(initializers).SerializeToString(deterministic=True))
        if check:
            onnx.checker.check_model(str(path))

    def _model(self, initializers: list[onnx.TensorProto]) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, initializers)
        domains = sorted(self.domains | ({DOMAIN} if self.functions else set()))
        return helper.make_model(
            graph,
            opset_imports=[
                helper.make_opsetid("", self.opset),
                *(helper.make_opsetid(domain, 1) for domain in domains),
            ],
            functions=self.functions,
            ir_version=self.ir_version,
            producer_name="ppllava-edge",
        )


def _copied(message: Any) -> Any:
    other = type(message)()
    other.CopyFrom(message)
    return other
