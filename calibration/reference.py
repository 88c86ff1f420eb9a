"""A model run over calibration samples without ever being whole in memory: what layers see, and what the right result is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from ppllava_edge.calibration.data import Clip
from ppllava_edge.calibration.stream import SEGMENT_BYTES, Observe, StageStream, Values
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.integrity import hash_file
from ppllava_edge.engines.bundle.manifest import FileEntry
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.export.convert import EMBEDDINGS, write_embeddings
from ppllava_edge.export.quantisation.precision import parse_precision
from ppllava_edge.export.sources import Source
from ppllava_edge.runtime.language.text_processor import TextProcessor
from ppllava_edge.runtime.pipeline.cpu import TOKENS_PER_VISION_CALL, CpuPipeline

LAST = 40  # positions whose logits the reference gives: an answer of 32 tokens, and the one before it
FLOAT = parse_precision("fp32")
BATCHED = {
    "trunk": 1,
    "temporal": 4,
    "decoder": 1,
}  # run piece by piece over all samples; larger numbers: smaller pieces. The others stay open
CLIP = (
    1 << 20
)  # samples from here on are whole clips, for the temporal stage; below it: some frames, or a question
SMALL_BYTES = 1 << 30  # of float32 weights in all, up to which whole models are run again and again


@dataclass
class Asked:
    """A question about a clip: index of the sample and of its clip."""

    index: int
    clip: int
    question: str
    answer: str


class _Small:
    """A stage that is one segment: callable as runtime's pipeline calls its stages, observed."""

    def __init__(self, stream: StageStream, outputs: Sequence[str]):
        self.stream, self.outputs, self.observe = stream, outputs, None
        self.dtypes = {name: None for segment in stream.segments for name in segment.reads}
        self.key = 0

    observe: Observe | None

    def __call__(self, tidy: bool = False, **inputs: np.ndarray) -> list[np.ndarray]:
        values = _InMemory(inputs)
        self.stream.run([self.key], values, self.observe)  # type: ignore[arg-type]
        return [values.kept[name] for name in self.outputs]


class _InMemory:
    """Values of one sample, for small stages."""

    def __init__(self, inputs: dict[str, np.ndarray]):
        self.kept = {name: np.ascontiguousarray(a) for name, a in inputs.items()}

    def put(self, sample: int, name: str, value: np.ndarray) -> None:
        self.kept[name] = value

    def get(self, sample: int, name: str) -> np.ndarray:
        return self.kept[name]

    def has(self, sample: int, name: str) -> bool:
        return name in self.kept

    def drop(self, sample: int, name: str) -> None:
        pass


class StreamedModel(CpuPipeline):
    """A model's stages with the interface of runtime's pipeline where they are small, and piece by piece over many samples where not.

    bundle: tokenizers and embeddings. graphs: of all stages, in float32 where they are float. scratch: a folder for values and pieces.
    taps: stage → values to observe.
    """

    def __init__(
        self,
        bundle: Bundle,
        graphs: dict[str, Graph],
        scratch: Path,
        taps: dict[str, list[str]] | None = None,
    ):
        super().__init__(bundle, "cpu")
        self.scratch, self.graphs = scratch, graphs
        self.text = TextProcessor(self.bundle) if self.manifest.tokenizer else None
        self.values = Values(scratch / "values")
        self.streams: dict[str, StageStream] = {}
        self.callables: dict[str, _Small] = {}
        for name, g in self.graphs.items():
            g = all_logits(g) if name == "decoder" else g
            budget = (
                SEGMENT_BYTES // BATCHED[name] * g.weight_bytes // (4 * max(g.parameters, 1))
                if name in BATCHED and not self.small
                else 1 << 62
            )
            self.streams[name] = StageStream(
                g, scratch / "pieces", (taps or {}).get(name, ()), self._fill, budget
            )
            self.callables[name] = _Small(self.streams[name], [v.name for v in g.outputs])

    @property
    def small(self) -> bool:
        """Whether the whole model fits in memory in float32."""
        return sum(g.weight_bytes for g in self.graphs.values()) <= SMALL_BYTES

    def stage(self, name: str) -> Any:
        """A small stage, callable."""
        return self.callables[name]

    def close(self) -> None:
        """Let go of all sessions."""
        for stream in self.streams.values():
            stream.close()

    # -- stages over many samples ------------------------------------------------------------------------------------

    def put_pixels(self, clips: Sequence[Clip]) -> list[list[int]]:
        """Preprocessed frames of all clips into the store, some frames a sample as the runtime calls the trunk → sample numbers by clip."""
        step, number, chunks = max(1, TOKENS_PER_VISION_CALL // (self.manifest.vision.patches + 1)), 0, []
        for clip in clips:
            pixels, mine = clip.pixels(), []
            for first in range(0, len(pixels), step):
                self.values.put(number, "pixels", pixels[first : first + step])
                mine.append(number)
                number += 1
            chunks.append(mine)
        return chunks

    def features(self, chunks: Sequence[int]) -> np.ndarray:
        """(T,P,C) of one clip whose trunk has run over these samples; for models that fit in memory."""
        return self.branch(self.states(chunks))

    def states(self, chunks: Sequence[int]) -> np.ndarray:
        """(T,S,P+1,C) of one clip."""
        return np.concatenate([self.values.get(chunk, "states") for chunk in chunks])

    def embeds(
        self, features: np.ndarray, question: str, answer: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """inputs_embeds (S,D) of the prompt and an answer's tokens, the visual tokens in it, and the cosine map if there is one."""
        assert self.text is not None
        q = cosine = None
        if self.manifest.pooling.guided:
            q = self.encode_question(self.text.question_ids(question)[0])
            cosine = self.similarity(features, q)
        visual = self.visual_tokens(features, q)
        before, after = self.text.prompt_pieces(question)
        return (
            np.concatenate([self.embed_tokens(before), visual, self.embed_tokens([*after, *answer])]),
            visual,
            cosine,
        )

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of a known answer; none for an unknown one."""
        assert self.text is not None
        return self.text.tokenizer.encode(answer, add_special_tokens=False).ids if answer else []

    def put_prompt(self, sample: int, embeds: np.ndarray) -> None:
        """A prompt into the store, as the decoder takes it."""
        length = len(embeds)
        hidden = np.where(np.arange(length) <= np.arange(length)[:, None], np.float32(0), np.float32("-inf"))
        for name, value in (
            ("inputs_embeds", embeds[None].astype(np.float32)),
            ("position_ids", np.arange(length)[None]),
            ("write_index", np.zeros(1, np.int64)),
            ("mask", hidden[None, None].astype(np.float32)),
        ):
            self.values.put(sample, name, value)

    def run_vision(self, clips: Sequence[int], chunks: Sequence[Sequence[int]]) -> None:
        """Trunk and temporal branch of whole clips, whose features are in the store afterwards."""
        self.streams["trunk"].run([chunk for clip in clips for chunk in chunks[clip]], self.values)
        for clip in clips:
            self.values.put(CLIP + clip, "states", self.states(chunks[clip]))
        if self.manifest.vision.max_frames:
            self.streams["temporal"].run([CLIP + clip for clip in clips], self.values)
        for clip in clips:
            there = self.values.has(CLIP + clip, "features")
            self.values.put(
                clip,
                "features",
                self.values.get(CLIP + clip, "features")
                if there
                else self.branch(self.values.get(CLIP + clip, "states")),
            )

    def logits(self, samples: Sequence[int], observe: Observe | None = None) -> dict[int, np.ndarray]:
        """Run the decoder over prompts in the store → logits (n,V) of the last positions, by sample."""
        self.streams["decoder"].run(samples, self.values, observe)
        return {sample: self.values.get(sample, "logits")[0] for sample in samples}

    def _fill(self, sample: int, name: str) -> np.ndarray:
        d, length = self.manifest.decoder, self.values.get(sample, "position_ids").shape[1]
        return np.zeros((1, d.kv_heads, length, d.head_size), np.int8 if d.kv_dtype == "int8" else np.float32)


def all_logits(g: Graph) -> Graph:
    """The decoder with the logits of the last positions instead of the last one's alone."""
    g = g.copy()
    for node in g.nodes:
        if node.op_type == "Gather" and node.name.startswith("lm_head/"):
            start, end, axis = g.ints(-LAST), g.ints(1 << 60), g.ints(1)
            node.CopyFrom(
                helper.make_node(
                    "Slice", [node.input[0], start, end, axis], list(node.output), name=node.name
                )
            )
    return g


def side_bundle(source: Source, folder: Path) -> Bundle:
    """Tokenizers and float embeddings of a source as a bundle without graphs: what the runtime's text side needs."""
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
