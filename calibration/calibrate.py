"""Quantisation with data, from the first clip to the finished bundle: observe, decide, write, judge."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.calibration import data as clips_of
from ppllava_edge.calibration.choose import Choice, choose_group, group_layers
from ppllava_edge.calibration.data import Data
from ppllava_edge.calibration.parity import Expected, GateError, Scores, describe, measure, measure_streamed
from ppllava_edge.calibration.reference import CLIP, FLOAT, Asked, StreamedModel, side_bundle
from ppllava_edge.calibration.report import write_report
from ppllava_edge.calibration.sensitivity import sensitivity
from ppllava_edge.calibration.statistics import InputStatistics
from ppllava_edge.calibration.stream import StageStream
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.integrity import write_manifest
from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.rewrite import to_float32
from ppllava_edge.export.convert import Progress, StageReport, check_output, convert
from ppllava_edge.export.quantisation.precision import STAGE_PART
from ppllava_edge.export.quantisation.quantize import (
    HEADS,
    LayerRecord,
    Plan,
    Scheme,
    cache_writes,
    find_layers,
)
from ppllava_edge.export.sources import Options, Source, open_source
from ppllava_edge.runtime.pipeline.factory import Pipeline

FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_TRIES = 6  # of the gate, for models that fit in memory


@dataclass
class Job:
    """What --calibrate asked for. folder None: drawn clips (nano only). keep_float: how many layers may stay float (decoder: go up a step)."""

    folder: Path | None = None
    questions: Path | None = None
    frames: int | None = None
    clips: int = clips_of.MAX_CLIPS
    keep_float: int = 8
    allow_drift: bool = False


@dataclass
class Outcome:
    """Everything the report shows."""

    choices: list[Choice]
    sensitivity: dict[str, float]
    kept: dict[str, str]
    scores: Scores | None = None
    violations: str = ""
    int4: bool = False


def quantize_with_data(
    options: Options, job: Job, progress: Progress | None = None, source: Source | None = None
) -> tuple[Manifest, list[StageReport], Outcome]:
    """Calibrate, quantise, judge, and write the bundle with its report.

    Interrupted, it leaves what it knows beside the output (".NAME.calibration") and goes on from there when called again.
    Raises GateError (exit status 3) if the parity gate doesn't hold and drift isn't allowed; nothing is left then.
    """
    progress = progress or Progress()
    output = check_output(options)
    if not options.tokenizer:
        raise PPLLaVAError("calibration asks questions, so it needs the tokenizers; leave out --no-tokenizer")
    state = output.parent / f".{output.name}.calibration"
    with contextlib.closing(source or open_source(options)) as model_source:
        state.mkdir(parents=True, exist_ok=True)
        manifest = model_source.manifest(FLOAT)
        data = _data(job, manifest, state)
        _same_or_empty(state, options, job, data, manifest)
        calibration = Calibration(model_source, options, job, data, state, progress)
        try:
            result = calibration.run()
        except BaseException as error:
            calibration.model.close()
            if isinstance(error, OSError) and error.errno in FULL:
                raise PPLLaVAError(
                    f"the disk that holds {output.parent} is full; free some of it and give the command again: it goes on"
                ) from None
            if isinstance(error, PPLLaVAError):  # a finished "no", not an interrupt: nothing to go on from
                shutil.rmtree(state, ignore_errors=True)
            raise
        calibration.model.close()
    shutil.rmtree(state, ignore_errors=True)
    return result


def _data(job: Job, manifest: Manifest, state: Path) -> Data:
    if job.folder is not None:
        return clips_of.from_folder(job.folder, job.questions, manifest, job.frames, job.clips)
    if not (manifest.demo and manifest.name == "nano"):
        raise PPLLaVAError("calibration needs videos: name a folder of them with --calibrate")
    folder = state / "drawn"
    folder.mkdir(exist_ok=True)
    return clips_of.drawn(manifest, folder)


def _same_or_empty(state: Path, options: Options, job: Job, data: Data, manifest: Manifest) -> None:
    """Forget what an interrupted run left, unless it was the same job."""
    told = [
        manifest.checkpoint.get("sha256"),
        data.hash,
        options.precision.parts,
        options.block,
        vars(options.overrides),
        job.frames,
    ]
    key, file = hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest(), state / "job"
    if not file.exists() or file.read_text() != key:
        for path in state.iterdir():
            if path.is_dir() and path.name != "drawn":
                shutil.rmtree(path)
        file.write_text(key)


class Calibration:
    """One run. Stages are gone through in the order of computation; what was decided for a piece of one is on disk before the next begins."""

    def __init__(
        self, source: Source, options: Options, job: Job, data: Data, state: Path, progress: Progress
    ):
        self.source, self.options, self.job, self.data, self.state, self.progress = (
            source,
            options,
            job,
            data,
            state,
            progress,
        )
        self.asked = [
            Asked(i, clip, question, answer) for i, (clip, question, answer) in enumerate(data.samples)
        ]
        graphs = {name: build() for name, build in source.graphs(FLOAT).items()}
        self.layers = {name: find_layers(g) for name, g in graphs.items() if options.precision.integer(name)}
        taps = {
            name: [node.input[0] for layer in layers for node in layer.nodes]
            for name, layers in self.layers.items()
        }
        self.cache_writes = (
            {new: past for past, new in cache_writes(graphs["decoder"]).items()}
            if options.precision.parts["kv"] == "int8"
            else {}
        )
        taps["decoder"] = [*taps.get("decoder", []), *self.cache_writes]
        self.model = StreamedModel(side_bundle(source, state / "side"), graphs, state / "scratch", taps)
        self.plans: dict[str, Plan] = {
            name: Plan() for name in [*self.layers, *(["decoder"] if self.cache_writes else [])]
        }
        self.choices: list[Choice] = []
        self._watched: dict[str, tuple[dict[str, InputStatistics], dict[str, str]]] = {}

    def run(self) -> tuple[Manifest, list[StageReport], Outcome]:
        model, clips = self.model, self.data.clips
        self.judged_clips = [i for i, clip in enumerate(clips) if clip.held_back] or list(range(len(clips)))
        learning = [i for i, clip in enumerate(clips) if not clip.held_back]
        self.progress.step("decoding clips", 0, 1)
        chunks = model.put_pixels(clips)
        self._stage("trunk", [c for mine in chunks for c in mine], {c for i in learning for c in chunks[i]})
        self._features(chunks, learning)
        for stage in ("question", "pooling"):  # small ones, run as the runtime runs them
            self._watch(stage, len(self.asked))
        for done, asked in enumerate(self.asked):
            learns = asked.clip in learning
            self._only_when("question", learns)
            self._only_when("pooling", learns)
            answer = model.answer_ids(asked.answer)
            model.put_prompt(
                asked.index, model.embeds(model.values.get(asked.clip, "features"), asked.question, answer)[0]
            )
            self.progress.step("questions", done + 1, len(self.asked))
        self._decide("question")
        self._decide("pooling")
        samples = [a.index for a in self.asked if a.clip in learning]
        self._stage("decoder", samples, set(samples))
        for small in model.callables.values():
            small.observe = None
        return self._write(chunks)

    def _features(self, chunks: list[list[int]], learning: Sequence[int]) -> None:
        """Of every clip, through the temporal branch if there is one."""
        model, clips = self.model, range(len(chunks))
        if self.model.manifest.vision.max_frames is None:
            for i, mine in enumerate(chunks):
                model.values.put(i, "features", model.features(mine))
            return
        for i, mine in enumerate(chunks):
            if not model.values.has(CLIP + i, "states"):
                model.values.put(CLIP + i, "states", model.states(mine))
        self._stage("temporal", [CLIP + i for i in clips], {CLIP + i for i in learning})
        for i in clips:
            model.values.put(i, "features", model.values.get(CLIP + i, "features"))

    # -- observing ---------------------------------------------------------------------------------------------------

    def _statistics(self, stage: str, calls: int) -> tuple[dict[str, InputStatistics], dict[str, str]]:
        """Statistics by group, and the group of every tapped value."""
        stats = {
            group: InputStatistics(members[0].weight, calls * len(members[0].nodes))
            for group, members in group_layers(self.layers[stage]).items()
        }
        return stats, {node.input[0]: layer.group for layer in self.layers[stage] for node in layer.nodes}

    def _stage(self, stage: str, samples: Sequence[int], learning: set[int]) -> None:
        """A large stage: piece by piece over all samples, deciding after each piece. Pieces done before an interrupt are not run again."""
        stream, values = self.model.streams[stage], self.model.values
        for index in range(len(stream.segments)):
            self.progress.step(stage, index, len(stream.segments))
            done = self.state / f"{stage}-{index}.npz"
            if self._done(stage, index) and (
                self._done(stage, index + 1) or self._there(index, stream, samples)
            ):
                self._load_decisions(stage, done)
                if stage == "decoder" and self.cache_writes:
                    self.plans["decoder"].cache = json.loads((self.state / "cache.json").read_text())
                continue
            stats: dict[str, InputStatistics] = {}
            observe = None
            if stage in self.layers or (stage == "decoder" and self.cache_writes):
                stats, group_of = self._statistics(stage, len(learning)) if stage in self.layers else ({}, {})

                def observe(
                    sample: int, name: str, value: np.ndarray, stats: Any = stats, group_of: Any = group_of
                ) -> None:
                    if sample in learning and name in group_of:
                        stats[group_of[name]].add(value)
                    if sample in learning and name in self.cache_writes:
                        past, cache = self.cache_writes[name], self.plans["decoder"].cache
                        cache[past] = max(cache.get(past, 1e-9), float(np.abs(value).max()) / 127)

            stream.run_segment(index, samples, values, observe)
            self._decide_groups(
                stage, {group: s for group, s in stats.items() if s.largest is not None}, done
            )
            if stage == "decoder" and self.cache_writes:
                write_json(self.state / "cache.json", self.plans["decoder"].cache)
            for name in stream.finished_after(index):
                for sample in samples:
                    values.drop(sample, name)
        self.progress.step(stage, len(stream.segments), len(stream.segments))

    def _done(self, stage: str, index: int) -> bool:
        return (self.state / f"{stage}-{index}.npz").exists()

    def _there(self, index: int, stream: StageStream, samples: Sequence[int]) -> bool:
        """Whether a piece's results are still in the store."""
        given = [name for name in stream.segments[index].gives if not name.startswith("present.")]
        return all(self.model.values.has(sample, name) for sample in samples for name in given)

    def _watch(self, stage: str, calls: int) -> None:
        if stage in self.layers:
            self._watched[stage] = self._statistics(stage, calls)

    def _only_when(self, stage: str, learns: bool) -> None:
        if stage not in self.layers:
            return
        stats, group_of = self._watched[stage]

        def observe(sample: int, name: str, value: np.ndarray) -> None:
            if name in group_of:
                stats[group_of[name]].add(value)

        self.model.callables[stage].observe = observe if learns else None

    # -- deciding ----------------------------------------------------------------------------------------------------

    def _decide(self, stage: str) -> None:
        if stage in self.layers:
            self._decide_groups(
                stage, {g: s for g, s in self._watched[stage][0].items() if s.largest is not None}, None
            )

    def _decide_groups(self, stage: str, stats: dict[str, InputStatistics], file: Path | None) -> None:
        groups = group_layers(self.layers.get(stage, []))
        precision = self.options.precision.integer(stage)
        precision = "weights" if stage == "question" else precision
        decided: list[tuple[str, np.ndarray | None, list[Choice]]] = []
        for done, (group, seen) in enumerate(stats.items()):
            self.progress.step(f"{stage}: deciding", done, len(stats))
            head = any(layer.weight.endswith(HEADS) for layer in groups[group])
            fold, choices = choose_group(
                self.model.graphs[stage],
                groups[group],
                seen,
                "weights" if head else str(precision),
                self.options.block,
            )
            decided.append((group, fold, choices))
        if file is not None:
            _save_decisions(file, decided)
        self._take(stage, decided)

    def _load_decisions(self, stage: str, file: Path) -> None:
        self._take(stage, _read_decisions(file))

    def _take(self, stage: str, decided: list[tuple[str, np.ndarray | None, list[Choice]]]) -> None:
        for group, fold, choices in decided:
            plan = self.plans[stage]
            if fold is not None:
                plan.folds[group] = fold
            plan.schemes |= {c.weight: c.scheme for c in choices}
            self.choices += choices

    # -- writing and judging -----------------------------------------------------------------------------------------

    def _write(self, chunks: list[list[int]]) -> tuple[Manifest, list[StageReport], Outcome]:
        model, held = self.model, [a for a in self.asked if a.clip in self.judged_clips]
        expected = Expected(model, self.data.clips, chunks, held if model.small else held[:2])
        int4 = self.options.precision.of_stage("decoder") == "int4"
        outcome = Outcome(self.choices, {}, {}, int4=int4)
        if model.small and self.job.keep_float:
            calibrating = [a for a in self.asked if not self.data.clips[a.clip].held_back] or self.asked
            outcome.sensitivity = sensitivity(
                model,
                self.data.clips,
                chunks,
                calibrating,
                self.plans,
                self.state / "scratch",
                lambda done, of: self.progress.step("sensitivity", done, of),
            )
            self._raise_until_it_holds(expected, outcome)
        elif self.job.keep_float:
            self._raise_the_worst(outcome)

        def finish(work: Path, manifest: Manifest, records: dict[str, list[LayerRecord]]) -> Manifest:
            self.progress.step("judging", 0, 1)
            write_manifest(work, manifest)
            scores = (
                measure(expected, Pipeline.open(work, "cpu"))
                if model.small
                else measure_streamed(expected, self._written(work))
            )
            outcome.scores, outcome.violations = scores, describe(scores.violations(int4))
            holds = not outcome.violations
            if not holds and not self.job.allow_drift:
                raise GateError(
                    f"the quantised model drifts from the float one: {outcome.violations}; keep more layers with --keep-fp16, or --allow-drift"
                )
            parity = {"holds": holds, **scores.as_dict(), **({} if holds else {"drift": outcome.violations})}
            used = {"hash": self.data.hash, "clips": len(self.data.clips), "skipped": len(self.data.skipped)}
            manifest = replace(manifest, calibration=used, parity=parity)
            write_report(
                work, manifest, outcome.choices, records, outcome.sensitivity, outcome.kept, self.data
            )
            return manifest

        manifest, reports = convert(self.options, self.progress, _Borrowed(self.source), self.plans, finish)
        return manifest, reports, outcome

    def _written(self, work: Path) -> StreamedModel:
        """The quantised bundle, to be run piece by piece."""
        bundle = Bundle.open(work)
        names = [name for name in STAGE_PART if f"{name}.onnx" in bundle.manifest.files]
        return StreamedModel(
            bundle,
            {name: to_float32(Graph.read(work / f"{name}.onnx")) for name in names},
            self.state / "judged",
        )

    def _raise_until_it_holds(self, expected: Expected, outcome: Outcome) -> None:
        """Quantise, judge, and leave the layers that hurt most in float, until the gate holds or the budget is spent."""
        left = self.job.keep_float
        ranked = sorted(outcome.sensitivity, key=lambda w: -outcome.sensitivity[w])
        for attempt in range(MAX_TRIES):
            trial = self.state / "trial"
            shutil.rmtree(trial, ignore_errors=True)
            self.progress.step("trying", attempt, MAX_TRIES)
            quiet = replace(self.options, output=trial, force=True)
            convert(quiet, None, _Borrowed(self.source), self.plans)
            violations = measure(expected, Pipeline.open(trial, "cpu")).violations(outcome.int4)
            shutil.rmtree(trial, ignore_errors=True)
            if not violations or left <= 0:
                return
            share = max(1, self.job.keep_float // (MAX_TRIES - 1))
            for weight in ranked[: min(share, left)]:
                self._raise(weight, outcome, f"its group alone costs {outcome.sensitivity[weight]:.2g} nats")
                left -= 1
            ranked = ranked[share:]

    def _raise_the_worst(self, outcome: Outcome) -> None:
        """Where the float model doesn't fit: the layers with the worst error at their own output, below 15 dB, stay float."""
        worst = sorted(
            (c for c in self.choices if min(c.sqnr.values(), default=99) < 15),
            key=lambda c: min(c.sqnr.values()),
        )
        for choice in worst[: self.job.keep_float]:
            self._raise(choice.weight, outcome, f"{min(choice.sqnr.values()):.1f} dB at its own output")

    def _raise(self, weight: str, outcome: Outcome, why: str) -> None:
        """One step up: w8a8 and w4 of the decoder become w8; everything else float."""
        for stage, plan in self.plans.items():
            scheme = plan.schemes.get(weight)
            if scheme is not None:
                kind = "w8" if stage == "decoder" and scheme.kind in ("w8a8", "w4") else "float"
                plan.schemes[weight] = Scheme(kind, why=why)
                outcome.kept[weight] = why


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)


class _Borrowed:
    """A source that convert() must not close."""

    def __init__(self, source: Source):
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def close(self) -> None:
        """Not ours."""


def _save_decisions(file: Path, decided: list[tuple[str, np.ndarray | None, list[Choice]]]) -> None:
    """Plain arrays and JSON, written beside and renamed."""
    arrays: dict[str, Any] = {}
    told = []
    for i, (group, fold, choices) in enumerate(decided):
        if fold is not None:
            arrays[f"fold{i}"] = fold
        shown = []
        for k, choice in enumerate(choices):
            if choice.scheme.importance is not None:
                arrays[f"importance{i}.{k}"] = choice.scheme.importance
            plain = asdict(replace(choice, scheme=replace(choice.scheme, importance=None)))
            shown.append(plain)
        told.append([group, shown])
    part = file.with_suffix(".part")
    with open(part, "wb") as f:
        np.savez(f, told=np.frombuffer(json.dumps(told).encode(), np.uint8), **arrays)
    part.replace(file)


def _read_decisions(file: Path) -> list[tuple[str, np.ndarray | None, list[Choice]]]:
    with np.load(file, allow_pickle=False) as stored:
        told = json.loads(stored["told"].tobytes())
        found = []
        for i, (group, shown) in enumerate(told):
            choices = []
            for k, plain in enumerate(shown):
                importance = stored.get(f"importance{i}.{k}")
                scheme = Scheme(**{**plain.pop("scheme"), "importance": importance})
                choices.append(Choice(**{**plain, "scheme": scheme, "shape": tuple(plain["shape"])}))
            found.append((group, stored.get(f"fold{i}"), choices))
    return found
