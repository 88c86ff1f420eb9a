"""PromptGuidedPool3d as a TensorRT plugin in Python (IPluginV3): TensorRT 10.0 and later, TensorRT-RTX.

An engine with this plugin needs it registered again where it runs. With TensorRT 10.9 and later the engine
can carry the kernel itself instead: aot.py. tensorrt_plugin.cu is the plugin for programs in C++.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ppllava_edge.engines.bundle.windows import Triple
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.libraries import import_library
from ppllava_edge.engines.plugins.weighted_pool.kernel import ACCESS_BYTES, Call, Launcher

NAME = "PromptGuidedPool3d"
VERSION = "1"
NAMESPACE = "ppllava_edge"
registered: dict[str, Any] = {}  # library name → its creator, which must live as long as the registry


def import_with_plugin(library: str) -> Any:
    """Import tensorrt or tensorrt_rtx and register the pooling plugin, for engines that need it.

    Raises:
        EngineError: If the library is missing or refuses the plugin.
    """
    trt = import_library(library)
    register(trt)
    return trt


def register(trt: Any) -> None:
    """Register the plugin with a library; repeating it is harmless.

    Args:
        trt: The module tensorrt or tensorrt_rtx.

    Raises:
        EngineError: If the library refuses it.
    """
    if trt.__name__ in registered:
        return
    creator = creator_class(trt)()
    if not trt.get_plugin_registry().register_creator(creator, NAMESPACE):
        raise EngineError(
            f"{trt.__name__} {trt.__version__} refuses the pooling plugin; another plugin has its name"
        )
    registered[trt.__name__] = creator


@cache
def _launcher() -> Launcher:
    return Launcher()


def type_name(trt: Any, dtype: Any) -> str:
    """The numpy name of a library's data type."""
    return {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16"}[dtype]


def plugin_fields(trt: Any, kernel: Any, stride: Any, temperature: Any, gelu: Any) -> Any:
    """The plugin's attributes as the library stores them in an engine."""
    kinds = trt.PluginFieldType
    return trt.PluginFieldCollection(
        [
            trt.PluginField("kernel", np.array(kernel, np.int32), kinds.INT32),
            trt.PluginField("stride", np.array(stride, np.int32), kinds.INT32),
            trt.PluginField("temperature", np.array(temperature, np.float32), kinds.FLOAT32),
            trt.PluginField("gelu", np.array(gelu, np.int32), kinds.INT32),
        ]
    )


class _Pooling:
    """One node of a graph: what TensorRT asks of a plugin. Kernel, stride, temperature and GELU are fixed.

    TensorRT's interfaces are bases of the subclass in `_plugin_class`; no library is imported yet.
    """

    trt: Any
    num_outputs: int

    def _set_attributes(self, kernel: Triple, stride: Triple, temperature: float, gelu: bool) -> None:
        self.plugin_name = NAME
        self.plugin_version = VERSION
        self.plugin_namespace = NAMESPACE
        self.num_outputs = 1
        self.windows = kernel
        self.steps = stride
        self.temperature = temperature
        self.gelu = gelu

    def get_capability_interface(self, kind: Any) -> Any:
        return self

    def clone(self) -> Any:
        return type(self)(self.windows, self.steps, self.temperature, self.gelu)  # type: ignore[call-arg]

    def get_output_data_types(self, input_types: Any) -> list:
        return [input_types[0]]

    def get_output_shapes(self, inputs: Any, shape_inputs: Any, expressions: Any) -> list:
        operation = expressions.operation
        kinds = self.trt.DimensionOperation
        windows = expressions.constant(1)
        for axis in range(3):  # (size - kernel) / stride + 1
            room = operation(kinds.SUB, inputs[1][axis], expressions.constant(self.windows[axis]))
            steps = operation(kinds.FLOOR_DIV, room, expressions.constant(self.steps[axis]))
            windows = operation(kinds.PROD, windows, operation(kinds.SUM, steps, expressions.constant(1)))
        shape = self.trt.DimsExprs(2)
        shape[0] = windows
        shape[1] = inputs[0][3]
        return [shape]

    def get_fields_to_serialize(self) -> Any:
        return plugin_fields(self.trt, self.windows, self.steps, [self.temperature], [int(self.gelu)])

    def supports_format_combination(self, position: int, descriptions: Any, inputs: int) -> bool:
        tensor = descriptions[position].desc
        kinds = self.trt.DataType
        if tensor.format != self.trt.TensorFormat.LINEAR:
            return False
        if position == 0:  # hidden
            return tensor.type in (kinds.FLOAT, kinds.HALF, kinds.BF16)
        if position == 1:  # weights
            return tensor.type == kinds.FLOAT
        return tensor.type == descriptions[0].desc.type

    def configure_plugin(self, inputs: Any, outputs: Any) -> None: ...

    def on_shape_change(self, inputs: Any, outputs: Any) -> None: ...

    def attach_to_context(self, context: Any) -> Any:
        return self.clone()

    def enqueue(
        self,
        inputs: Any,
        outputs: Any,
        input_addresses: Any,
        output_addresses: Any,
        workspace: Any,
        stream: int,
    ) -> None:
        t, h, w, channels = inputs[0].dims
        hidden, weights = (int(address) for address in input_addresses[:2])
        out = int(output_addresses[0])
        call = Call(
            size=(t, h, w),
            channels=channels,
            kernel=self.windows,
            stride=self.steps,
            temperature=self.temperature,
            dtype=type_name(self.trt, inputs[0].type),
            gelu=self.gelu,
            aligned=(hidden | out) % ACCESS_BYTES == 0,
        )
        _launcher().launch(call, hidden, weights, out, stream)


def _plugin_class(library: Any) -> Any:
    bases = (
        library.IPluginV3,
        library.IPluginV3OneCore,
        library.IPluginV3OneBuild,
        library.IPluginV3OneRuntime,
    )

    class Plugin(_Pooling, *bases):  # type: ignore[misc]
        trt = library

        def __init__(self, kernel: Triple, stride: Triple, temperature: float, gelu: bool):
            for base in bases:
                base.__init__(self)
            self._set_attributes(kernel, stride, temperature, gelu)

    return Plugin


def creator_class(trt: Any) -> Any:
    """The class that creates plugins from a node's attributes or from an engine's fields."""
    plugin_class = _plugin_class(trt)

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = NAME
            self.plugin_version = VERSION
            self.plugin_namespace = NAMESPACE
            self.field_names = plugin_fields(trt, [], [], [], [])

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            given = {field.name: np.asarray(field.data).ravel() for field in fields}
            kernel, stride = (tuple(int(v) for v in given[part]) for part in ("kernel", "stride"))
            if len(kernel) != 3 or len(stride) != 3 or min(*kernel, *stride) < 1:
                raise EngineError(
                    f"{NAME}: kernel and stride must be three whole numbers each, not {kernel} and {stride}"
                )
            gelu = bool(given["gelu"][0]) if "gelu" in given else False
            return plugin_class(kernel, stride, float(given["temperature"][0]), gelu)

    return Creator
