"""A graph on ONNX Runtime, on the CPU or CUDA, with inputs and outputs in host memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.backends.forking import keep_in_children
from ppllava_edge.engines.backends.weight_files import check_weight_files
from ppllava_edge.engines.bundle.untrusted import printable
from ppllava_edge.engines.errors import BundleError, EngineError
from ppllava_edge.engines.libraries import import_onnxruntime
from ppllava_edge.engines.machine.gpu_facts import load_driver

LARGE_DATA = 64 << 20  # bytes; smaller weight files are not worth releasing
MADV_DONTNEED = 4
CHECKS_WEIGHT_FILES = (1, 24)  # since this version, ONNX Runtime opens weights only below the graph's folder
NUMPY_TYPE = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


def choose_device(device: str) -> str:
    """Resolve a device name.

    Args:
        device: "auto", "cpu" or "cuda".

    Returns:
        "cpu" or "cuda".

    Raises:
        EngineError: An unknown name, or CUDA was requested and isn't available.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise EngineError(f"device {device!r} is unknown; choose auto, cpu or cuda")
    if device == "cpu":
        return "cpu"
    available = has_cuda_provider()
    if device == "auto":
        return "cuda" if available and load_driver() is not None else "cpu"
    if not available:
        raise EngineError(
            "device=cuda needs ONNX Runtime's CUDA build: pip uninstall onnxruntime, "
            "then pip install 'ppllava-edge[cuda]'"
        )
    if load_driver() is None:
        raise EngineError("device=cuda: no NVIDIA driver was found on this machine; use device=cpu")
    return "cuda"


def has_cuda_provider() -> bool:
    """Whether the installed ONNX Runtime was built with CUDA; a usable GPU may still be missing."""
    return "CUDAExecutionProvider" in import_onnxruntime().get_available_providers()


class Stage:
    """One graph, opened with ONNX Runtime. Call it with arrays to run it.

    Attributes:
        path: The graph.
        device: "cpu" or "cuda".
        dtypes: Input name → NumPy type.
        outputs: Output names, in order.

    Args:
        path: The graph.
        device: "cpu" or "cuda".
        threads: Threads of one operator; None: one per core.
        lean: Use half the memory at slightly lower speed, for graphs that run only a few times.
        piece: Whether it is one of several graphs that run in turn: it then keeps no memory and no spinning
            threads between runs.

    Raises:
        EngineError: ONNX Runtime is missing or can't open the graph, or CUDA isn't available.
        BundleError: An input isn't a tensor, or of a type that no stage has.
    """

    def __init__(
        self,
        path: Path,
        device: str = "cpu",
        threads: int | None = None,
        lean: bool = False,
        piece: bool = False,
    ):
        options = _session_options(import_onnxruntime(), threads, lean, piece)
        self.session = open_session(path, options, None if device == "cpu" else {})
        keep_in_children(self)
        release_mapped_weights(path)
        self.path = path
        self.device = device
        self.dtypes = element_types(path, self.session.get_inputs())
        self.outputs = [o.name for o in self.session.get_outputs()]

    def files(self) -> list[Path]:
        """The graph's file, and the file of its weights if it has one."""
        return graph_files(self.path)

    def __call__(self, tidy: bool = False, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run once.

        Args:
            tidy: Give the working memory back to the system, for stages that won't run again soon.
            **inputs: Arrays by input name; they are cast to the graph's dtypes.

        Returns:
            All outputs in order, in the graph's dtypes.

        Raises:
            EngineError: ONNX Runtime refuses the inputs or runs out of memory.
        """
        options = None
        if tidy and self.device == "cpu":
            options = import_onnxruntime().RunOptions()
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        try:
            feeds: dict[str, np.ndarray] = {
                name: np.ascontiguousarray(array, dtype=self.dtypes[name]) for name, array in inputs.items()
            }
            return self.session.run(None, feeds, options)
        except Exception as error:
            raise EngineError(f"{self.path.name} failed: {first_line(error)}") from None


def open_session(path: Path, options: Any, cuda: dict[str, Any] | None = None) -> Any:
    """Open a graph.

    Args:
        path: The graph.
        options: SessionOptions.
        cuda: Options of the CUDA provider; None: run on the CPU.

    Returns:
        The InferenceSession.

    Raises:
        EngineError: ONNX Runtime can't open the graph, or can't start CUDA.
        BundleError: The graph takes its weights from outside its folder.
    """
    ort = import_onnxruntime()
    options.log_severity_level = 3
    options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever the file's name says
    providers: list[Any] = ["CPUExecutionProvider"]
    if cuda is not None:
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    if tuple(map(int, ort.__version__.split(".")[:2])) < CHECKS_WEIGHT_FILES:
        check_weight_files(path)
    try:
        # its fallback to another provider prints to stdout, and would hide that CUDA failed
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=False)
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        reason = f": {first_line(error)}"
        if "opset" in str(error).lower():
            reason = "; it needs ONNX Runtime 1.24 or newer, or: ppllava-build BUNDLE --target lowered"
        raise EngineError(f"ONNX Runtime {ort.__version__} can't open {path.name}{reason}") from None
    if cuda is not None and "CUDAExecutionProvider" not in session.get_providers():
        raise EngineError(
            "ONNX Runtime could not start its CUDA provider (driver, CUDA or cuDNN missing); "
            "ppllava-doctor says what is missing; or use device=cpu"
        )
    return session


def _session_options(ort: Any, threads: int | None, lean: bool, piece: bool) -> Any:
    options = ort.SessionOptions()
    # weight-only products multiply in INT8: 5 times faster
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    if piece:
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if lean:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
    if threads:
        options.intra_op_num_threads = threads
    return options


def graph_files(path: Path) -> list[Path]:
    """A graph's file, and the file of its weights if it has one."""
    data = path.with_name(path.name + ".data")
    return [path, data] if data.is_file() else [path]


def element_types(path: Path, values: Sequence[Any]) -> dict[str, Any]:
    """NumPy types of a session's inputs or outputs, by name.

    Raises:
        BundleError: One isn't a tensor, or of a type that no stage has.
    """
    for value in values:
        if value.type not in NUMPY_TYPE:
            raise BundleError(
                f"{path}: {printable(value.name)} is {printable(value.type)}, which no stage has; "
                "the bundle is damaged, export it again"
            )
    return {value.name: NUMPY_TYPE[value.type] for value in values}


def release_mapped_weights(path: Path) -> None:
    """Release the memory-mapped weights of an opened graph: the session has packed copies.

    Pages that are read again are loaded from the file.
    """
    data = path.with_name(path.name + ".data")
    if not sys.platform.startswith("linux") or not data.is_file() or data.stat().st_size < LARGE_DATA:
        return
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for start, end in _unwritten_mappings(data.resolve()):
            libc.madvise(start, end - start, MADV_DONTNEED)
    except (OSError, AttributeError, ValueError):
        return  # failing only costs memory


def _unwritten_mappings(file: Path) -> Iterator[tuple[int, int]]:
    """Address ranges that this process maps from a file and never wrote to (writes would be lost)."""
    start = end = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:  # the first line of a mapping; its statistics follow
            start = end = 0
            if line.endswith(str(file)):
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
        elif end and line.startswith("Anonymous:") and line.split()[1] == "0":
            yield start, end


def first_line(error: Exception) -> str:
    """The first line of an engine's error message, at most 200 characters."""
    text = str(error).strip()
    return printable(text.splitlines()[0] if text else type(error).__name__)
