"""The pipeline resident on a GPU: from vision to the decoder everything stays in device memory.

Only token ids come back to the host. Engines: ONNX Runtime's CUDA provider, TensorRT, TensorRT-RTX.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.backends.cuda_driver import CudaDevice
from ppllava_edge.engines.backends.device_memory import Buffer
from ppllava_edge.engines.backends.onnxruntime_device_stage import OrtDeviceStage
from ppllava_edge.engines.backends.tensorrt_stage import TensorRTStage
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import PLUGIN_STAGE, Engine
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.plugins.prepare_frame.kernel import FramePreparer, is_device_frame
from ppllava_edge.engines.plugins.weighted_pool.kernel import Call, Launcher
from ppllava_edge.engines.plugins.weighted_pool.tensorrt_plugin import import_with_plugin
from ppllava_edge.runtime.decoding.decoder import Decoder
from ppllava_edge.runtime.decoding.gpu_cache import GpuPrompt
from ppllava_edge.runtime.decoding.gpu_decoder import GpuDecoder, GrowingGpuDecoder
from ppllava_edge.runtime.lazy import locked_cached_property
from ppllava_edge.runtime.pipeline.base import BasePipeline

DeviceStage = OrtDeviceStage | TensorRTStage
FRAMES_PER_CALL = 8  # the maximum of TensorRT's profile


class GpuPipeline(BasePipeline):
    """A bundle on a GPU.

    Args:
        bundle: The bundle to open.
        engine: One of the bundle's engines, up to date and built for this GPU (engines/targets/select.py).
        threads: Kept for the caller; nothing here runs on the CPU.
        gpu: The device; None: the machine's first.
        on_cpu: Run ONNX Runtime's graphs on its CPU provider over the device's memory, for tests.
    """

    engine: Engine

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        threads: int | None = None,
        gpu: CudaDevice | None = None,
        on_cpu: bool = False,
    ):
        super().__init__(bundle, threads)
        self.device, self.engine, self.engine_note = "cuda", engine, ""
        self.gpu = gpu or CudaDevice()
        self._on_cpu = on_cpu

    def close(self) -> None:
        """As BasePipeline says; GPU memory that nothing uses is freed at once."""
        super().close()
        self.__dict__.pop("_preparer", None)
        self.gpu.close()

    def wait(self) -> None:
        """Block until queued GPU work completes."""
        self.gpu.synchronize()

    # -- stages ----------------------------------------------------------------------------------------------

    def stage_names(self) -> list[str]:
        """As BasePipeline says; of the ways to pool, the one that this model's own windows take."""
        pooling, names = self._pooling_stages(), list(self.engine.stages)
        return [name for name in names if name in pooling or not name.startswith("pooling")]

    def _pooling_stages(self) -> tuple[str, ...]:
        windows, stages = self.manifest.pooling.video, self.engine.stages
        if windows.kernel and self._plugin_fits(windows.kernel, windows.stride or windows.kernel):
            return (PLUGIN_STAGE,)
        if "pooling-before" in stages and self._launcher:
            return ("pooling-before", "pooling-after")
        return ("pooling",)

    def open_stage(self, name: str) -> list[DeviceStage]:
        """As BasePipeline says."""
        return self._stages.get(name, lambda: self._open(name))

    def _open(self, name: str) -> list[DeviceStage]:
        self.check_open()
        paths = self.engine.paths(name)
        if not paths:
            raise EngineError(
                f"{self.engine.folder} has no {name}; rebuild it: "
                f"ppllava-build {self.bundle.path} --target {self.engine.target} --force"
            )
        stages = [self._open_file(path, name) for path in paths]
        self.check_open()
        return stages

    def _open_file(self, path: Path, name: str) -> DeviceStage:
        library = self.engine.library
        if library == "onnxruntime":
            return OrtDeviceStage(path, self.gpu, self._on_cpu)
        with_plugin = name == PLUGIN_STAGE and self.engine.details.get("plugin") == "python"
        return TensorRTStage(path, self.gpu, library, import_with_plugin(library) if with_plugin else None)

    def _run(self, name: str, inputs: dict[str, Any], outputs: Mapping[str, tuple[int, ...]]) -> list[Buffer]:
        """Run a stage of one file: host floats are uploaded, outputs of these shapes are allocated."""
        stage = self.open_stage(name)[0]
        values = {key: self._on_device(inputs[key], stage.dtypes[key]) for key in stage.dtypes}
        made = {key: self.gpu.empty(shape, stage.outputs[key]) for key, shape in outputs.items()}
        stage.run(values, made)
        return [made[key] for key in outputs]

    def _on_device(self, value: Any, dtype: np.dtype) -> Any:
        """A value as a stage takes it; kernel and stride are read on the host and stay there."""
        if isinstance(value, Buffer):
            return value if value.dtype == dtype else self.gpu.upload(np.asarray(value).astype(dtype))
        array = np.asarray(value)
        steers = array.dtype == np.int64 and array.ndim == 1
        return array if steers else self.gpu.upload(array, dtype=dtype)

    # -- vision ----------------------------------------------------------------------------------------------

    def takes_device_frames(self, frame: Any) -> bool:
        """As BasePipeline says."""
        return is_device_frame(frame)

    def prepare_frame(self, frame: Any) -> tuple[Any, Any]:
        """As BasePipeline says; both results stay in GPU memory."""
        return self._preparer.prepare(frame)

    @locked_cached_property
    def _preparer(self) -> FramePreparer:
        dtype = self.open_stage("trunk")[0].dtypes["pixels"]
        return FramePreparer(self.gpu, self.manifest.preprocessing, dtype)

    def rows(self, array: Any) -> list[Any]:
        """As BasePipeline says."""
        return [array.rows(i, 1) for i in range(len(array))]

    def join(self, states: Iterable[Any], count: int) -> Any:
        """As BasePipeline says."""
        joined: Buffer | None = None
        for i, state in enumerate(states):
            if joined is None:
                joined = self.gpu.empty((count, *state.shape[1:]), state.dtype)
            self.gpu.copy(state, joined.rows(i, 1))
        return joined

    def encode_trunk(self, pixels: Any, more: bool = False) -> Any:
        """As BasePipeline says; returns before it is done, so that frames are decoded meanwhile."""
        self.check_pixels(pixels)
        v, stage, count = self.manifest.vision, self.open_stage("trunk")[0], len(pixels)
        shape = (count, v.states, v.patches + v.class_token, v.hidden_size)
        states = self.gpu.empty(shape, stage.outputs["states"])
        for first in range(0, count, FRAMES_PER_CALL):
            some = min(FRAMES_PER_CALL, count - first)
            on_device = isinstance(pixels, Buffer)
            part = pixels.rows(first, some) if on_device else pixels[first : first + some]
            inputs = {"pixels": self._on_device(part, stage.dtypes["pixels"])}
            stage.run(inputs, {"states": states.rows(first, some)})
        return states

    def branch(self, states: Any) -> Any:
        """As BasePipeline says."""
        v = self.manifest.vision
        if not isinstance(states, Buffer):
            dtype = self.open_stage("trunk")[0].outputs["states"]
            states = self.gpu.upload(np.asarray(states), dtype=dtype)
        shape = (len(states), v.patches, v.hidden_size)
        if v.max_frames is None:
            return self._last_states(states, self.gpu.empty(shape, states.dtype))
        self.check_frames(len(states))
        return self._run("temporal", {"states": states}, {"features": shape})[0]

    def _last_states(self, states: Buffer, features: Buffer) -> Buffer:
        """No temporal adapter: copy each frame's last state, without its class token, into features."""
        v = self.manifest.vision
        tokens, skipped = v.patches + v.class_token, int(v.class_token)
        for t in range(len(states)):
            frame = states.rows(t, 1).reshape(v.states, tokens, v.hidden_size)
            last = frame.rows(v.states - 1, 1).reshape(tokens, v.hidden_size).rows(skipped, v.patches)
            self.gpu.copy(last, features.rows(t, 1).reshape(v.patches, v.hidden_size))
        return features

    # -- question and pooling --------------------------------------------------------------------------------

    def encode_question(self, ids: np.ndarray, mask: np.ndarray | None = None) -> Any:
        """As BasePipeline says."""
        ids, mask = self.check_question(ids, mask)
        assert self.manifest.question is not None
        shape = (1, self.manifest.question.embedding_size)
        return self._run("question", {"ids": ids, "mask": mask}, {"q": shape})[0]

    def similarity(self, features: Any, q: Any) -> np.ndarray:
        """As BasePipeline says."""
        return np.asarray(self._similarity(features, q)[0])

    def patch_weights(self, features: Any, q: Any) -> Buffer:
        """As BasePipeline says."""
        return self._similarity(features, q)[1]

    def equal_weights(self, shape: tuple[int, ...]) -> Buffer:
        """As BasePipeline says."""
        return self.gpu.zeros(shape, np.float32)

    def _similarity(self, features: Any, q: Any) -> list[Buffer]:
        shape = (len(features), *self.manifest.vision.grid)
        return self._run("similarity", {"features": features, "q": q}, {"cosine": shape, "weights": shape})

    def pool_windows(
        self, features: Any, weights: Any, count: int, kernel: tuple[int, ...], stride: tuple[int, ...]
    ) -> Buffer:
        """Pool the whole clip at once, with our CUDA kernel where there is one."""
        size = (len(features), *self.manifest.vision.grid)
        windows = int(np.prod([(n - k) // s + 1 for n, k, s in zip(size, kernel, stride)]))
        inputs = {"features": features, "weights": weights}
        outputs = {"visual_tokens": (windows, self.manifest.decoder.hidden_size)}
        if self._plugin_fits(kernel, stride):
            return self._run(PLUGIN_STAGE, inputs, outputs)[0]
        if "pooling-before" in self.engine.stages and self._launcher:
            hidden = self._hidden(features)
            pooled = self.gpu.empty(outputs["visual_tokens"], hidden.dtype)
            weights = self._on_device(weights, np.dtype(np.float32))
            self._launch(hidden, weights, pooled, size, kernel, stride)
            return self._run("pooling-after", {"pooled": pooled}, outputs)[0]
        sizes = {"kernel": np.array(kernel, np.int64), "stride": np.array(stride, np.int64)}
        return self._run("pooling", inputs | sizes, outputs)[0]

    def _plugin_fits(self, kernel: tuple[int, ...], stride: tuple[int, ...]) -> bool:
        """Whether the engine has a plugin stage, built for these windows."""
        details = self.engine.details
        built_for = details.get("kernel"), details.get("stride")
        return PLUGIN_STAGE in self.engine.stages and built_for == (list(kernel), list(stride))

    def _hidden(self, features: Any) -> Buffer:
        """linear_1's output (T, P, D), before the GELU that the pooling kernel applies."""
        shape = (len(features), self.manifest.vision.patches, self.manifest.decoder.hidden_size)
        return self._run("pooling-before", {"features": features}, {"hidden": shape})[0]

    @locked_cached_property
    def _launcher(self) -> Launcher | None:
        """The pooling kernel's launcher; None where it can't be compiled."""
        try:
            return Launcher()
        except EngineError:
            return None

    def _launch(
        self,
        hidden: Buffer,
        weights: Buffer,
        pooled: Buffer,
        size: tuple[int, ...],
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        launcher = self._launcher
        assert launcher is not None
        size, kernel, stride = ((part[0], part[1], part[2]) for part in (size, kernel, stride))
        aligned = (hidden.address | pooled.address) % 16 == 0
        temperature, dtype = self.manifest.pooling.temperature, str(hidden.dtype)
        call = Call(size, hidden.shape[-1], kernel, stride, temperature, dtype, gelu=True, aligned=aligned)
        launcher.launch(call, hidden.address, weights.address, pooled.address, self.gpu.stream)

    def pool_clip(self, features: Any) -> Buffer:
        """As BasePipeline says."""
        tokens = self.manifest.pooling.tokens(len(features), self.manifest.vision.grid)
        shape = (tokens, self.manifest.decoder.hidden_size)
        return self._run("pooling", {"features": features}, {"visual_tokens": shape})[0]

    def _pool_unwindowed(self, features: Any, media: str, image_size: tuple[int, int] | None) -> Any:
        features = self._on_device(features, self.open_stage("pooling")[0].dtypes["features"])
        return super()._pool_unwindowed(features, media, image_size)

    # -- decoder ---------------------------------------------------------------------------------------------

    def prompt(self, before: Sequence[int], visual: Any, after: Sequence[int]) -> GpuPrompt:
        """Token ids, visual tokens, token ids → a prompt whose tokens are embedded on the GPU."""
        return GpuPrompt(list(before), visual, list(after))

    @locked_cached_property
    def decoder(self) -> Decoder:
        """As BasePipeline says."""
        self.check_open()
        kind = GpuDecoder if self.engine.cache == "in place" else GrowingGpuDecoder
        stages = self.open_stage("decoder")
        return kind(stages, self.manifest.decoder, self.engine, self.gpu, self.embedding_table.rows)
