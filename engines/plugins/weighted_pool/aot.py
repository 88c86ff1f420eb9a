"""The plugin ahead of time (TensorRT 10.9 and later): the engine carries the kernel, and nothing has to be registered where it runs.

Build the network with the flag PREFER_AOT_PYTHON_PLUGINS. Registers under the same name as tensorrt_plugin.py: a process uses one of them.
Not run on real hardware yet (docs/limitations.md).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.plugins.weighted_pool.kernel import (
    THREADS,
    compile_kernels,
    float_bits,
    kernel_name,
    lanes_of,
)
from ppllava_edge.engines.plugins.weighted_pool.tensorrt_plugin import NAME, NAMESPACE, registered, type_name

PLUGIN = f"{NAMESPACE}::{NAME}"


def is_available(trt: Any, plugin: Any) -> bool:
    """Whether this library can embed kernels. plugin: its module `plugin`, None if it has none."""
    return (
        plugin is not None
        and hasattr(plugin, "aot_impl")
        and hasattr(trt.NetworkDefinitionCreationFlag, "PREFER_AOT_PYTHON_PLUGINS")
    )


def register_aot(trt: Any, plugin: Any, capability: tuple[int, int]) -> None:
    """Make the plugin known, with a kernel for one compute capability. Doing so twice is harmless. Raises EngineError if it can't be."""
    key = f"{trt.__name__} aot"
    if key in registered:
        return
    if trt.__name__ in registered:
        raise EngineError(
            "the pooling plugin is registered in Python already in this process; build engines that carry it in another one"
        )
    describe, implement = _functions(trt, plugin, capability)
    plugin.register(PLUGIN)(describe)
    plugin.aot_impl(PLUGIN)(implement)
    registered[key] = (describe, implement)


def _functions(trt: Any, trtp: Any, capability: tuple[int, int]) -> tuple[Any, Any]:
    """What the library calls: the output's type and shape, and the kernel with its launch."""

    def counts(weights: Any, kernel: Any, stride: Any) -> list:
        return [(weights.shape_expr[axis] - int(kernel[axis])) // int(stride[axis]) + 1 for axis in range(3)]

    def describe(hidden: Any, weights: Any, kernel: Any, stride: Any, temperature: Any, gelu: Any) -> Any:
        t, h, w = counts(weights, kernel, stride)
        result = hidden.like()
        result.shape_expr = trtp.ShapeExprs.from_tuple((t * h * w, hidden.shape_expr[3]))
        return result

    def implement(
        hidden: Any,
        weights: Any,
        kernel: Any,
        stride: Any,
        temperature: Any,
        gelu: Any,
        outputs: Any,
        tactic: Any,
    ) -> tuple:
        dtype = type_name(trt, hidden.dtype)
        channels = hidden.shape_expr[3].constant_value()
        lanes = lanes_of(dtype, channels)  # engines align their tensors
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.block_x = (
            math.prod(counts(weights, kernel, stride), start=1),
            -(-channels // (THREADS * lanes)),
            THREADS,
        )
        fixed = [
            channels,
            *(int(v) for v in kernel),
            *(int(v) for v in stride),
            float_bits(float(temperature)),
        ]
        extra = trtp.SymIntExprs(3 + len(fixed))
        for i in range(3):
            extra[i] = trtp.SymInt32(weights.shape_expr[i])
        for i, value in enumerate(fixed):
            extra[3 + i] = trtp.SymInt32(value)
        return kernel_name(dtype, bool(gelu), lanes), compile_kernels(capability, "ptx").code, launch, extra

    triple = npt.NDArray[np.int32]
    describe.__annotations__ = {
        "hidden": trtp.TensorDesc,
        "weights": trtp.TensorDesc,
        "kernel": triple,
        "stride": triple,
        "temperature": float,
        "gelu": int,
        "return": trtp.TensorDesc,
    }
    implement.__annotations__ = {
        "return": tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    }
    return describe, implement
