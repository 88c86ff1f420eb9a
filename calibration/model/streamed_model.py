"""A model run over calibration samples, piece by piece if it doesn't fit in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from ppllava_edge.calibration.data import Clip
from ppllava_edge.calibration.model.prompt import EmbeddedPrompt, embed_prompt
from ppllava_edge.calibration.model.stage_stream import SEGMENT_BYTES, Observe, StageStream
from ppllava_edge.calibration.model.values import DiskValues, MemoryValues
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.integrity import hash_file
from ppllava_edge.engines.bundle.manifest import FileEntry
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.export.embeddings import EMBEDDINGS, write_embeddings
from ppllava_edge.export.quantisation.precision import parse_precision
from ppllava_edge.export.sources.source import Source
from ppllava_edge.runtime.language.text_processor import TextProcessor
from ppllava_edge.runtime.pipeline.cpu import TOKENS_PER_VISION_CALL, CpuPipeline

LAST_POSITIONS = 40  # positions with logits: an answer of 32 tokens, and some before it
FLOAT = parse_precision("fp32")
# Stages that run piece by piece over all samples; a larger divisor means smaller pieces.
BUDGET_DIVISOR = {"trunk": 1, "temporal": 4, "decoder": 1}
# Samples from this number on are whole clips, for the temporal stage; below are frame batches and questions.
FIRST_CLIP = 1 << 20
SMALL_BYTES = 1 << 30  # float32 weights of a model that fits in memory for repeated runs


class _SmallStage:
    """A stage of one segment, callable as CpuPipeline calls its stages; its values can be observed."""

    def __init__(self, stream: StageStream, outputs: Sequence[str]):
        self.stream = stream
        self.outputs = outputs
        self.dtypes = {name: None for segment in stream.segments for name in segment.reads}
        self.observe: Observe | None = None

    def __call__(self, tidy: bool = False, **inputs: np.ndarray) -> list[np.ndarray]:
        values = MemoryValues(inputs)
        self.stream.run([0], values, self.observe)
        return [values.get(0, name) for name in self.outputs]


class StreamedModel(CpuPipeline):
    """A model with the runtime's pipeline interface, whose large stages run piece by piece over many samples.

    Args:
        bundle: A bundle with tokenizers and embeddings.
        graphs: Graphs of all stages; their floating-point tensors are float32.
        scratch: A folder for values and pieces.
        taps: Stage → values to show to observers.

    Attributes:
        values: Values passed between the stages, by sample.
        streams: Every stage, for runs over many samples.
        callables: Every stage, for calls with arrays.
    """

    def __init__(
        self,
        bundle: Bundle,
        graphs: dict[str, Graph],
        scratch: Path,
        taps: Mapping[str, Sequence[str]] | None = None,
    ):
        super().__init__(bundle, "cpu")
        self.scratch = scratch
        self.graphs = graphs
        self.text = TextProcessor(self.bundle) if self.manifest.tokenizer else None
        self.values = DiskValues(scratch / "values")
        self.streams: dict[str, StageStream] = {}
        self.callables: dict[str, _SmallStage] = {}
        for name, g in graphs.items():
            g = with_last_logits(g) if name == "decoder" else g
            stage_taps = (taps or {}).get(name, ())
            budget = self._budget(name, g)
            stream = StageStream(g, scratch / "pieces", stage_taps, self.empty_cache, budget)
            self.streams[name] = stream
            self.callables[name] = _SmallStage(stream, [v.name for v in g.outputs])

    @property
    def small(self) -> bool:
        """Whether the whole model fits in memory in float32."""
        return sum(g.weight_bytes for g in self.graphs.values()) <= SMALL_BYTES

    def _budget(self, name: str, g: Graph) -> int:
        """Bytes of a segment's weights in the graph's own types: SEGMENT_BYTES once they are float32."""
        if name not in BUDGET_DIVISOR or self.small:
            return 1 << 62
        return SEGMENT_BYTES // BUDGET_DIVISOR[name] * g.weight_bytes // (4 * max(g.parameters, 1))

    def stage(self, name: str) -> Any:
        """A stage that fits in memory, callable."""
        return self.callables[name]

    @contextlib.contextmanager
    def replaced(self, name: str, g: Graph, scratch: Path) -> Iterator[None]:
        """Run another graph in place of a stage for a while.

        Args:
            name: The stage.
            g: The graph, with the same inputs and outputs.
            scratch: A folder for its files.
        """
        usual = self.streams[name], self.callables[name]
        stream = StageStream(with_last_logits(g) if name == "decoder" else g, scratch, (), self.empty_cache)
        self.streams[name] = stream
        self.callables[name] = _SmallStage(stream, usual[1].outputs)
        try:
            yield
        finally:
            self.streams[name], self.callables[name] = usual
            stream.close()

    def close(self) -> None:
        """Close all sessions and delete the pieces."""
        for stream in self.streams.values():
            stream.close()

    # -- vision ----------------------------------------------------------------------------------------------

    def put_pixels(self, clips: Sequence[Clip]) -> list[list[int]]:
        """Decode all clips and store their frames in batches, as the runtime calls the vision tower.

        Returns:
            The numbers of each clip's samples.
        """
        step = max(1, TOKENS_PER_VISION_CALL // (self.manifest.vision.patches + 1))
        count = 0
        batches: list[list[int]] = []
        for clip in clips:
            pixels = clip.pixels()
            batches.append([])
            for first in range(0, len(pixels), step):
                self.values.put(count, "pixels", pixels[first : first + step])
                batches[-1].append(count)
                count += 1
        return batches

    def states(self, batches: Sequence[int]) -> np.ndarray:
        """States (T, S, P+1, C) of the clip whose vision tower has run over these samples."""
        return np.concatenate([self.values.get(batch, "states") for batch in batches])

    def features(self, batches: Sequence[int]) -> np.ndarray:
        """Features (T, P, C) of that clip, for models that fit in memory."""
        features: np.ndarray = self.branch(self.states(batches))
        return features

    def run_vision(self, clips: Sequence[int], batches: Sequence[Sequence[int]]) -> None:
        """Run vision tower and temporal branch over whole clips and store their features.

        Args:
            clips: Indices of the clips.
            batches: Samples of each clip, as `put_pixels` returns them.
        """
        values = self.values
        self.streams["trunk"].run([batch for clip in clips for batch in batches[clip]], values)
        for clip in clips:
            values.put(FIRST_CLIP + clip, "states", self.states(batches[clip]))
        if self.manifest.vision.max_frames:
            self.streams["temporal"].run([FIRST_CLIP + clip for clip in clips], values)
        for clip in clips:
            if values.has(FIRST_CLIP + clip, "features"):
                features = values.get(FIRST_CLIP + clip, "features")
            else:
                features = self.branch(values.get(FIRST_CLIP + clip, "states"))
            values.put(clip, "features", features)

    # -- prompts and decoder ---------------------------------------------------------------------------------

    def embed(
        self, clip: int, question: str, answer: Sequence[int] = (), features: str = "features"
    ) -> EmbeddedPrompt:
        """Embed a question as decoder input.

        Args:
            clip: Index of the clip.
            question: The question.
            answer: Token ids that follow the prompt.
            features: The name under which the clip's features are stored.
        """
        assert self.text is not None
        return embed_prompt(self, self.text, self.values.get(clip, features), question, answer)

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of a known answer; none for an unknown one."""
        assert self.text is not None
        return self.text.tokenizer.encode(answer) if answer else []

    def put_prompt(self, sample: int, embeds: np.ndarray) -> None:
        """Store a prompt (S, D) as the decoder's inputs."""
        length = len(embeds)
        visible = np.arange(length) <= np.arange(length)[:, None]
        mask = np.where(visible, np.float32(0), np.float32("-inf"))
        self.values.put(sample, "inputs_embeds", embeds[None].astype(np.float32))
        self.values.put(sample, "position_ids", np.arange(length)[None])
        self.values.put(sample, "write_index", np.zeros(1, np.int64))
        self.values.put(sample, "mask", mask[None, None].astype(np.float32))

    def logits(self, samples: Sequence[int]) -> dict[int, np.ndarray]:
        """Run the decoder over stored prompts.

        Returns:
            Sample → logits (n, V) of its last positions, at most LAST_POSITIONS.
        """
        self.streams["decoder"].run(samples, self.values)
        return {sample: self.values.get(sample, "logits")[0] for sample in samples}

    def empty_cache(self, sample: int, name: str) -> np.ndarray:
        """An empty KV cache (1, heads, S, head_size) for a stored prompt of S tokens."""
        info = self.manifest.decoder
        length = self.values.get(sample, "position_ids").shape[1]
        dtype = np.int8 if info.kv_dtype == "int8" else np.float32
        return np.zeros((1, info.kv_heads, length, info.head_size), dtype)


def with_last_logits(g: Graph) -> Graph:
    """The decoder with the logits of the last positions instead of those of the last one alone."""
    g = g.copy()
    for node in g.nodes:
        if node.op_type == "Gather" and node.name.startswith("lm_head/"):
            inputs = [node.input[0], g.ints(-LAST_POSITIONS), g.ints(1 << 60), g.ints(1)]
            node.CopyFrom(helper.make_node("Slice", inputs, list(node.output), name=node.name))
    return g


def bundle_without_graphs(source: Source, folder: Path) -> Bundle:
    """A bundle with only a source's tokenizers and float embeddings, which the runtime's text side needs."""
    folder.mkdir(parents=True, exist_ok=True)
    source.write_tokenizers(folder)
    manifest = source.manifest(FLOAT)
    write_embeddings(source, FLOAT, folder)
    files = {
        path.name: FileEntry(path.stat().st_size, hash_file(path))
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    assert EMBEDDINGS in files
    return Bundle(folder, replace(manifest, files=files))
