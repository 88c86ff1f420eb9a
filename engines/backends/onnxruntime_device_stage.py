"""A graph on ONNX Runtime's CUDA provider, with inputs and outputs bound to device memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ppllava_edge.engines.backends.cuda_driver import CudaDevice
from ppllava_edge.engines.backends.device_memory import Buffer, Values
from ppllava_edge.engines.backends.forking import keep_in_children
from ppllava_edge.engines.backends.onnxruntime_stage import (
    element_types,
    first_line,
    graph_files,
    open_session,
)
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.libraries import import_onnxruntime


class OrtDeviceStage:
    """One graph, run by ONNX Runtime on the device's stream.

    Attributes:
        captures: Whether runs can be captured in a CUDA graph. They can't: ONNX Runtime queues other work
            too.
        dtypes: Input name → dtype.
        outputs: Output name → dtype.

    Args:
        path: The graph.
        device: The GPU.
        on_cpu: Use the CPU provider; the device is then a double whose memory is the host's (tests).

    Raises:
        EngineError: The graph or the CUDA provider can't be opened.
        BundleError: An input or output isn't a tensor, or of a type that no stage has.
    """

    captures = False

    def __init__(self, path: Path, device: CudaDevice, on_cpu: bool = False):
        cuda = None if on_cpu else {"user_compute_stream": str(device.stream)}
        self.session = open_session(path, import_onnxruntime().SessionOptions(), cuda)
        keep_in_children(self)
        self.path = path
        self.device = device
        inputs = element_types(path, self.session.get_inputs())
        outputs = element_types(path, self.session.get_outputs())
        self.dtypes = {name: np.dtype(kind) for name, kind in inputs.items()}
        self.outputs = {name: np.dtype(kind) for name, kind in outputs.items()}
        self._memory_kind = "cpu" if on_cpu else "cuda"

    def files(self) -> list[Path]:
        """The graph's file, and the file of its weights if it has one."""
        return graph_files(self.path)

    def run(self, inputs: Values, outputs: dict[str, Buffer], profile: int = 0) -> None:
        """Queue one run.

        Args:
            inputs: All inputs by name.
            outputs: Output buffers by name; ONNX Runtime allocates memory for the other outputs.
            profile: Ignored; TensorRT stages have profiles.

        Raises:
            EngineError: The run failed.
        """
        with self.device.lock:
            binding = self._bind(inputs, outputs)
            try:
                self.session.run_with_iobinding(binding)
            except Exception as error:
                raise EngineError(f"{self.path.name} failed: {first_line(error)}") from None

    def _bind(self, inputs: Values, outputs: dict[str, Buffer]) -> object:
        kind = self._memory_kind
        binding = self.session.io_binding()
        for name, dtype in self.dtypes.items():
            value = inputs[name]
            if isinstance(value, Buffer):
                binding.bind_input(name, kind, 0, dtype, list(value.shape), value.address)
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(value, dtype))
        for name, dtype in self.outputs.items():
            if name in outputs:
                buffer = outputs[name]
                binding.bind_output(name, kind, 0, dtype, list(buffer.shape), buffer.address)
            else:
                binding.bind_output(name, kind)
        return binding
