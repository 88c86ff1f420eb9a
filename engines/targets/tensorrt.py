"""`ppllava-build --target rtx | orin | orin-jp6`: a bundle's graphs → TensorRT engines, one process per graph.

A decoder is cut between layers into pieces, and its head into parts, so that no build needs much more memory than a piece. What is built is
kept when a build is interrupted, and found again by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from typing import Any

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import (
    PLUGIN_STAGE,
    Engine,
    engine_folder,
    fingerprint,
    write_engine,
)
from ppllava_edge.engines.bundle.integrity import hash_file
from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.bundle.windows import Triple
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.graphs.decode_step import TABLE, embedding_table, self_feeding, split_head
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.lower import lower, without_small_attention
from ppllava_edge.engines.graphs.pieces import split
from ppllava_edge.engines.graphs.plugin_node import with_plugin
from ppllava_edge.engines.libraries import installed_version
from ppllava_edge.engines.machine.memory import available_memory
from ppllava_edge.engines.targets.profiles import Limits, limits, profiles
from ppllava_edge.engines.targets.select import NEWEST_OPERATORS
from ppllava_edge.engines.targets.tensorrt_worker import Job
from ppllava_edge.engines.terminal import human_bytes

CAPABILITIES = ("8.6", "8.9", "12.0")  # built for ahead of time unless told otherwise: RTX 30, 40 and 50
PIECE_BYTES = 512 << 20  # of a decoder's weights in one engine
PEAK_BASE = 350e6  # resident memory of a build without weights; and for each byte of them, by what they are (docs/measurements.md):
PEAK_PER_BYTE = {"table": 2.6, "decoder int4": 3.1, "decoder": 4.9, "other": 3.6}
ADDR_NO_RANDOMIZE = 0x0040000  # Linux's personality(2)
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """capabilities: for TensorRT-RTX. capacity: of the KV cache, frames: usual clip, None: the model's usual ones. plugin: none, python, aot or
    auto. decoder_profiles: 2 (prefill, one token) or 1. workspace: bytes, 0: the library's own limit."""

    capabilities: tuple[str, ...] = CAPABILITIES
    capacity: int | None = None
    frames: int | None = None
    plugin: str = "auto"
    decoder_profiles: int = 2
    piece_bytes: int = PIECE_BYTES
    workspace: int = 0
    level: int = 3


@dataclass
class Built:
    """One engine file and what building it took. predicted, peak: bytes of resident memory; largest: the largest allocation foreseen."""

    name: str
    bytes: int
    seconds: float
    peak: int
    predicted: int
    largest: int
    kept: bool = False  # from an earlier, interrupted build


@dataclass(frozen=True)
class Plan:
    """What is built: everything that options and machine decide. plugin: none, python or aot. work: where engines wait until all are there."""

    bundle: Bundle
    target: str
    library: str
    version: str
    size: Limits
    options: Options
    plugin: str
    work: Path
    details: dict[str, Any]

    @property
    def windows(self) -> tuple[Triple, Triple]:
        """Kernel and stride that the plugin has: those of the usual clip."""
        m = self.bundle.manifest
        _, kernel, stride = m.pooling.video.resolve(
            (max(self.size.frames[1], m.pooling.video.min_frames()), *m.vision.grid)
        )
        return kernel, stride


def build_tensorrt(
    bundle: Bundle,
    target: str,
    options: Options,
    tell: Tell = lambda stage, done, of: None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Engine, list[Built]]:
    """Write engines/<target> into a bundle. note: told when a build is expected to need more memory than there is.

    Raises EngineError in one line if something is missing or refused.
    """
    plan = make_plan(bundle, target, options)
    plan.work.mkdir(parents=True, exist_ok=True)
    made: list[Built] = []
    stages: dict[str, tuple[str, ...]] = {}
    graphs = list(_graphs(plan))
    for done, (stage, name, g) in enumerate(graphs):
        tell(name, done, len(graphs))
        made.append(_build_one(plan, stage, name, g, note))
        key = name if name == PLUGIN_STAGE else stage
        stages[key] = (*stages.get(key, ()), f"{name}.engine")
    _tidy(plan, {file for files in stages.values() for file in files})
    place, kv_dtype = engine_folder(bundle.path, target), bundle.manifest.decoder.kv_dtype
    cache = "concatenated" if target == "orin-jp6" else "in place"
    engine = Engine(
        place,
        target,
        fingerprint(bundle.manifest),
        {plan.library: plan.version},
        kv_dtype,
        stages,
        {},
        plan.library,
        cache,
        plan.details,
    )
    tell("all", len(graphs), len(graphs))
    return write_engine(plan.work, engine), made


def make_plan(bundle: Bundle, target: str, options: Options) -> Plan:
    """Decide everything, or refuse in one line (EngineError)."""
    library = "tensorrt_rtx" if target == "rtx" else "tensorrt"
    version = installed_version(library)
    check_possible(bundle.manifest, target, library, version)
    size = limits(bundle.manifest, options.capacity, options.frames, options.decoder_profiles)
    plugin = _plugin(options.plugin, target, library) if bundle.manifest.pooling.windowed else "none"
    details: dict[str, Any] = {
        "capacity": size.capacity,
        "frames": list(size.frames),
        "plugin": plugin,
        "decoder_profiles": size.decoder_profiles,
    }
    details |= {"capabilities": list(options.capabilities)} if target == "rtx" else _this_gpu()
    plan = Plan(
        bundle,
        target,
        library,
        version,
        size,
        options,
        plugin,
        engine_folder(bundle.path, f".{target}.building"),
        details,
    )
    if plugin != "none":
        kernel, stride = plan.windows
        details |= {"kernel": list(kernel), "stride": list(stride)}
    return plan


def _build_one(plan: Plan, stage: str, name: str, g: Graph, note: Callable[[str], None]) -> Built:
    """Write one graph, and build it in a process of its own."""
    predicted, largest = predicted_peak(stage, g), max((w.bytes for w in g.weights.values()), default=0)
    _warn_of_memory(name, predicted, note)
    scratch = plan.work / "graph"
    scratch.mkdir(exist_ok=True)
    try:
        path = scratch / f"{name}.onnx"
        g.save(path, check=False)
        rtx, options = plan.target == "rtx", plan.options
        shapes = profiles(stage, g.inputs, plan.bundle.manifest, plan.size)
        job = Job(
            f"graph/{path.name}",
            f"{name}.engine",
            plan.library,
            shapes,
            list(options.capabilities) if rtx else [],
            plan.plugin if name == PLUGIN_STAGE else "none",
            options.workspace,
            "" if rtx else f"../.{plan.target}.timing",
            options.level,
        )
        key = (
            f"{plan.version} {fingerprint(plan.bundle.manifest)} {json.dumps(asdict(job))} {hash_file(path)}"
        )
        return _run(job, plan.work, name, hashlib.sha256(key.encode()).hexdigest(), predicted, largest)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tidy(plan: Plan, wanted: set[str]) -> None:
    """Leave nothing but this build's engines in the work folder; the log goes beside the engine's place."""
    for path in plan.work.iterdir():
        if path.suffix == ".log":
            path.rename(path.parent.parent / f".{plan.target}.log")
        elif path.name not in wanted:
            path.unlink()


def check_possible(m: Manifest, target: str, library: str, version: str) -> None:
    """Refuse in one line what can't work, before anything is built."""
    if not version:
        extra = "rtx" if library == "tensorrt_rtx" else "tensorrt"
        hint = "on a Jetson it is part of JetPack; elsewhere: " if library == "tensorrt" else ""
        raise EngineError(
            f"--target {target} needs {library}, which is not installed: {hint}pip install 'ppllava-edge[{extra}]'"
        )
    if m.decoder.kv_dtype == "float32":
        raise EngineError(
            f"{m.name} computes in float32, for which TensorRT has no attention with a cache; export it with --precision fp16, int8 or int4"
        )
    if m.decoder.kv_dtype == "int8":
        raise EngineError(f"{m.name} has an INT8 cache, which TensorRT refuses; export it without kv=int8")
    if target == "orin" and tuple(int(part) for part in version.split(".")[:2]) < NEWEST_OPERATORS:
        raise EngineError(
            f"--target orin needs TensorRT 10.15 or later, here is {version}; use --target orin-jp6"
        )


def _warn_of_memory(name: str, needed: int, note: Callable[[str], None]) -> None:
    available = available_memory()
    if available is not None and needed > available:
        missing = human_bytes(needed - available)
        note(
            f"building {name} is expected to need {human_bytes(needed)}; {human_bytes(available)} are available, {missing} are missing: try --piece with less"
        )


def predicted_peak(stage: str, g: Graph) -> int:
    """Resident memory of building an engine from a graph."""
    peak = PEAK_BASE
    for name, weight in g.weights.items():
        kind = (
            "table"
            if name == TABLE
            else "other"
            if stage != "decoder"
            else "decoder int4"
            if weight.dtype == "int4"
            else "decoder"
        )
        peak += PEAK_PER_BYTE[kind] * weight.bytes
    return int(peak)


# -- graphs --------------------------------------------------------------------------------------------------------------------------------


def _graphs(plan: Plan) -> Iterator[tuple[str, str, Graph]]:
    """(stage, engine's name, graph) in order. Weights are loaded when a graph is written."""
    bundle, lowered = plan.bundle, plan.target == "orin-jp6"
    for file in bundle.manifest.required_files():
        if not file.endswith(".onnx"):
            continue
        stage = file.removesuffix(".onnx")
        g = without_small_attention(Graph.read(bundle.file(file)))
        if stage == "decoder":
            pieces = decoder_pieces(g, bundle, plan.target, plan.size.capacity, plan.options.piece_bytes)
            for i, piece in enumerate(pieces):
                name = stage if len(pieces) == 1 else f"{stage}-{i}"
                yield stage, name, piece
            continue
        yield stage, stage, lower(g) if lowered else g
        if stage == "pooling" and plan.plugin != "none":
            fused = with_plugin(g, *plan.windows)
            yield stage, PLUGIN_STAGE, lower(fused) if lowered else fused


def decoder_pieces(
    g: Graph, bundle: Bundle, target: str, capacity: int, piece_bytes: int = PIECE_BYTES
) -> list[Graph]:
    """The decoder as an engine takes it: fed by itself (with an in-place cache) or lowered, the head in parts, cut between layers."""
    g = lower(g) if target == "orin-jp6" else self_feeding(g, embedding_table(bundle, g.dtype), capacity)
    width = bundle.manifest.decoder.hidden_size
    carried = {"mask": (g.dtype, (1, 1, "s", capacity)), "": (g.dtype, (1, "s", width))}
    return [segment.graph for segment in split(split_head(g), budget=piece_bytes, carried=carried)]


# -- processes -----------------------------------------------------------------------------------------------------------------------------


def _run(job: Job, work: Path, name: str, key: str, predicted: int, largest: int) -> Built:
    """Build one engine in a process of its own, or find it built."""
    note, log = work / f"{name}.done", work / "build.log"
    if note.is_file() and (work / job.engine).is_file():
        told = json.loads(note.read_text(encoding="utf-8"))
        if told.get("key") == key and told["bytes"] == (work / job.engine).stat().st_size:
            return Built(
                name, told["bytes"], told["seconds"], told["peak_bytes"], predicted, largest, kept=True
            )
    job.save(work / "job.json")
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    if job.plugin != "none" and job.library == "tensorrt_rtx":
        environment["LD_LIBRARY_PATH"] = f"{_unversioned(work)}:{environment.get('LD_LIBRARY_PATH', '')}"
    command = [sys.executable, "-m", f"{__package__}.tensorrt_worker", "job.json"]
    with open(log, "ab") as messages:
        messages.write(f"== {name}\n".encode())
        messages.flush()
        run = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=environment,
            cwd=work,
            preexec_fn=_same_addresses,
        )
    try:
        told = json.loads(run.stdout.decode().strip().splitlines()[-1])
    except (IndexError, ValueError):
        reason = (
            "ran out of memory (it was killed)"
            if run.returncode in (-9, 137)
            else f"ended with status {run.returncode}"
        )
        fits = f"; it was expected to need {human_bytes(predicted)}" if run.returncode in (-9, 137) else ""
        raise EngineError(f"building {name} {reason}{fits}: try --piece with less, or see {log}") from None
    if "error" in told:
        raise EngineError(f"{told['error']} (messages: {log})")
    note.write_text(json.dumps({**told, "key": key}), encoding="utf-8")
    return Built(name, told["bytes"], told["seconds"], told["peak_bytes"], predicted, largest)


def _same_addresses() -> None:
    """In the worker, before it starts: memory at the same addresses every time. The library orders some things by address, and a build that
    is repeated should give the same bytes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)


def _unversioned(folder: Path) -> Path:
    """The folder, in which TensorRT-RTX is found now under the name that its plugin loader asks for; without it the library aborts."""
    found = util.find_spec("tensorrt_rtx_libs")
    if found is not None and found.origin:
        for library in Path(found.origin).parent.glob("libtensorrt_rtx.so.*"):
            (folder / "libtensorrt_rtx.so").unlink(missing_ok=True)
            (folder / "libtensorrt_rtx.so").symlink_to(library)
            break
    return folder


def _plugin(wanted: str, target: str, library: str) -> str:
    """Which form the pooling plugin takes: the engine carries the kernel where TensorRT can, else Python runs it."""
    if wanted == "aot" and target == "rtx":
        raise EngineError(
            "TensorRT-RTX engines can't carry a kernel of their own: use --plugin python, or none"
        )
    if wanted != "auto" or target == "rtx":
        return "python" if wanted == "auto" else wanted
    version = tuple(int(part) for part in installed_version(library).split(".")[:2])
    return "aot" if version >= (10, 9) else "python"


def _this_gpu() -> dict[str, Any]:
    """Name and compute capability of the GPU that full TensorRT builds for."""
    from ppllava_edge.engines.machine.gpu_facts import gpus

    found = gpus()
    if not found:
        raise EngineError(
            "full TensorRT builds on the GPU that it builds for, and none was found here; ppllava-doctor says what is missing"
        )
    return {"capabilities": [found[0].capability], "device": found[0].name}
