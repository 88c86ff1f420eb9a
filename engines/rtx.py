"""Building a bundle's graphs with TensorRT-RTX, ahead of time, on any machine: no GPU is needed.

Engines are strongly typed: precision is in the graph. Not run on real hardware yet (docs/limitations.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from .bundle import Manifest
from .errors import EngineError
from .pooling import Windows

CAPABILITIES = ("8.6", "8.9")  # compute capabilities built for unless told otherwise: RTX 30 and RTX 40
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # input → least, best, most


def import_tensorrt_rtx() -> Any:
    """The library, or one line that names the extra to install. Raises EngineError."""
    try:
        import tensorrt_rtx
    except ImportError:
        raise EngineError("TensorRT-RTX is not installed: pip install 'ppllava-edge[rtx]'") from None
    return tensorrt_rtx


def build(graph: Path, manifest: Manifest, capabilities: tuple[str, ...] = CAPABILITIES, capacity: int = 1280) -> bytes:
    """One stage (the file's name tells which) → a serialized engine for these compute capabilities.

    capacity: positions of the KV cache, fixed in an engine. Raises EngineError that names node and reason when something is refused.
    """
    trt = import_tensorrt_rtx()
    logger = _Log(trt)
    builder = trt.Builder(logger.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger.logger)
    if not parser.parse(with_capacity(graph, capacity), str(graph)):
        raise EngineError(f"TensorRT-RTX refuses {graph.name}: {describe_errors(parser)}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        try:
            kind = getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""))
        except AttributeError:
            raise EngineError(f"TensorRT-RTX {trt.__version__} doesn't build for compute capability {capability}") from None
        config.set_compute_capability(kind, i)
    shape_inputs = {network.get_input(i).name for i in range(network.num_inputs) if network.get_input(i).is_shape_tensor}
    for shapes in profiles(graph.stem, manifest, capacity):
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            (profile.set_shape_input if name in shape_inputs else profile.set_shape)(name, *bounds)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"TensorRT-RTX could not build {graph.name}: {logger.last or 'no reason given'}")
    return bytes(plan)


def with_capacity(graph: Path, capacity: int) -> bytes:
    """The graph with the cache's symbolic capacity fixed: TensorRT wants a KV cache of static length."""
    model = onnx.load(str(graph), load_external_data=False)
    for value in [*model.graph.input, *model.graph.output]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "capacity":
                dimension.dim_value = capacity
    return bytes(model.SerializeToString())


def profiles(stage: str, m: Manifest, capacity: int) -> list[Shapes]:
    """Ranges of every dynamic input: one profile a stage, two of the decoder (prefill, then one token at a time)."""
    v, d = m.vision, m.decoder
    most, usual = v.max_frames or 64, min(v.default_frames, v.max_frames or 64)
    side, tokens = v.image_size, v.patches + v.class_token

    def frames(*rest: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (1, *rest), (usual, *rest), (most, *rest)

    if stage == "trunk":
        return [{"pixels": ((1, 3, side, side), (4, 3, side, side), (8, 3, side, side))}]
    if stage == "temporal":
        return [{"states": frames(v.states, tokens, v.hidden_size)}]
    if stage == "question":
        assert m.question is not None
        text: Shapes = {name: ((1, 1), (1, min(32, m.question.length)), (1, m.question.length)) for name in ("ids", "mask")}
        return [text]
    if stage == "similarity":
        assert m.question is not None
        one = (1, m.question.embedding_size)
        return [{"features": frames(v.patches, v.hidden_size), "q": (one, one, one)}]
    if stage == "pooling":
        return [_pooling_profile(m, usual, most)]
    prefill = min(1100, capacity)
    return [_decoder_profile(1, prefill, capacity, d.hidden_size, capacity), _decoder_profile(1, 1, 1, d.hidden_size, capacity)]


def _pooling_profile(m: Manifest, usual: int, most: int) -> Shapes:
    v = m.vision
    features: Shapes = {"features": ((1, v.patches, v.hidden_size), (usual, v.patches, v.hidden_size), (most, v.patches, v.hidden_size))}
    if not m.pooling.windowed:
        return features
    kernel, stride = _windows(m.pooling.video, (usual, *v.grid))
    least = max(kernel[0], 1)  # a clip has at least one window
    fixed: Shapes = {"kernel": (kernel, kernel, kernel), "stride": (stride, stride, stride)}
    clip = ((least, *v.grid), (max(usual, least), *v.grid), (max(most, least), *v.grid))
    features["features"] = tuple((size[0], v.patches, v.hidden_size) for size in clip)  # type: ignore[assignment]
    return features | {"weights": clip} | fixed


def _windows(windows: Windows, size: tuple[int, int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    _, kernel, stride = windows.resolve(size)
    return kernel, stride


def _decoder_profile(least: int, best: int, most: int, width: int, capacity: int) -> Shapes:
    return {
        "inputs_embeds": ((1, least, width), (1, best, width), (1, most, width)), "position_ids": ((1, least), (1, best), (1, most)),
        "mask": ((1, 1, least, capacity), (1, 1, best, capacity), (1, 1, most, capacity)),
    }  # fmt: skip


def describe_errors(parser: Any) -> str:
    """Node, operator and reason of what the parser refused, at most three."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return "; ".join(f"{e.node_name()} ({e.node_operator()}): {' '.join(e.desc().split())[:200]}" for e in errors[:3]) or "no reason given"


class _Log:
    """TensorRT's logger, quiet; the last error is kept."""

    def __init__(self, trt: Any):
        keeper = self

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.ERROR:
                    keeper.last = message

        self.last, self.logger = "", Logger()
