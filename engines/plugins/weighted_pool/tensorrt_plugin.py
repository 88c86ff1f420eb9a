"""PromptGuidedPool3d as a TensorRT plugin written in Python (IPluginV3): TensorRT 10.0 and later, TensorRT-RTX.

An engine with this plugin needs it registered again where it runs. TensorRT 10.9 and later can carry the kernel itself instead: aot.py. For
programs in C++ there is tensorrt_plugin.cu.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.libraries import import_library
from ppllava_edge.engines.plugins.weighted_pool.kernel import Call, Launcher

NAME, VERSION, NAMESPACE = "PromptGuidedPool3d", "1", "ppllava_edge"
registered: dict[str, Any] = {}  # library name → its creator, which must live as long as the registry


def import_with_plugin(library: str) -> Any:
    """Import tensorrt or tensorrt_rtx and register the pooling plugin with it, for engines that need it where they run."""
    trt = import_library(library)
    register(trt)
    return trt


def register(trt: Any) -> None:
    """Make the plugin known to a library: tensorrt or tensorrt_rtx. Doing so twice is harmless. Raises EngineError if it is refused."""
    if trt.__name__ in registered:
        return
    creator = _classes(trt)()
    if not trt.get_plugin_registry().register_creator(creator, NAMESPACE):
        raise EngineError(
            f"{trt.__name__} {trt.__version__} refuses the pooling plugin; another one has its name"
        )
    registered[trt.__name__] = creator


@cache
def _launcher() -> Launcher:
    return Launcher()


def type_name(trt: Any, dtype: Any) -> str:
    """A library's data type by its numpy name."""
    return {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16"}[dtype]


def _fields(trt: Any, kernel: Any, stride: Any, temperature: Any, gelu: Any) -> Any:
    kinds = trt.PluginFieldType
    return trt.PluginFieldCollection(
        [
            trt.PluginField("kernel", np.array(kernel, np.int32), kinds.INT32),
            trt.PluginField("stride", np.array(stride, np.int32), kinds.INT32),
            trt.PluginField("temperature", np.array(temperature, np.float32), kinds.FLOAT32),
            trt.PluginField("gelu", np.array(gelu, np.int32), kinds.INT32),
        ]
    )


def _classes(trt: Any) -> Any:
    """The creator's class, over one library's interfaces."""

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        """One node: kernel, stride, temperature and whether the GELU is applied are fixed."""

        def __init__(
            self, kernel: tuple[int, int, int], stride: tuple[int, int, int], temperature: float, gelu: bool
        ):
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            self.num_outputs = 1
            self.windows, self.steps, self.temperature, self.gelu = kernel, stride, temperature, gelu

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.windows, self.steps, self.temperature, self.gelu)

        def get_output_data_types(self, input_types: Any) -> list:
            return [input_types[0]]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, expressions: Any) -> list:
            operation, kinds = expressions.operation, trt.DimensionOperation
            windows = expressions.constant(1)
            for axis in range(3):  # (size - kernel) / stride + 1
                room = operation(kinds.SUB, inputs[1][axis], expressions.constant(self.windows[axis]))
                steps = operation(kinds.FLOOR_DIV, room, expressions.constant(self.steps[axis]))
                windows = operation(kinds.PROD, windows, operation(kinds.SUM, steps, expressions.constant(1)))
            shape = trt.DimsExprs(2)
            shape[0], shape[1] = windows, inputs[0][3]
            return [shape]

        def get_fields_to_serialize(self) -> Any:
            return _fields(trt, self.windows, self.steps, [self.temperature], [int(self.gelu)])

        def supports_format_combination(self, position: int, descriptions: Any, inputs: int) -> bool:
            one = descriptions[position].desc
            if one.format != trt.TensorFormat.LINEAR:
                return False
            if position == 0:
                return one.type in (trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.BF16)
            return one.type == (trt.DataType.FLOAT if position == 1 else descriptions[0].desc.type)

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
            addresses = int(input_addresses[0]), int(input_addresses[1]), int(output_addresses[0])
            aligned = (addresses[0] | addresses[2]) % 16 == 0
            call = Call(
                (t, h, w),
                channels,
                self.windows,
                self.steps,
                self.temperature,
                type_name(trt, inputs[0].type),
                self.gelu,
                aligned,
            )
            _launcher().launch(call, *addresses, stream)

    class Creator(trt.IPluginCreatorV3One):
        """Makes the plugin from a node's attributes, and again from an engine."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            self.field_names = _fields(trt, [], [], [], [])

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            given = {field.name: np.asarray(field.data).ravel() for field in fields}
            kernel, stride = (tuple(int(v) for v in given[part]) for part in ("kernel", "stride"))
            if len(kernel) != 3 or len(stride) != 3 or min(*kernel, *stride) < 1:
                raise EngineError(
                    f"{NAME}: kernel and stride must be three whole numbers each, not {kernel} and {stride}"
                )
            gelu = bool(given["gelu"][0]) if "gelu" in given else False
            return Plugin(
                (kernel[0], kernel[1], kernel[2]),
                (stride[0], stride[1], stride[2]),
                float(given["temperature"][0]),
                gelu,
            )

    return Creator
