"""Targets rtx, orin and orin-jp6: a bundle's graphs → TensorRT engines, one process per graph.

A decoder is cut into pieces between its layers, and its head into parts, so that no build needs much more
memory than a piece. An interrupted build leaves its finished engines, and the next one resumes from them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.engine_manifest import (
    PLUGIN_STAGE,
    Engine,
    engine_folder,
    fingerprint,
    write_engine,
)
from ppllava_edge.engines.bundle.integrity import hash_file
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.machine.memory import available_memory
from ppllava_edge.engines.targets.profiles import profiles
from ppllava_edge.engines.targets.progress import Progress, no_progress
from ppllava_edge.engines.targets.tensorrt.graphs import predicted_peak, target_graphs
from ppllava_edge.engines.targets.tensorrt.plan import Options, Plan, make_plan
from ppllava_edge.engines.targets.tensorrt.process import Built, run_job
from ppllava_edge.engines.targets.tensorrt.worker import Job
from ppllava_edge.engines.terminal import human_bytes

Note = Callable[[str], None]


def no_note(text: str) -> None:
    """The default for notes; drops them."""


def build_tensorrt(
    bundle: Bundle, target: str, options: Options, progress: Progress = no_progress, note: Note = no_note
) -> tuple[Engine, list[Built]]:
    """Write engines/<target> into a bundle.

    Args:
        bundle: The bundle with the graphs.
        target: rtx, orin or orin-jp6.
        options: Options of the build.
        progress: Called before each graph and at the end.
        note: Called with a line when a build is expected to need more memory than is available.

    Returns:
        The engine, and a report of each of its files.

    Raises:
        EngineError: If something is missing or refused.
    """
    plan = make_plan(bundle, target, options)
    plan.staging.mkdir(parents=True, exist_ok=True)
    reports: list[Built] = []
    stages: dict[str, tuple[str, ...]] = {}
    graphs = list(target_graphs(plan))
    for done, (stage, name, g) in enumerate(graphs):
        progress(name, done, len(graphs))
        reports.append(_build_one(plan, stage, name, g, note))
        key = name if name == PLUGIN_STAGE else stage
        stages[key] = (*stages.get(key, ()), f"{name}.engine")
    _tidy(plan, {file for files in stages.values() for file in files})
    engine = Engine(
        folder=engine_folder(bundle.path, target),
        target=target,
        bundle=fingerprint(bundle.manifest),
        made_by={plan.library: plan.version},
        kv_dtype=bundle.manifest.decoder.kv_dtype,
        stages=stages,
        files={},
        library=plan.library,
        cache="concatenated" if target == "orin-jp6" else "in place",
        details=plan.details,
    )
    progress("all", len(graphs), len(graphs))
    return write_engine(plan.staging, engine), reports


def _build_one(plan: Plan, stage: str, name: str, g: Graph, note: Note) -> Built:
    """Save a graph and build it in a process of its own."""
    predicted = predicted_peak(stage, g)
    largest = max((weight.bytes for weight in g.weights.values()), default=0)
    _warn_of_memory(name, predicted, note)
    folder = plan.staging / "graph"
    folder.mkdir(exist_ok=True)
    try:
        path = folder / f"{name}.onnx"
        g.save(path, check=False)
        job = _job(plan, stage, name, g)
        inputs = (plan.version, fingerprint(plan.bundle.manifest), json.dumps(asdict(job)), hash_file(path))
        key = hashlib.sha256(" ".join(inputs).encode()).hexdigest()
        return run_job(job, plan.staging, name, key, predicted, largest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _job(plan: Plan, stage: str, name: str, g: Graph) -> Job:
    ahead_of_time = plan.target == "rtx"
    return Job(
        graph=f"graph/{name}.onnx",
        engine=f"{name}.engine",
        library=plan.library,
        profiles=profiles(stage, g.inputs, plan.bundle.manifest, plan.size),
        capabilities=list(plan.options.capabilities) if ahead_of_time else [],
        plugin=plan.plugin if name == PLUGIN_STAGE else "none",
        workspace=plan.options.workspace,
        timing_cache="" if ahead_of_time else f"../.{plan.target}.timing",
        level=plan.options.level,
    )


def _warn_of_memory(name: str, needed: int, note: Note) -> None:
    available = available_memory()
    if available is not None and needed > available:
        note(
            f"building {name} is expected to need {human_bytes(needed)}; "
            f"{human_bytes(available)} are available, {human_bytes(needed - available)} are missing: "
            f"try a smaller --piece"
        )


def _tidy(plan: Plan, engines: set[str]) -> None:
    """Leave only this build's engines in the staging folder; the log goes beside the engine's folder."""
    for path in plan.staging.iterdir():
        if path.suffix == ".log":
            path.rename(path.parent.parent / f".{plan.target}.log")
        elif path.name not in engines:
            path.unlink()
