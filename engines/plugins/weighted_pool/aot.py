"""The plugin compiled ahead of time (TensorRT 10.9 and later): the engine carries the kernel.

Such an engine runs without registering the plugin. Build the network with the flag
PREFER_AOT_PYTHON_PLUGINS. This form registers under the same name as tensorrt_plugin.py: a process uses one
of them. Not yet run on hardware (docs/limitations.md).
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
    """Whether a library can embed kernels.

    Args:
        trt: The module tensorrt or tensorrt_rtx.
        plugin: Its submodule `plugin`; None if it has none.
    """
    return (
        plugin is not None
        and hasattr(plugin, "aot_impl")
        and hasattr(trt.NetworkDefinitionCreationFlag, "PREFER_AOT_PYTHON_PLUGINS")
    )


def register_aot(trt: Any, plugin: Any, capability: tuple[int, int]) -> None:
    """Register the plugin with a kernel for one compute capability; repeating it is harmless.

    Args:
        trt: The module tensorrt or tensorrt_rtx.
        plugin: Its submodule `plugin`.
        capability: Compute capability of the GPU that engines are built for.

    Raises:
        EngineError: If the other form of the plugin is registered in this process.
    """
    key = f"{trt.__name__} aot"
    if key in registered:
        return
    if trt.__name__ in registered:
        raise EngineError(
            "the pooling plugin is registered in Python already in this process; "
            "build engines that carry it in another process"
        )
    describe = _describe_function(plugin)
    implement = _implement_function(trt, plugin, capability)
    plugin.register(PLUGIN)(describe)
    plugin.aot_impl(PLUGIN)(implement)
    registered[key] = (describe, implement)


def _window_counts(weights: Any, kernel: Any, stride: Any) -> list:
    """Windows along each axis, as symbolic expressions."""
    return [(weights.shape_expr[axis] - int(kernel[axis])) // int(stride[axis]) + 1 for axis in range(3)]


def _describe_function(trtp: Any) -> Any:
    """The function from which the library learns the output's type and shape."""

    def describe(hidden: Any, weights: Any, kernel: Any, stride: Any, temperature: Any, gelu: Any) -> Any:
        t, h, w = _window_counts(weights, kernel, stride)
        result = hidden.like()
        result.shape_expr = trtp.ShapeExprs.from_tuple((t * h * w, hidden.shape_expr[3]))
        return result

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
    return describe


def _implement_function(trt: Any, trtp: Any, capability: tuple[int, int]) -> Any:
    """The function from which the library takes the kernel, its launch and its arguments."""

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
        launch.grid_x = math.prod(_window_counts(weights, kernel, stride), start=1)
        launch.grid_y = -(-channels // (THREADS * lanes))
        launch.block_x = THREADS
        windows = [int(v) for v in (*kernel, *stride)]
        fixed = [channels, *windows, float_bits(float(temperature))]
        extra = trtp.SymIntExprs(3 + len(fixed))
        for i in range(3):
            extra[i] = trtp.SymInt32(weights.shape_expr[i])
        for i, value in enumerate(fixed):
            extra[3 + i] = trtp.SymInt32(value)
        return kernel_name(dtype, bool(gelu), lanes), compile_kernels(capability, "ptx").code, launch, extra

    implement.__annotations__ = {
        "return": tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    }
    return implement
