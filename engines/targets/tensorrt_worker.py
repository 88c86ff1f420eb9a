"""Builds one graph with TensorRT or TensorRT-RTX, in a process of its own: its memory goes back to the system with it.

python -m ppllava_edge.engines.targets.tensorrt_worker JOB.json   (written by tensorrt_target.py; prints one line of JSON)

Engines are strongly typed: precision is in the graph. Only what TensorRT 10.3 and 11.4 share is called; newer things are asked for first.
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
from ppllava_edge.engines.targets.profiles import Profile


@dataclass(frozen=True)
class Job:
    """graph → engine. library: tensorrt or tensorrt_rtx. capabilities: built for ahead of time (RTX); none: the GPU that is here.
    plugin: none, python or aot. workspace: bytes of scratch memory at most, 0: the library's own. timing_cache: file, "" for none."""

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
        """Write it for the worker."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Job:
        """The inverse of save."""
        return Job(**json.loads(path.read_text(encoding="utf-8")))


def build(job: Job, trt: Any = None) -> bytes:
    """Parse, profile, build. Raises EngineError that names node, operator and reason when something is refused."""
    trt = trt or import_library(job.library)
    log = Log(trt)
    _register_plugin(job, trt)
    builder = trt.Builder(log.logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if job.plugin == "aot":
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
    network = builder.create_network(flags)
    parser, graph = trt.OnnxParser(network, log.logger), Path(job.graph)
    if not parser.parse_from_file(str(graph)):
        raise EngineError(f"{title(trt)} refuses {graph.name}: {_refusals(parser, graph)}")
    config = builder.create_builder_config()
    config.builder_optimization_level = job.level
    if job.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
    _capabilities(config, trt, job.capabilities)
    shape_inputs = {
        network.get_input(i).name for i in range(network.num_inputs) if network.get_input(i).is_shape_tensor
    }
    for shapes in job.profiles:
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            (profile.set_shape_input if name in shape_inputs else profile.set_shape)(
                name, *map(tuple, bounds)
            )
        config.add_optimization_profile(profile)
    cache = _timing_cache(config, Path(job.timing_cache)) if job.timing_cache else None
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{title(trt)} could not build {graph.name}: {log.last or 'no reason given'}")
    if cache is not None:
        Path(job.timing_cache).write_bytes(bytes(cache.serialize()))
    return bytes(plan)


def _register_plugin(job: Job, trt: Any) -> None:
    if job.plugin == "python":
        from ppllava_edge.engines.plugins.weighted_pool import tensorrt_plugin

        tensorrt_plugin.register(trt)
    elif job.plugin == "aot":
        from ppllava_edge.engines.plugins.weighted_pool import aot, kernel

        aot.register_aot(trt, importlib.import_module(f"{job.library}.plugin"), kernel.Launcher().capability)


def _capabilities(config: Any, trt: Any, capabilities: list[str]) -> None:
    """What TensorRT-RTX builds for, ahead of time."""
    if not capabilities:
        return
    config.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        kind = getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""), None)
        if kind is None:
            known = [
                f"{n[2:-1]}.{n[-1]}"
                for n in dir(trt.ComputeCapability)
                if n.startswith("SM") and n[2:].isdigit()
            ]
            raise EngineError(
                f"{title(trt)} doesn't build for compute capability {capability}; it knows {', '.join(sorted(known, key=float))}"
            )
        config.set_compute_capability(kind, i)


def _timing_cache(config: Any, path: Path) -> Any:
    """How long kernels took, from earlier builds on this GPU."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, False)
    return cache


def _refusals(parser: Any, graph: Path) -> str:
    """Node, operator and reason of what the parser refused; then the names of all other nodes that it can't take."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    told = [f"{e.node_name()} ({e.node_operator()}): {' '.join(e.desc().split())[:200]}" for e in errors[:3]]
    named, others = {e.node_name() for e in errors[:3]}, list[str]()
    if hasattr(parser, "supports_model_v2"):
        nodes = onnx.load(str(graph), load_external_data=False).graph.node
        parser.supports_model_v2(graph.read_bytes(), str(graph))
        for i in range(parser.num_subgraphs):
            if not parser.is_subgraph_supported(i):
                others += [
                    f"{nodes[n].name} ({nodes[n].op_type})"
                    for n in parser.get_subgraph_nodes(i)
                    if nodes[n].name not in named
                ]
    more = f"; also refused: {', '.join(others[:8])}{' …' if len(others) > 8 else ''}" if others else ""
    return ("; ".join(told) or "no reason given") + more


class Log:
    """TensorRT's logger: warnings and errors on stderr (the build's log file); the last error is kept."""

    def __init__(self, trt: Any):
        keeper = self

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.WARNING:
                    print(f"[{severity}] {message}", file=sys.stderr)
                if severity <= trt.ILogger.ERROR:
                    keeper.last = message

        self.last, self.logger = "", Logger()


def main() -> int:
    """Build the job that the argument names. Prints seconds, bytes and peak memory, or the error."""
    job, started = Job.load(Path(sys.argv[1])), time.perf_counter()
    try:
        plan = build(job)
        part = Path(job.engine + ".part")
        part.write_bytes(plan)
        part.rename(job.engine)
    except EngineError as error:
        print(json.dumps({"error": str(error)}))
        return 2
    except OSError as error:
        print(json.dumps({"error": f"{error.filename or job.engine}: {error.strerror}"}))
        return 2
    print(
        json.dumps(
            {"seconds": time.perf_counter() - started, "bytes": len(plan), "peak_bytes": peak_memory()}
        )
    )
    sys.stdout.flush()
    os._exit(0)  # libraries without a GPU may crash while they are unloaded; everything is written


if __name__ == "__main__":
    sys.exit(main())
