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

from safetensors import safe_open

from .bundle import Bundle, Manifest
from .decode_graph import TABLE, self_feeding, split_head
from .engine import Engine, engine_folder, fingerprint, installed_version, write_engine
from .errors import EngineError
from .graph import Graph, Tensor
from .lower import lower
from .pieces import split
from .plugin_node import with_plugin
from .profiles import Limits, limits, profiles
from .select import NEWEST_OPERATORS
from .tensorrt_worker import Job
from .terminal import human_bytes

CAPABILITIES = ("8.6", "8.9", "12.0")  # built for ahead of time unless told otherwise: RTX 30, 40 and 50
PIECE_BYTES = 512 << 20  # of a decoder's weights in one engine
PEAK_BASE, PEAK_PER_BYTE = 350e6, 3.5  # of a build: resident memory without weights, and for each byte of them (docs/measurements.md)
ADDR_NO_RANDOMIZE = 0x0040000  # Linux's personality(2)
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """capabilities: for TensorRT-RTX. capacity: of the KV cache, frames: usual clip, None: the model's usual ones. plugin: none, python, aot or
    auto. workspace: bytes, 0: the library's own limit."""

    capabilities: tuple[str, ...] = CAPABILITIES
    capacity: int | None = None
    frames: int | None = None
    plugin: str = "auto"
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


def build_tensorrt(
    bundle: Bundle, target: str, options: Options, tell: Tell = lambda stage, done, of: None, note: Callable[[str], None] = lambda text: None
) -> tuple[Engine, list[Built]]:
    """Write engines/<target> into a bundle. note: told when a build is expected to need more memory than there is.

    Raises EngineError in one line if something is missing or refused.
    """
    library = "tensorrt_rtx" if target == "rtx" else "tensorrt"
    version = installed_version(library)
    check_possible(bundle.manifest, target, library, version)
    size = limits(bundle.manifest, options.capacity, options.frames)
    place = engine_folder(bundle.path, target)
    work = place.parent / f".{target}.building"
    work.mkdir(parents=True, exist_ok=True)
    plugin = _plugin(options.plugin, target, library)
    made: list[Built] = []
    stages: dict[str, list[str]] = {}
    details: dict[str, Any] = {"capacity": size.capacity, "frames": list(size.frames), "plugin": plugin, "self_feeding": target != "orin-jp6"}
    if target == "rtx":
        details["capabilities"] = list(options.capabilities)
    else:
        details |= _this_gpu()
    graphs = list(_graphs(bundle, target, size, options, plugin))
    for done, (stage, name, prepare) in enumerate(graphs):
        tell(name, done, len(graphs))
        scratch = work / "graph"
        scratch.mkdir(exist_ok=True)
        try:
            graph, weights, largest = prepare(scratch)
            _warn_of_memory(name, weights, note)
            kind = plugin if name == "pooling-plugin" else "none"
            shapes = profiles(stage, graph.inputs, bundle.manifest, size)
            timing = f"../.{target}.timing" if target != "rtx" else ""
            ahead = list(options.capabilities) if target == "rtx" else []
            job = Job(f"graph/{graph.path.name}", f"{name}.engine", library, shapes, ahead, kind, options.workspace, timing, options.level)
            key = f"{version} {fingerprint(bundle.manifest)} {json.dumps(asdict(job))} {graph.digest}"
            made.append(_run(job, work, name, hashlib.sha256(key.encode()).hexdigest(), weights, largest))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        stages.setdefault(stage if kind == "none" else name, []).append(f"{name}.engine")
    for leftover in work.iterdir():
        if leftover.suffix != ".engine":
            leftover.rename(place.parent / f".{target}.log") if leftover.suffix == ".log" else leftover.unlink()
    kv_dtype = bundle.manifest.decoder.kv_dtype
    cache = "concatenated" if target == "orin-jp6" else "in place"
    if plugin != "none":
        _, kernel, stride = bundle.manifest.pooling.video.resolve((size.frames[1], *bundle.manifest.vision.grid))
        details |= {"kernel": list(kernel), "stride": list(stride)}
    files = {name: tuple(parts) for name, parts in stages.items()}
    engine = Engine(place, target, fingerprint(bundle.manifest), {library: version}, kv_dtype, files, {}, library, cache, details)
    tell("all", len(graphs), len(graphs))
    return write_engine(work, engine), made


def check_possible(m: Manifest, target: str, library: str, version: str) -> None:
    """Refuse in one line what can't work, before anything is built."""
    if not version:
        extra = "rtx" if library == "tensorrt_rtx" else "tensorrt"
        hint = "on a Jetson it is part of JetPack; elsewhere: " if library == "tensorrt" else ""
        raise EngineError(f"--target {target} needs {library}, which is not installed: {hint}pip install 'ppllava-edge[{extra}]'")
    if m.decoder.kv_dtype == "float32":
        raise EngineError(f"{m.name} computes in float32, for which TensorRT has no attention with a cache; export it with --precision fp16, int8 or int4")
    if m.decoder.kv_dtype == "int8":
        raise EngineError(f"{m.name} has an INT8 cache, which TensorRT refuses; export it without kv=int8")
    if target == "orin" and tuple(int(part) for part in version.split(".")[:2]) < NEWEST_OPERATORS:
        raise EngineError(f"--target orin needs TensorRT 10.15 or later, here is {version}; use --target orin-jp6")


def _warn_of_memory(name: str, weights: int, note: Callable[[str], None]) -> None:
    needed, available = predicted_peak(weights), available_memory()
    if available is not None and needed > available:
        missing = human_bytes(needed - available)
        note(f"building {name} is expected to need {human_bytes(needed)}; {human_bytes(available)} are available, {missing} are missing: try --piece with less")


def available_memory() -> int | None:
    """Bytes that this machine could give, None where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def predicted_peak(weight_bytes: int) -> int:
    """Resident memory of building an engine with so many bytes of weights."""
    return int(PEAK_BASE + PEAK_PER_BYTE * weight_bytes)


# -- graphs --------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    path: Path
    inputs: list
    digest: str  # of what the graph is, beyond the bundle's fingerprint


Prepare = Callable[[Path], tuple[_File, int, int]]  # folder → file, bytes of weights, bytes of the largest


def _graphs(bundle: Bundle, target: str, size: Limits, options: Options, plugin: str) -> Iterator[tuple[str, str, Prepare]]:
    """(stage, engine's name, how to write its graph) in order. Graphs are written when their turn comes: pieces of a decoder are large."""
    for file in bundle.manifest.required_files():
        if not file.endswith(".onnx"):
            continue
        stage = file.removesuffix(".onnx")
        g = Graph.read(bundle.file(file))
        if stage == "decoder":
            pieces = decoder_pieces(g, bundle, target, size.capacity, options.piece_bytes)
            for i, piece in enumerate(pieces):
                yield stage, stage if len(pieces) == 1 else f"{stage}-{i}", _writing(piece, stage if len(pieces) == 1 else f"{stage}-{i}")
            continue
        yield stage, stage, _writing(lower(g) if target == "orin-jp6" else g, stage)
        if stage == "pooling" and plugin != "none" and bundle.manifest.pooling.guided:
            _, kernel, stride = bundle.manifest.pooling.video.resolve((size.frames[1], *bundle.manifest.vision.grid))
            fused = with_plugin(g, kernel, stride)
            yield stage, "pooling-plugin", _writing(lower(fused) if target == "orin-jp6" else fused, "pooling-plugin")


def decoder_pieces(g: Graph, bundle: Bundle, target: str, capacity: int, piece_bytes: int = PIECE_BYTES) -> list[Graph]:
    """The decoder as an engine takes it: fed by itself (with an in-place cache) or lowered, the head in parts, cut between layers."""
    g = lower(g) if target == "orin-jp6" else self_feeding(g, embedding_table(bundle, g.dtype), capacity)
    width = bundle.manifest.decoder.hidden_size
    carried = {"mask": (g.dtype, (1, 1, "s", capacity)), "": (g.dtype, (1, "s", width))}
    return [segment.graph for segment in split(split_head(g), budget=piece_bytes, carried=carried)]


def embedding_table(bundle: Bundle, dtype: str) -> Tensor:
    """(V, D) token embeddings in a floating type, restored where the bundle has them as INT8."""
    d, path = bundle.manifest.decoder, bundle.file("embed_tokens.safetensors")

    def load() -> Any:
        with safe_open(path, "np") as file:
            rows = file.get_tensor("embed_tokens").astype(dtype)
            names = file.keys()
            return rows * file.get_tensor("embed_tokens.scale").astype(dtype)[:, None] if "embed_tokens.scale" in names else rows

    return Tensor(TABLE, (d.vocab, d.hidden_size), load)


def _writing(g: Graph, name: str) -> Prepare:
    def prepare(folder: Path) -> tuple[_File, int, int]:
        path = folder / f"{name}.onnx"
        g.save(path, check=False)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return _File(path, g.inputs, digest), g.weight_bytes, max((w.bytes for w in g.weights.values()), default=0)

    return prepare


# -- processes -----------------------------------------------------------------------------------------------------------------------------


def _run(job: Job, work: Path, name: str, key: str, weights: int, largest: int) -> Built:
    """Build one engine in a process of its own, or find it built."""
    note, log = work / f"{name}.done", work / "build.log"
    if note.is_file() and (work / job.engine).is_file():
        told = json.loads(note.read_text(encoding="utf-8"))
        if told.get("key") == key and told["bytes"] == (work / job.engine).stat().st_size:
            return Built(name, told["bytes"], told["seconds"], told["peak_bytes"], predicted_peak(weights), largest, kept=True)
    job.save(work / "job.json")
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    if job.plugin != "none" and job.library == "tensorrt_rtx":
        environment["LD_LIBRARY_PATH"] = f"{_unversioned(work)}:{environment.get('LD_LIBRARY_PATH', '')}"
    command = [sys.executable, "-m", f"{__package__}.tensorrt_worker", "job.json"]
    with open(log, "ab") as messages:
        messages.write(f"== {name}\n".encode())
        messages.flush()
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=messages, env=environment, cwd=work, preexec_fn=_same_addresses)
    try:
        told = json.loads(run.stdout.decode().strip().splitlines()[-1])
    except (IndexError, ValueError):
        reason = "ran out of memory (it was killed)" if run.returncode in (-9, 137) else f"ended with status {run.returncode}"
        fits = f"; it was expected to need {human_bytes(predicted_peak(weights))}" if run.returncode in (-9, 137) else ""
        raise EngineError(f"building {name} {reason}{fits}: try --piece with less, or see {log}") from None
    if "error" in told:
        raise EngineError(f"{told['error']} (messages: {log})")
    note.write_text(json.dumps({**told, "key": key}), encoding="utf-8")
    return Built(name, told["bytes"], told["seconds"], told["peak_bytes"], predicted_peak(weights), largest)


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
        raise EngineError("TensorRT-RTX engines can't carry a kernel of their own: use --plugin python, or none")
    if wanted != "auto" or target == "rtx":
        return "python" if wanted == "auto" else wanted
    version = tuple(int(part) for part in installed_version(library).split(".")[:2])
    return "aot" if version >= (10, 9) else "python"


def _this_gpu() -> dict[str, Any]:
    """Name and compute capability of the GPU that full TensorRT builds for."""
    from .gpu_facts import gpus

    found = gpus()
    if not found:
        raise EngineError("full TensorRT builds on the GPU that it builds for, and none was found here; ppllava-doctor says what is missing")
    return {"capabilities": [found[0].capability], "device": found[0].name}


def remove_leftovers(bundle: Path, target: str) -> None:
    """Forget an interrupted build."""
    shutil.rmtree(bundle / "engines" / f".{target}.building", ignore_errors=True)
