"""Build one graph with TensorRT or TensorRT-RTX, in a process of its own.

    python -m ppllava_edge.engines.targets.tensorrt.worker JOB.json

process.py writes the job and starts the worker, which prints one line of JSON. Engines are strongly
typed: the graph sets the precisions. Only calls that TensorRT 10.3 and 11.4 have in common are used; for
others the worker checks first that the library has them.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx

from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.libraries import import_library, title
from ppllava_edge.engines.machine.memory import peak_memory
from ppllava_edge.engines.plugins.weighted_pool import aot, kernel, tensorrt_plugin
from ppllava_edge.engines.targets.profiles import Profile

REPORTED_ERRORS = 3
REPORTED_NODES = 8


@dataclass(frozen=True)
class Job:
    """An engine to build.

    Attributes:
        graph: Path of the .onnx file.
        engine: Path of the engine to write.
        library: "tensorrt" or "tensorrt_rtx".
        profiles: Optimisation profiles.
        capabilities: Compute capabilities to build for ahead of time (TensorRT-RTX); none: this machine's
            GPU.
        plugin: The pooling plugin's form: none, python or aot.
        workspace: Maximum bytes of scratch memory; 0: the library's own limit.
        timing_cache: Path of the timing cache; "": none.
        level: The library's optimisation level.
    """

    graph: str
    engine: str
    library: str
    profiles: list[Profile]
    capabilities: list[str] = field(default_factory=list)
    plugin: str = "none"
    workspace: int = 0
    timing_cache: str = ""
    level: int = 3

    def save(self, path: Path) -> None:
        """Write the job for the worker."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Job:
        """Read a job that `save` wrote."""
        return Job(**json.loads(path.read_text(encoding="utf-8")))


def build(job: Job, trt: Any = None) -> bytes:
    """Parse the graph and build the engine.

    Args:
        job: The engine to build; no engine file is written.
        trt: The library; None: imported by the job's name.

    Returns:
        The serialized engine.

    Raises:
        EngineError: If the library is missing, or refuses the graph: with node, operator and reason.
    """
    trt = trt or import_library(job.library)
    log = Log(trt)
    _register_plugin(job, trt)
    builder = trt.Builder(log.logger)
    network = _parse(job, trt, builder, log)
    config = builder.create_builder_config()
    config.builder_optimization_level = job.level
    if job.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
    _set_capabilities(config, trt, job.capabilities)
    _add_profiles(builder, network, config, job.profiles)
    cache = _load_timing_cache(config, Path(job.timing_cache)) if job.timing_cache else None
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        graph = Path(job.graph).name
        raise EngineError(f"{title(trt)} could not build {graph}: {log.last_error or 'no reason given'}")
    if cache is not None:
        Path(job.timing_cache).write_bytes(bytes(cache.serialize()))
    return bytes(engine)


def _parse(job: Job, trt: Any, builder: Any, log: Log) -> Any:
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if job.plugin == "aot":
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log.logger)
    graph = Path(job.graph)
    if not parser.parse_from_file(str(graph)):
        raise EngineError(f"{title(trt)} refuses {graph.name}: {_refusals(parser, graph)}")
    return network


def _add_profiles(builder: Any, network: Any, config: Any, profiles: list[Profile]) -> None:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    shape_inputs = {value.name for value in inputs if value.is_shape_tensor}
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            set_bounds = profile.set_shape_input if name in shape_inputs else profile.set_shape
            set_bounds(name, *map(tuple, bounds))
        config.add_optimization_profile(profile)


def _register_plugin(job: Job, trt: Any) -> None:
    if job.plugin == "python":
        tensorrt_plugin.register(trt)
    elif job.plugin == "aot":
        aot.register_aot(trt, importlib.import_module(f"{job.library}.plugin"), kernel.Launcher().capability)


def _set_capabilities(config: Any, trt: Any, capabilities: list[str]) -> None:
    """Set the compute capabilities that TensorRT-RTX builds for ahead of time."""
    if not capabilities:
        return
    config.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        kind = getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""), None)
        if kind is None:
            raise EngineError(
                f"{title(trt)} doesn't build for compute capability {capability}; "
                f"it knows {', '.join(_known_capabilities(trt))}"
            )
        config.set_compute_capability(kind, i)


def _known_capabilities(trt: Any) -> list[str]:
    names = [n for n in dir(trt.ComputeCapability) if n.startswith("SM") and n[2:].isdigit()]
    return sorted((f"{name[2:-1]}.{name[-1]}" for name in names), key=float)


def _load_timing_cache(config: Any, path: Path) -> Any:
    """Use the kernel timings of earlier builds on this GPU."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, False)
    return cache


def _refusals(parser: Any, graph: Path) -> str:
    """Node, operator and reason of the parser's first errors, then the other unsupported nodes."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)][:REPORTED_ERRORS]
    reasons = [f"{e.node_name()} ({e.node_operator()}): {' '.join(e.desc().split())[:200]}" for e in errors]
    text = "; ".join(reasons) or "no reason given"
    others = _unsupported_nodes(parser, graph, {e.node_name() for e in errors})
    if others:
        more = " …" if len(others) > REPORTED_NODES else ""
        text += f"; also refused: {', '.join(others[:REPORTED_NODES])}{more}"
    return text


def _unsupported_nodes(parser: Any, graph: Path, named: set[str]) -> list[str]:
    if not hasattr(parser, "supports_model_v2"):
        return []
    nodes = onnx.load(str(graph), load_external_data=False).graph.node
    parser.supports_model_v2(graph.read_bytes(), str(graph))
    unsupported: list[str] = []
    for i in range(parser.num_subgraphs):
        if not parser.is_subgraph_supported(i):
            refused = [nodes[n] for n in parser.get_subgraph_nodes(i)]
            unsupported += [f"{n.name} ({n.op_type})" for n in refused if n.name not in named]
    return unsupported


class Log:
    """TensorRT's logger: warnings and errors go to stderr, which is the build's log file.

    Attributes:
        last_error: The last error's text.
        logger: The object that the library takes.
    """

    def __init__(self, trt: Any):
        outer = self

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.WARNING:
                    print(f"[{severity}] {message}", file=sys.stderr)
                if severity <= trt.ILogger.ERROR:
                    outer.last_error = message

        self.last_error = ""
        self.logger = Logger()


def main() -> int:
    """Build the job that the argument names; print seconds, bytes and peak memory, or the error."""
    job = Job.load(Path(sys.argv[1]))
    started = time.perf_counter()
    try:
        engine = build(job)
        part = Path(job.engine + ".part")
        part.write_bytes(engine)
        part.rename(job.engine)
    except EngineError as error:
        print(json.dumps({"error": str(error)}))
        return 2
    except OSError as error:
        print(json.dumps({"error": f"{error.filename or job.engine}: {error.strerror}"}))
        return 2
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "bytes": len(engine), "peak_bytes": peak_memory()}), flush=True)
    os._exit(0)  # without a GPU the libraries may crash while they are unloaded; everything is written


if __name__ == "__main__":
    sys.exit(main())
