"""Quantisation with calibration data: observe, decide, keep sensitive layers in float, write, check."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppllava_edge.calibration.data import MAX_CLIPS, Data, from_folder
from ppllava_edge.calibration.gate.measure import Expected, measure, measure_streamed
from ppllava_edge.calibration.gate.parity import GateError, Scores, describe
from ppllava_edge.calibration.gate.report import Outcome, write_report
from ppllava_edge.calibration.keep import MAX_TRIES, KeptLayers
from ppllava_edge.calibration.model.streamed_model import FLOAT, StreamedModel
from ppllava_edge.calibration.observe import Observation
from ppllava_edge.calibration.saved_decisions import write_text
from ppllava_edge.calibration.sensitivity import sensitivity
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.integrity import write_manifest
from ppllava_edge.engines.bundle.manifest import MANIFEST, Manifest
from ppllava_edge.engines.bundle.manifest_parser import read_manifest
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.rewrite import to_float32
from ppllava_edge.engines.staging import locked_folder
from ppllava_edge.export.convert import StageReport, convert
from ppllava_edge.export.options import Options
from ppllava_edge.export.output import check_output
from ppllava_edge.export.progress import Progress
from ppllava_edge.export.quantisation.plan import LayerRecord
from ppllava_edge.export.quantisation.precision import STAGE_PART
from ppllava_edge.export.sources.source import Source, open_source
from ppllava_edge.runtime.pipeline.factory import Pipeline

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
JOB, DRAWN = "job", "drawn"  # in the state's folder: a file with the job's key, and a folder of drawn clips


@dataclass
class Job:
    """A calibration job, as the options of ppllava-export describe it.

    Attributes:
        folder: Videos to calibrate on; None: use the clips of `drawn`.
        questions: A text file of questions about them; None: general ones.
        frames: Frames per clip; None: the model's default.
        clips: The most videos to use.
        keep_float: How many layers may keep higher precision so that the parity gate holds.
        allow_drift: Write the bundle even if the gate doesn't hold.
        drawn: Function that draws clips if there is no folder, from the float model's manifest and a folder
            for their files; None: `folder` is required.
    """

    folder: Path | None = None
    questions: Path | None = None
    frames: int | None = None
    clips: int = MAX_CLIPS
    keep_float: int = 8
    allow_drift: bool = False
    drawn: Callable[[Manifest, Path], Data] | None = None


Result = tuple[Manifest, list[StageReport], Outcome]


def quantize_with_data(
    options: Options, job: Job, progress: Progress | None = None, source: Source | None = None
) -> Result:
    """Calibrate and quantise a model, check it against the float model, and write the bundle with its report.

    An interrupted run leaves its state beside the output (".NAME.calibration"); the next call continues it.

    Args:
        options: Options of the export.
        job: The calibration data and limits.
        progress: Receives every step.
        source: The float model; None: open options.checkpoint.

    Returns:
        The bundle's manifest, one report per stage, and the decisions of the calibration.

    Raises:
        GateError: If the parity gate doesn't hold and drift isn't allowed; no bundle is written then.
        PPLLaVAError: For anything else that the user can fix.
    """
    progress = progress or Progress()
    output = Path(os.path.abspath(options.output))
    state = output.parent / f".{output.name}.calibration"
    try:
        check_output(options)
    except PPLLaVAError:
        _remove_finished_state(state, output)
        raise
    if not options.tokenizer:
        raise PPLLaVAError("calibration asks questions and needs the tokenizers: leave out --no-tokenizer")
    with contextlib.closing(source or open_source(options)) as model_source:
        state.mkdir(parents=True, exist_ok=True)
        try:
            with locked_folder(state):
                result = _calibrate(model_source, options, job, state, progress)
                _remove_state(state)
                return result
        except BlockingIOError:
            raise PPLLaVAError(f"another command is calibrating {options.output}; wait for it") from None
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise PPLLaVAError(
                f"the disk that holds {output.parent} is full; "
                "free some space and run the command again to continue"
            ) from None
        except PPLLaVAError:  # a final refusal, not an interrupt: there is nothing to continue
            _remove_state(state)
            raise


def _calibrate(source: Source, options: Options, job: Job, state: Path, progress: Progress) -> Result:
    manifest = source.manifest(FLOAT)
    data = _data(job, manifest, state)
    key = _job_key(options, job, data, manifest)
    _discard_other_job(state, key)
    run = _Run(source, options, job, data, state, progress, key)
    try:
        return run.run()
    finally:
        run.model.close()


def _remove_state(state: Path) -> None:
    """Remove the state; the job's name goes last, so that a killed removal can be told and completed."""
    with contextlib.suppress(OSError):
        for path in state.iterdir():
            if path.name != JOB:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(state, ignore_errors=True)


def _remove_finished_state(state: Path, output: Path) -> None:
    """Remove the state of a calibration that was killed after its bundle was in place."""
    with contextlib.suppress(OSError, PPLLaVAError):
        made_by = (read_manifest(output / MANIFEST).calibration or {}).get("job")
        job = state / JOB
        if made_by and state.is_dir() and (not job.exists() or job.read_text() == made_by):
            with locked_folder(state):
                _remove_state(state)


def _data(job: Job, manifest: Manifest, state: Path) -> Data:
    if job.folder is not None:
        return from_folder(job.folder, job.questions, manifest, job.frames, job.clips)
    if job.drawn is None:
        raise PPLLaVAError("calibration needs videos: name a folder of them with --calibrate")
    folder = state / DRAWN
    folder.mkdir(exist_ok=True)
    return job.drawn(manifest, folder)


def _job_key(options: Options, job: Job, data: Data, manifest: Manifest) -> str:
    """A digest of everything that decides what a calibration observes and chooses."""
    facts = [
        manifest.checkpoint.get("sha256"),
        data.hash,
        options.precision.parts,
        options.block,
        vars(options.overrides),
        job.frames,
    ]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def _discard_other_job(state: Path, key: str) -> None:
    """Delete the state of an interrupted run, unless that run was the same job."""
    file = state / JOB
    if not file.exists() or file.read_text() != key:
        file.unlink(missing_ok=True)  # first: what a kill leaves of another job is no job's
        for path in state.iterdir():
            if path.name != DRAWN:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_text(file, key)


class _Run:
    """One calibration: observe and decide, keep layers in float, then write and check the bundle."""

    def __init__(
        self,
        source: Source,
        options: Options,
        job: Job,
        data: Data,
        state: Path,
        progress: Progress,
        key: str,
    ):
        self.source = _Borrowed(source)
        self.options = options
        self.job = job
        self.data = data
        self.state = state
        self.progress = progress
        self.key = key
        self.observation = Observation(source, options, data, state, progress)
        self.model = self.observation.model
        self.int4 = options.precision.of_stage("decoder") == "int4"

    def run(self) -> Result:
        self.observation.run()
        outcome = Outcome(self.observation.choices)
        expected = self._expected()
        self._keep_layers(expected, outcome)

        def finish(staging: Path, manifest: Manifest, records: Mapping[str, list[LayerRecord]]) -> Manifest:
            return self._judge(expected, outcome, staging, manifest, records)

        plans = self.observation.plans
        manifest, reports = convert(self.options, self.progress, self.source, plans, finish)
        return manifest, reports, outcome

    def _expected(self) -> Expected:
        """The float model with the parity gate's questions, about held-back clips or about all clips."""
        clips = self.data.clips
        judging = {i for i, clip in enumerate(clips) if clip.held_back} or set(range(len(clips)))
        questions = [asked for asked in self.observation.questions if asked.clip in judging]
        if not self.model.small:
            questions = questions[:2]
        return Expected(self.model, clips, self.observation.batches, questions)

    def _keep_layers(self, expected: Expected, outcome: Outcome) -> None:
        """Raise layers in precision: by gate and sensitivity, or in large models by their output error."""
        kept = KeptLayers(self.observation.plans, self.job.keep_float, outcome.kept)
        if not self.job.keep_float:
            return
        if not self.model.small:
            kept.raise_worst(outcome.choices)
            return
        clips = self.data.clips
        questions = self.observation.questions
        outcome.sensitivity |= sensitivity(
            self.model,
            expected.batches,
            [asked for asked in questions if not clips[asked.clip].held_back] or questions,
            self.observation.plans,
            self.state / "scratch",
            lambda done, of: self.progress.step("sensitivity", done, of),
        )
        kept.raise_until(lambda attempt: self._trial_holds(expected, attempt), outcome.sensitivity)

    def _trial_holds(self, expected: Expected, attempt: int) -> bool:
        """Write a bundle by the current plans, and return whether it passes the gate."""
        trial = self.state / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        self.progress.step("trying", attempt, MAX_TRIES)
        options = replace(self.options, output=trial, force=True)
        convert(options, None, self.source, self.observation.plans)
        violations = measure(expected, Pipeline.open(trial, "cpu")).violations(self.int4)
        shutil.rmtree(trial, ignore_errors=True)
        return not violations

    def _judge(
        self,
        expected: Expected,
        outcome: Outcome,
        staging: Path,
        manifest: Manifest,
        records: Mapping[str, list[LayerRecord]],
    ) -> Manifest:
        """Measure a written bundle, refuse it or add the report, and return the manifest with the scores."""
        self.progress.step("judging", 0, 1)
        write_manifest(staging, manifest)
        scores = self._scores(expected, staging)
        outcome.scores = scores
        outcome.violations = describe(scores.violations(self.int4))
        if outcome.violations and not self.job.allow_drift:
            raise GateError(
                f"the quantised model drifts from the float one: {outcome.violations}; "
                "keep more layers in float with --keep-fp16, or accept it with --allow-drift"
            )
        parity: dict[str, Any] = {"holds": not outcome.violations, **scores.as_dict()}
        if outcome.violations:
            parity["drift"] = outcome.violations
        counts = {"clips": len(self.data.clips), "skipped": len(self.data.skipped)}
        used: dict[str, Any] = {"hash": self.data.hash, "job": self.key, **counts}
        manifest = replace(manifest, calibration=used, parity=parity)
        write_report(staging, manifest, outcome, records, self.data)
        return manifest

    def _scores(self, expected: Expected, staging: Path) -> Scores:
        if self.model.small:
            return measure(expected, Pipeline.open(staging, "cpu"))
        bundle = Bundle.open(staging)
        names = [name for name in STAGE_PART if f"{name}.onnx" in bundle.manifest.files]
        graphs = {name: to_float32(Graph.read(staging / f"{name}.onnx")) for name in names}
        return measure_streamed(expected, StreamedModel(bundle, graphs, self.state / "judged"))


class _Borrowed:
    """A source that convert() can't close."""

    def __init__(self, source: Source):
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def close(self) -> None:
        """Leave it open for its owner."""
