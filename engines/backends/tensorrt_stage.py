"""An engine of TensorRT or TensorRT-RTX, with inputs and outputs bound to device memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.backends.cuda_driver import CudaDevice
from ppllava_edge.engines.backends.device_memory import Buffer, Values
from ppllava_edge.engines.backends.forking import keep_in_children
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.libraries import import_library


class TensorRTStage:
    """One TensorRT engine, run on the device's stream.

    find_engine must have checked the file's hash: some of these libraries crash on damaged files.

    Attributes:
        captures: Whether runs can be captured in a CUDA graph.
        dtypes: Input name → dtype.
        outputs: Output name → dtype.

    Args:
        path: The engine.
        device: The GPU.
        library: "tensorrt" or "tensorrt_rtx".
        trt: The imported library; None imports it.

    Raises:
        EngineError: The library is missing, or the engine is for another version or GPU.
    """

    captures = True

    def __init__(self, path: Path, device: CudaDevice, library: str, trt: Any = None):
        self.trt = trt or import_library(library)
        self.path = path
        self.device = device
        self._logger = self.trt.Logger(self.trt.Logger.ERROR)
        self._runtime = self.trt.Runtime(self._logger)
        device.enter()
        self.engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            bundle, target = path.parent.parent.parent, path.parent.name
            raise EngineError(
                f"{library} can't open {path}: it was built by another version or for another GPU; "
                f"rebuild it: ppllava-build {bundle} --target {target} --force"
            )
        keep_in_children(self)
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        is_input = {name: self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT for name in names}
        dtypes = {name: np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name))) for name in names}
        self.dtypes = {name: dtypes[name] for name in names if is_input[name]}
        self.outputs = {name: dtypes[name] for name in names if not is_input[name]}
        self._contexts: dict[int, Any] = {}
        self._unused_outputs: dict[str, Buffer] = {}
        self._host_values: dict[str, np.ndarray] = {}

    def files(self) -> list[Path]:
        """The engine's file, which holds its weights too."""
        return [self.path]

    def run(self, inputs: Values, outputs: dict[str, Buffer], profile: int = 0) -> None:
        """Queue one run.

        Args:
            inputs: All inputs by name.
            outputs: Where to write; other outputs are written to scratch memory.
            profile: Index of the optimisation profile.

        Raises:
            EngineError: Shapes outside the profile, too little memory, or a failed run.
        """
        with self.device.lock:
            self.device.enter()
            context = self._context(profile)
            for name in self.dtypes:
                self._bind_input(context, name, inputs[name], profile)
            for name, dtype in self.outputs.items():
                buffer = outputs.get(name)
                if buffer is None:
                    buffer = self._scratch_for(name, tuple(context.get_tensor_shape(name)), dtype)
                context.set_tensor_address(name, buffer.address)
            if not context.execute_async_v3(self.device.stream):
                raise EngineError(f"{self.path.name} failed on the GPU; see TensorRT's message above")

    def _context(self, profile: int) -> Any:
        """The execution context of a profile, created on first use. Each has activation memory of its own."""
        if profile not in self._contexts:
            context = self.engine.create_execution_context()
            if context is None:
                raise EngineError(
                    f"{self.path.name}: the GPU has too little memory for this engine's activations; "
                    "build it with a smaller --capacity"
                )
            if profile and not context.set_optimization_profile_async(profile, self.device.stream):
                raise EngineError(
                    f"{self.path.name} has no profile {profile}; it was built by another version"
                )
            self._contexts[profile] = context
        return self._contexts[profile]

    def _bind_input(self, context: Any, name: str, value: Buffer | np.ndarray, profile: int) -> None:
        shape = tuple(value.shape)
        if not context.set_input_shape(name, shape):
            smallest, _, largest = self.engine.get_tensor_profile_shape(name, profile)
            raise EngineError(
                f"{self.path.name}: {name} is {shape}; "
                f"this engine was built for {tuple(smallest)} to {tuple(largest)}"
            )
        if isinstance(value, Buffer):
            context.set_tensor_address(name, value.address)
            return
        array = np.ascontiguousarray(value, self.dtypes[name])
        self._host_values[name] = array  # must live until the run is done
        context.set_tensor_address(name, array.ctypes.data)

    def _scratch_for(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Buffer:
        """Memory for an output that the caller doesn't use: TensorRT needs an address for every output."""
        size = int(np.prod([max(n, 1) for n in shape])) * dtype.itemsize
        if name not in self._unused_outputs or self._unused_outputs[name].nbytes < size:
            self._unused_outputs[name] = self.device.empty((size,), np.uint8)
        return self._unused_outputs[name]
