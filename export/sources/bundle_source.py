"""A float bundle as the source of another: to quantise it, or to widen it to fp32."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.embeddings import NEWLINE, TABLE, open_embeddings
from ppllava_edge.engines.bundle.manifest import Manifest
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.rewrite import to_float32
from ppllava_edge.engines.graphs.tensors import Tensor
from ppllava_edge.export.config.model import Overrides
from ppllava_edge.export.options import Options
from ppllava_edge.export.quantisation.precision import STAGE_PART, Precision
from ppllava_edge.export.sources.manifest import created_by, describe_precision, kv_dtype

TOKENIZERS = ("tokenizer.json", "question_tokenizer.json")


class BundleSource:
    """A bundle in fp32 or fp16."""

    def __init__(self, path: Path, options: Options):
        """Open the bundle.

        Raises:
            PPLLaVAError: The bundle is invalid or quantised, or an option can't be applied to a bundle.
        """
        if options.overrides != Overrides() or options.clip or options.base:
            raise PPLLaVAError(
                f"{path} is a bundle already: pooling, template and tokenizers are set when a checkpoint is "
                "exported"
            )
        self.bundle = Bundle.open(path)
        self.options = options
        _check_precision(path, self.bundle.manifest, options.precision)

    def graphs(self, precision: Precision) -> dict[str, Callable[[], Graph]]:
        """Return a function per stage that builds its graph; see Source."""
        names = [name for name in STAGE_PART if f"{name}.onnx" in self.bundle.manifest.files]
        return {name: functools.partial(self._read_graph, name, precision) for name in names}

    def _read_graph(self, name: str, precision: Precision) -> Graph:
        g = Graph.read(self.bundle.file(f"{name}.onnx"))
        g.name = name  # the name in the file is arbitrary, even a path
        # similarity always computes in float32, but its input has the type of the vision stages
        stage = "trunk" if name == "similarity" else name
        return to_float32(g) if precision.float_type(stage) == "float32" else g

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Return the token embeddings (V, D) and image_newline (D)."""
        return self._embedding(TABLE), self._embedding(NEWLINE)

    def _embedding(self, name: str) -> Tensor:
        with open_embeddings(self.bundle, newline=True) as reader:
            shape = tuple(reader.get_slice(name).get_shape())

        def load() -> np.ndarray:
            with open_embeddings(self.bundle, newline=True) as reader:
                return reader.get_tensor(name)

        return Tensor(name, shape, load)

    def write_tokenizers(self, folder: Path) -> None:
        """Write the tokenizers into a bundle's folder."""
        for name in TOKENIZERS:
            if name in self.bundle.manifest.files and self.options.tokenizer:
                shutil.copyfile(self.bundle.file(name), folder / name)

    def manifest(self, precision: Precision, hash_weights: bool = True) -> Manifest:
        """Return the bundle's manifest; see Source."""
        m = self.bundle.manifest
        recorded = m.precision.get("kv", "fp32" if m.decoder.kv_dtype == "float32" else "fp16")
        if recorded == "fp32" and precision.parts["kv"] == "fp16":
            precision = Precision({**precision.parts, "kv": "fp32"})  # a float cache keeps its type
        return replace(
            m,
            precision=describe_precision(precision),
            decoder=replace(m.decoder, kv_dtype=kv_dtype(precision)),
            created_by=created_by(),
            files={},
            tokenizer=m.tokenizer and self.options.tokenizer,
        )

    def close(self) -> None:
        """Nothing to release: files are opened for each read."""


def _check_precision(path: Path, manifest: Manifest, precision: Precision) -> None:
    """Refuse to quantise twice, and to narrow fp32 to fp16."""
    integers = [f"{part} {kind}" for part, kind in manifest.precision.items() if kind not in ("fp32", "fp16")]
    if integers:
        raise PPLLaVAError(
            f"{path} is quantised already ({', '.join(integers)}); "
            "start from its checkpoint, or from a bundle in fp16 or fp32"
        )
    for part, kind in precision.parts.items():
        kept_float = part == "kv" and precision.integer("decoder")  # the cache then keeps its type
        if manifest.precision.get(part) == "fp32" and kind == "fp16" and not kept_float:
            raise PPLLaVAError(
                f"{path} holds {part} in fp32, which is not narrowed to fp16; "
                "export the checkpoint with --precision fp16"
            )
