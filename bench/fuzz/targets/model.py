"""Targets that read a model's files: bundles, engines, graphs, weights, tokenizers, the feature cache."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.bench.fuzz.targets.target import Target, expect
from ppllava_edge.engines.backends.onnxruntime_stage import Stage
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.embeddings import FILE
from ppllava_edge.engines.bundle.engine_manifest import find_engine
from ppllava_edge.engines.bundle.manifest import MANIFEST
from ppllava_edge.engines.bundle.packed import packed_bundle
from ppllava_edge.runtime.language.text_processor import TextProcessor
from ppllava_edge.runtime.pipeline.embeddings import EmbeddingTable
from ppllava_edge.runtime.video_qa import VideoQA
from ppllava_edge.runtime.vision.preprocess import preprocess_image, preprocess_video

QUESTION = "What color is the circle?"


def copy_of_bundle(scratch: Path, **replaced: bytes) -> Path:
    """Make a bundle of hard links to the packed one, with some files replaced.

    Args:
        scratch: An empty folder on the file system of scratch.parent / "bundle", a copy of the bundle.
        replaced: Contents by name, with "__" for "."; a replaced manifest is taken as it is, the hashes of
            other files are put into the manifest.

    Returns:
        The bundle's folder.
    """
    folder = scratch / "bundle"
    folder.mkdir()
    contents = {name.replace("__", "."): data for name, data in replaced.items()}
    for path in (scratch.parent / "bundle").iterdir():
        if path.name not in contents and path.name != MANIFEST:
            os.link(path, folder / path.name)
    if MANIFEST not in contents:
        manifest = json.loads((scratch.parent / "bundle" / MANIFEST).read_text())
        for name, data in contents.items():
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        contents[MANIFEST] = json.dumps(manifest).encode()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


def read_manifest(path: Path, scratch: Path) -> None:
    """Open a bundle with this manifest, and use the numbers in it that size arrays."""
    bundle = Bundle.open(copy_of_bundle(scratch, manifest__json=path.read_bytes()))
    m = bundle.manifest
    picture = np.zeros((48, 64, 3), np.uint8)
    preprocess_video([picture], m.preprocessing)
    preprocess_image(picture, m.preprocessing)
    if m.tokenizer:
        text = TextProcessor(bundle)
        text.prompt_pieces(QUESTION)
        text.follow_up_ids(QUESTION)
        text.question_ids(QUESTION)
    EmbeddingTable(bundle).rows([0, m.decoder.vocab - 1])


def answer(path: Path, scratch: Path) -> None:
    """Answer a question about two frames with this manifest."""
    folder = copy_of_bundle(scratch, manifest__json=path.read_bytes())
    frames = [np.full((48, 64, 3), grey, np.uint8) for grey in (0, 200)]
    answered = VideoQA(folder, "cpu", threads=1).open(frames, fps=1.0).ask(QUESTION, max_new_tokens=4)
    expect(answered.new_tokens <= 4, "answer: longer than asked for")


def read_engine(path: Path, scratch: Path) -> None:
    """Look for the engine that this engine.json describes."""
    folder = copy_of_bundle(scratch)
    engine_folder = folder / "engines" / "cpu"
    engine_folder.mkdir(parents=True)
    (engine_folder / "engine.json").write_bytes(path.read_bytes())
    os.link(folder / "pooling.onnx", engine_folder / "pooling.onnx")
    os.link(folder / "pooling.onnx.data", engine_folder / "pooling.onnx.data")
    engine, reason = find_engine(Bundle.open(folder), "cpu", verify=True)
    expect("\n" not in reason and len(reason) < 600, "reason: not one line")
    if engine is not None:
        for stage in engine.stages:
            expect(all(p.parent == engine_folder for p in engine.paths(stage)), "paths: leave the engine")


def open_graph(path: Path, scratch: Path) -> None:
    """Open a graph with ONNX Runtime; its weights lie beside it."""
    data = path.read_bytes()
    for stage in ("pooling", "similarity"):  # which graph it was is told by the weights it names
        os.link(scratch.parent / "bundle" / f"{stage}.onnx.data", scratch / f"{stage}.onnx.data")
    graph = scratch / "graph.onnx"
    graph.write_bytes(data)
    Stage(graph, threads=1)


def read_embeddings(path: Path, scratch: Path) -> None:
    """Read rows of a bundle's token embeddings."""
    bundle = Bundle.open(copy_of_bundle(scratch, **{FILE.replace(".", "__"): path.read_bytes()}))
    table = EmbeddingTable(bundle)
    rows = table.rows([0, 1, bundle.manifest.decoder.vocab - 1])
    expect(rows.shape == (3, bundle.manifest.decoder.hidden_size), "rows: of another shape")
    expect(table.image_newline().shape == rows.shape[1:], "newline: of another shape")


def read_tokenizer(path: Path, scratch: Path) -> None:
    """Tokenize a question, and turn ids into text, with a bundle's tokenizer."""
    text = _text_of(scratch, tokenizer__json=path.read_bytes())
    pieces = text.prompt_pieces(QUESTION)
    text.follow_up_ids(QUESTION)
    text.tokenizer.decode([i for piece in pieces for i in piece])


def read_question_tokenizer(path: Path, scratch: Path) -> None:
    """Tokenize a question for the question tower."""
    ids, _ = _text_of(scratch, question_tokenizer__json=path.read_bytes()).question_ids(QUESTION)
    expect(ids.ndim == 2 and ids.shape[0] == 1, "ids: of another shape")


def _text_of(scratch: Path, **replaced: Any) -> TextProcessor:
    return TextProcessor(Bundle.open(copy_of_bundle(scratch, **replaced)))


def prepare_bundle(folder: Path) -> None:
    """Copy the packed bundle to folder / "bundle", so that hard links can be made of its files."""
    (folder / "bundle").mkdir()
    for path in packed_bundle().iterdir():
        if path.is_file():
            (folder / "bundle" / path.name).write_bytes(path.read_bytes())


MODEL_TARGETS: tuple[Target, ...] = (
    Target("manifest", read_manifest, ".json", "json", 2),
    Target("answer", answer, ".json", "json", 0.1),
    Target("engine", read_engine, ".json", "json"),
    Target("onnx", open_graph, ".onnx", "protobuf", 0.7),
    Target("embeddings", read_embeddings, ".safetensors", "safetensors", 0.7),
    Target("tokenizer", read_tokenizer, ".json", "json"),
    Target("question-tokenizer", read_question_tokenizer, ".json", "json", 0.5),
)
