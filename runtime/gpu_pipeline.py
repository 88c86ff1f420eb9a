"""The pipeline resident on a GPU: from vision to the decoder everything stays in device memory; only token ids come back.

The same calls as Pipeline's, with device buffers in the place of arrays (np.asarray copies one to the host). Engines: ONNX Runtime's CUDA
provider, TensorRT, TensorRT-RTX.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..engines.bundle import Bundle
from ..engines.device import Buffer, CudaDevice
from ..engines.device_stage import OrtDeviceStage, TensorRTStage, plugins_of
from ..engines.engine import PLUGIN_STAGE, Engine
from ..engines.errors import EngineError, MediaError, PromptError
from ..engines.plugins.prepare_frame.kernel import FramePreparer, is_device_frame
from ..engines.pooling import Windows
from .gpu_decoding import GpuDecoder, GpuPrompt, GrowingGpuDecoder
from .pipeline import Pipeline, check_media

DeviceStage = OrtDeviceStage | TensorRTStage


class GpuPipeline(Pipeline):
    """A bundle on a GPU. engine: one of the bundle's, fresh and for this GPU (engines/select.py). device: a double in tests."""

    def __init__(self, bundle: Bundle, engine: Engine, threads: int | None = None, gpu: CudaDevice | None = None, on_cpu: bool = False):
        super().__init__(bundle, "cpu", threads, "standard")
        self.device, self.engine = "cuda", engine
        self.gpu = gpu or CudaDevice()
        self._on_cpu, self._device_stages = on_cpu, dict[str, list[DeviceStage]]()
        self._launcher: Any = None
        self._preparer: FramePreparer | None = None

    def load(self) -> None:
        """Open every stage now, so that the first question finds them ready."""
        assert self.engine is not None
        for name in self.engine.stages:
            self.device_stages(name)
        _ = self.decoder

    def wait(self) -> None:
        """Until everything that was queued is done."""
        self.gpu.synchronize()

    # -- stages ----------------------------------------------------------------------------------------------------------------------------

    def device_stages(self, name: str) -> list[DeviceStage]:
        """The engine files of a stage, opened, in order."""
        with self._lock:
            if name not in self._device_stages:
                assert self.engine is not None
                paths = self.engine.paths(name)
                if not paths:
                    raise EngineError(f"{self.engine.folder} has no {name}; rebuild it: ppllava-build {self.bundle.path} --target {self.engine.target} --force")
                self._device_stages[name] = [self._open_stage(path, name) for path in paths]
            return self._device_stages[name]

    def _open_stage(self, path: Any, name: str) -> DeviceStage:
        assert self.engine is not None
        if self.engine.library == "onnxruntime":
            return OrtDeviceStage(path, self.gpu, self._on_cpu)
        trt = plugins_of(self.engine.library) if name == PLUGIN_STAGE and self.engine.details.get("plugin") == "python" else None
        return TensorRTStage(path, self.gpu, self.engine.library, trt)

    def _run(self, name: str, inputs: dict[str, Any], outputs: Mapping[str, tuple[int, ...]]) -> list[Buffer]:
        """Run a stage of one file: host floats go up, outputs of these shapes are made."""
        stage = self.device_stages(name)[0]
        values = {key: self._on_device(inputs[key], stage.dtypes[key]) for key in stage.dtypes}
        made = {key: self.gpu.empty(shape, stage.outputs[key]) for key, shape in outputs.items()}
        stage.run(values, made)
        return [made[key] for key in outputs]

    def _on_device(self, value: Any, dtype: np.dtype) -> Any:
        if isinstance(value, Buffer):
            return value if value.dtype == dtype else self.gpu.upload(np.asarray(value).astype(dtype))
        array = np.asarray(value)
        return array if array.dtype == np.int64 and array.ndim == 1 else self.gpu.upload(array, dtype=dtype)  # kernel and stride steer; they stay

    # -- vision ----------------------------------------------------------------------------------------------------------------------------

    def takes_device_frames(self, frame: Any) -> bool:
        """Whether a frame lies in GPU memory; it stays there."""
        return is_device_frame(frame)

    def prepare_frame(self, frame: Any) -> tuple[Any, Any]:
        """A frame in GPU memory → pixels (1,3,size,size) and the resized picture (size,size,3), both there. Raises MediaError."""
        if self._preparer is None:
            self._preparer = FramePreparer(self.gpu, self.manifest.preprocessing, self.device_stages("trunk")[0].dtypes["pixels"])
        return self._preparer.prepare(frame)

    def rows(self, states: Any) -> list[Any]:
        """states (k,S,P+1,C) on the GPU → k of (1,S,P+1,C), the same memory."""
        return [states.rows(i, 1) for i in range(len(states))]

    def join(self, states: Iterable[Any], count: int) -> Any:
        """`count` frames' states, (1,S,P+1,C) each → (T,S,P+1,C) on the GPU."""
        joined: Buffer | None = None
        for i, state in enumerate(states):
            if joined is None:
                joined = self.gpu.empty((count, *state.shape[1:]), state.dtype)
            self.gpu.copy(state, joined.rows(i, 1))
        return joined

    def encode_trunk(self, pixels: Any, more: bool = False) -> Any:
        """pixels (T,3,H,W) float32, on the host or the GPU → states (T,S,P+1,C) on the GPU. Returns before it is done: frames are decoded meanwhile."""
        v = self.manifest.vision
        if len(pixels.shape) != 4 or pixels.shape[1:] != (3, v.image_size, v.image_size):
            raise MediaError(f"pixels must be (T, 3, {v.image_size}, {v.image_size}), not {pixels.shape}")
        if not len(pixels):
            raise MediaError("there are no frames to encode")
        stage = self.device_stages("trunk")[0]
        states = self.gpu.empty((len(pixels), v.states, v.patches + v.class_token, v.hidden_size), stage.outputs["states"])
        for i in range(0, len(pixels), FRAMES_PER_CALL):
            part = pixels.rows(i, min(FRAMES_PER_CALL, len(pixels) - i)) if isinstance(pixels, Buffer) else pixels[i : i + FRAMES_PER_CALL]
            stage.run({"pixels": self._on_device(part, stage.dtypes["pixels"])}, {"states": states.rows(i, len(part))})
        return states

    def branch(self, states: Any) -> Any:
        """states (T,S,P+1,C) of one clip → features (T,P,C) on the GPU."""
        v = self.manifest.vision
        states = states if isinstance(states, Buffer) else self.gpu.upload(np.asarray(states), dtype=self.device_stages("trunk")[0].outputs["states"])
        if v.max_frames is not None:
            self.check_frames(len(states))
            return self._run("temporal", {"states": states}, {"features": (len(states), v.patches, v.hidden_size)})[0]
        features = self.gpu.empty((len(states), v.patches, v.hidden_size), states.dtype)
        for t in range(len(states)):  # the last state, without its class token
            last = states.rows(t, 1).reshape(v.states, v.patches + v.class_token, v.hidden_size).rows(v.states - 1, 1)
            tokens = last.reshape(v.patches + v.class_token, v.hidden_size).rows(int(v.class_token), v.patches)
            self.gpu.copy(tokens, features.rows(t, 1).reshape(v.patches, v.hidden_size))
        return features

    def encode_frames(self, pixels: np.ndarray, media: str = "video") -> Any:
        """pixels (T,3,H,W) → features (T,P,C) on the GPU; media as in Pipeline."""
        if media != "image":
            return self.branch(self.encode_trunk(np.asarray(pixels)))
        states = self.encode_trunk(np.asarray(pixels))
        tiles = [self.branch(states.rows(i, 1)) for i in range(len(states))]
        features = self.gpu.empty((len(tiles), *tiles[0].shape[1:]), tiles[0].dtype)
        for i, tile in enumerate(tiles):
            self.gpu.copy(tile, features.rows(i, 1))
        return features

    # -- question and pooling --------------------------------------------------------------------------------------------------------------

    def encode_question(self, ids: np.ndarray, mask: np.ndarray | None = None) -> Any:
        """ids (1,L) int64 → q (1,E) on the GPU."""
        ids, mask = self._question_inputs(ids, mask)
        assert self.manifest.question is not None
        return self._run("question", {"ids": ids, "mask": mask}, {"q": (1, self.manifest.question.embedding_size)})[0]

    def similarity(self, features: Any, q: Any) -> np.ndarray:
        """features, q → cosine (T,rows,columns) float32, on the host: people look at it."""
        return np.asarray(self._similarity(features, q)[0])

    def _similarity(self, features: Any, q: Any) -> list[Buffer]:
        shape = (len(features), *self.manifest.vision.grid)
        return self._run("similarity", {"features": features, "q": q}, {"cosine": shape, "weights": shape})

    def window_weights(self, features: Any, q: Any) -> Any:
        """The weights that pooling takes, (T,rows,columns) float32 on the GPU."""
        if not self.manifest.pooling.guided:
            return self.gpu.zeros((len(features), *self.manifest.vision.grid), np.float32)
        if q is None:
            raise PromptError("prompt-guided pooling needs the encoded question")
        return self._similarity(features, q)[1]

    def _pool(self, features: Any, weights: Any, count: int, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Any:
        """The whole clip at once: the pooling kernel reads linear_1's output once, wherever that is to be had."""
        assert self.engine is not None
        v, width = self.manifest.vision, self.manifest.decoder.hidden_size
        size = (len(features), *v.grid)
        windows = int(np.prod([(n - k) // s + 1 for n, k, s in zip(size, kernel, stride)]))
        inputs, outputs = {"features": features, "weights": weights}, {"visual_tokens": (windows, width)}
        details = self.engine.details
        if PLUGIN_STAGE in self.engine.stages and list(kernel) == details.get("kernel") and list(stride) == details.get("stride"):
            return self._run(PLUGIN_STAGE, inputs, outputs)[0]
        if "pooling-before" in self.engine.stages and self._kernel() is not None:
            hidden = self._run("pooling-before", {"features": features}, {"hidden": (len(features), v.patches, width)})[0]
            pooled = self.gpu.empty((windows, width), hidden.dtype)
            self._launch(hidden, self._on_device(weights, np.dtype(np.float32)), pooled, size, kernel, stride)
            return self._run("pooling-after", {"pooled": pooled}, outputs)[0]
        return self._run("pooling", inputs | {"kernel": np.array(kernel, np.int64), "stride": np.array(stride, np.int64)}, outputs)[0]

    def _kernel(self) -> Any:
        """The pooling kernel's launcher; None on a double of a GPU, or where it can't be compiled."""
        if self._launcher is None:
            from ..engines.plugins.weighted_pool.kernel import Launcher

            try:
                self._launcher = Launcher()
            except EngineError:
                self._launcher = False
        return self._launcher or None

    def _launch(self, hidden: Buffer, weights: Buffer, pooled: Buffer, size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...]) -> None:
        from ..engines.plugins.weighted_pool.kernel import Call

        triples = [(part[0], part[1], part[2]) for part in (size, kernel, stride)]
        temperature, aligned = self.manifest.pooling.temperature, (hidden.address | pooled.address) % 16 == 0
        call = Call(triples[0], hidden.shape[-1], triples[1], triples[2], temperature, str(hidden.dtype), gelu=True, aligned=aligned)
        self._launcher.launch(call, hidden.address, weights.address, pooled.address, self.gpu.stream)

    def visual_tokens(
        self,
        features: Any,
        q: Any,
        media: str = "video",
        image_size: tuple[int, int] | None = None,
        weights: Any = None,
        windows: Windows | None = None,
    ) -> Any:
        """features (T,P,C), q (1,E) → visual tokens (N,D), on the GPU for video; media as in Pipeline."""
        if self.manifest.pooling.windowed:
            return super().visual_tokens(features, q, media, image_size, weights, windows)
        check_media(media, self.manifest.pooling.method)
        grid, width = self.manifest.vision.grid, self.manifest.decoder.hidden_size
        features = self._on_device(features, self.device_stages("pooling")[0].dtypes["features"])
        if media == "image":
            shape = (self.manifest.pooling.tokens(1, grid), width)
            tiles = [np.asarray(self._run("pooling", {"features": features.rows(i, 1)}, {"visual_tokens": shape})[0]) for i in range(len(features))]
            return self._assemble_image(np.stack(tiles), grid, image_size)
        return self._run("pooling", {"features": features}, {"visual_tokens": (self.manifest.pooling.tokens(len(features), grid), width)})[0]

    # -- decoder ---------------------------------------------------------------------------------------------------------------------------

    def prompt(self, before: Sequence[int], visual: Any, after: Sequence[int]) -> Any:
        """Token ids, visual tokens, token ids → a prompt on the GPU: tokens are embedded there."""
        return GpuPrompt(list(before), visual, list(after))

    @property
    def decoder(self) -> Any:
        """The decoder with its KV cache on the GPU."""
        if not hasattr(self, "_decoder"):
            assert self.engine is not None
            kind = GpuDecoder if self.engine.cache == "in place" else GrowingGpuDecoder
            self._decoder = kind(self.device_stages("decoder"), self.manifest.decoder, self.engine, self.gpu, self.embed_tokens)
        return self._decoder

    def prefill(self, inputs_embeds: Any) -> np.ndarray:
        """inputs_embeds (S,D), or a prompt → logits (V,) float32 of the last position."""
        logits: np.ndarray = self.decoder.prefill(inputs_embeds)
        return logits

    def generate(self, inputs_embeds: Any, max_new_tokens: int, stop_ids: Any = (), sampling: Any = None, lookup: Any = None, sequence: Any = None) -> Any:
        """Yield token ids after the prompt; as Pipeline does."""
        return self.decoder.generate(inputs_embeds, max_new_tokens, stop_ids, sampling, self._allowed(lookup), sequence)


FRAMES_PER_CALL = 8  # what TensorRT's profile allows at most
