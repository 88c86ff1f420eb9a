"""Run the float model over all clips, observe each layer's input, and choose each layer's rounding."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ppllava_edge.calibration.data import Data
from ppllava_edge.calibration.layer_choice import Choice, choose_group
from ppllava_edge.calibration.model.prompt import ClipQuestion
from ppllava_edge.calibration.model.stage_stream import Observe
from ppllava_edge.calibration.model.streamed_model import (
    FIRST_CLIP,
    FLOAT,
    StreamedModel,
    bundle_without_graphs,
)
from ppllava_edge.calibration.saved_decisions import GroupDecision, read_decisions, save_decisions, write_json
from ppllava_edge.calibration.statistics import StageStatistics
from ppllava_edge.export.options import Options
from ppllava_edge.export.progress import Progress
from ppllava_edge.export.quantisation.kv_cache import cache_writes
from ppllava_edge.export.quantisation.plan import HEADS, Layer, Plan, find_layers
from ppllava_edge.export.sources.source import Source

SMALL_STAGES = ("question", "pooling")  # run as the runtime runs them, not segment by segment


class Observation:
    """One pass over the clips, stage after stage in the order of computation.

    Decisions about a segment are written to disk before the next segment begins, so an interrupted run
    continues there.

    Args:
        source: The float model.
        options: Options of the export, with the precision.
        data: Clips and questions.
        state: The folder that survives an interrupt.
        progress: Receives every step.

    Attributes:
        model: The float model; its value store holds the results of all stages.
        questions: Every question about every clip.
        batches: Samples of each clip in the vision tower.
        plans: Stage → how its layers are quantised.
        choices: One choice per layer, in the order of computation.
    """

    def __init__(self, source: Source, options: Options, data: Data, state: Path, progress: Progress):
        self.options = options
        self.data = data
        self.state = state
        self.progress = progress
        self.questions = [ClipQuestion(i, *sample) for i, sample in enumerate(data.samples)]
        graphs = {name: build() for name, build in source.graphs(FLOAT).items()}
        self.layers: dict[str, list[Layer]] = {
            name: find_layers(g) for name, g in graphs.items() if options.precision.integer(name)
        }
        # Name of the value written to the KV cache → name of the cache's input, where the cache becomes INT8.
        self.cache_writes: dict[str, str] = {}
        if options.precision.parts["kv"] == "int8":
            self.cache_writes = {new: past for past, new in cache_writes(graphs["decoder"]).items()}
        taps = {
            name: [node.input[0] for layer in layers for node in layer.nodes]
            for name, layers in self.layers.items()
        }
        taps["decoder"] = [*taps.get("decoder", []), *self.cache_writes]
        bundle = bundle_without_graphs(source, state / "side")
        self.model = StreamedModel(bundle, graphs, state / "scratch", taps)
        self.batches: list[list[int]] = []
        self.plans = {name: Plan() for name in self.layers}
        if self.cache_writes:
            self.plans.setdefault("decoder", Plan())
        self.choices: list[Choice] = []
        self.learning = [i for i, clip in enumerate(data.clips) if not clip.held_back]

    def run(self) -> None:
        """Observe and decide, and fill the attributes.

        Raises:
            PPLLaVAError: If activations are not finite, or the engine fails.
        """
        self.progress.step("decoding clips", 0, 1)
        self.batches = self.model.put_pixels(self.data.clips)
        everything = [batch for batches in self.batches for batch in batches]
        self._run_stage("trunk", everything, {batch for i in self.learning for batch in self.batches[i]})
        self._run_temporal()
        self._run_questions()
        samples = [asked.index for asked in self.questions if asked.clip in self.learning]
        self._run_stage("decoder", samples, set(samples))

    # -- running ---------------------------------------------------------------------------------------------

    def _run_temporal(self) -> None:
        """Store the features of every clip, through the temporal branch if there is one."""
        values = self.model.values
        if self.model.manifest.vision.max_frames is None:
            for clip, batches in enumerate(self.batches):
                values.put(clip, "features", self.model.features(batches))
            return
        for clip, batches in enumerate(self.batches):
            if not values.has(FIRST_CLIP + clip, "states"):
                values.put(FIRST_CLIP + clip, "states", self.model.states(batches))
        samples = [FIRST_CLIP + clip for clip in range(len(self.batches))]
        self._run_stage("temporal", samples, {FIRST_CLIP + clip for clip in self.learning})
        for clip in range(len(self.batches)):
            values.put(clip, "features", values.get(FIRST_CLIP + clip, "features"))

    def _run_questions(self) -> None:
        """Store every prompt; observe question tower and pooling on the way."""
        observed = {
            stage: StageStatistics(self.layers[stage], len(self.questions))
            for stage in SMALL_STAGES
            if stage in self.layers
        }
        for done, asked in enumerate(self.questions):
            for stage, statistics in observed.items():
                learns = asked.clip in self.learning
                self.model.callables[stage].observe = statistics.observe if learns else None
            answer = self.model.answer_ids(asked.answer)
            self.model.put_prompt(asked.index, self.model.embed(asked.clip, asked.question, answer).embeds)
            self.progress.step("questions", done + 1, len(self.questions))
        for stage, statistics in observed.items():
            self.model.callables[stage].observe = None
            self._apply(stage, self._decide(stage, statistics))

    def _run_stage(self, stage: str, samples: Sequence[int], learning: set[int]) -> None:
        """Run a large stage segment by segment over all samples and decide after each segment.

        Segments that were finished before an interrupt are not run again.
        """
        stream = self.model.streams[stage]
        count = len(stream.segments)
        for index in range(count):
            self.progress.step(stage, index, count)
            file = self._decision_file(stage, index)
            if self._can_skip(stage, index, samples):
                self._apply(stage, read_decisions(file))
                if self._writes_cache(stage):
                    self.plans["decoder"].cache = json.loads((self.state / "cache.json").read_text())
                continue
            statistics = StageStatistics(self.layers.get(stage, []), len(learning))
            observe = self._observer(stage, statistics, learning)
            stream.run_segment(index, samples, self.model.values, observe)
            decisions = self._decide(stage, statistics)
            if self._writes_cache(stage):  # first: a segment whose decisions are saved is not run again
                write_json(self.state / "cache.json", self.plans["decoder"].cache)
            save_decisions(file, decisions)
            self._apply(stage, decisions)
            stream.drop_finished(index, samples, self.model.values)
        self.progress.step(stage, count, count)

    def _observer(self, stage: str, statistics: StageStatistics, learning: set[int]) -> Observe | None:
        """Return an observer of statistics and cache scales for the learning samples, or None."""
        writes: Mapping[str, str] = self.cache_writes if stage == "decoder" else {}
        if stage not in self.layers and not writes:
            return None

        def observe(sample: int, name: str, value: np.ndarray) -> None:
            if sample not in learning:
                return
            statistics.observe(sample, name, value)
            if name in writes:
                scales = self.plans["decoder"].cache
                past = writes[name]
                scales[past] = max(scales.get(past, 1e-9), float(np.abs(value).max()) / 127)

        return observe

    def _writes_cache(self, stage: str) -> bool:
        return stage == "decoder" and bool(self.cache_writes)

    # -- resuming --------------------------------------------------------------------------------------------

    def _decision_file(self, stage: str, index: int) -> Path:
        return self.state / f"{stage}-{index}.npz"

    def _can_skip(self, stage: str, index: int, samples: Sequence[int]) -> bool:
        """Whether a segment is decided, and the next one is decided too or its inputs are still stored."""
        if not self._decision_file(stage, index).exists():
            return False
        if self._decision_file(stage, index + 1).exists():
            return True
        outputs = self.model.streams[stage].segments[index].gives
        stored = [name for name in outputs if not name.startswith("present.")]
        return all(self.model.values.has(sample, name) for sample in samples for name in stored)

    # -- deciding --------------------------------------------------------------------------------------------

    def _decide(self, stage: str, statistics: StageStatistics) -> list[GroupDecision]:
        """Choose the rounding of every group that was observed."""
        observed = statistics.observed()
        decisions = []
        for done, (group, stats) in enumerate(observed.items()):
            self.progress.step(f"{stage}: deciding", done, len(observed))
            layers = statistics.groups[group]
            precision = self._precision(stage, layers)
            fold, choices = choose_group(
                self.model.graphs[stage], layers, stats, precision, self.options.block
            )
            decisions.append(GroupDecision(group, fold, choices))
        return decisions

    def _precision(self, stage: str, layers: Sequence[Layer]) -> str:
        """The precision for choose_group; logits and the question tower keep their activations in float."""
        if stage == "question" or any(layer.weight.endswith(HEADS) for layer in layers):
            return "weights"
        return str(self.options.precision.integer(stage))

    def _apply(self, stage: str, decisions: Sequence[GroupDecision]) -> None:
        """Enter decisions in the stage's plan."""
        for group, fold, choices in decisions:
            plan = self.plans[stage]
            if fold is not None:
                plan.folds[group] = fold
            plan.schemes |= {choice.weight: choice.scheme for choice in choices}
            self.choices += choices
