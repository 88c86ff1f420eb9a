"""The interface of a model to export, and the function that opens one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ppllava_edge.engines.bundle.manifest import MANIFEST, Manifest
from ppllava_edge.engines.bundle.packed import expanded, find_bundle
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.tensors import Tensor
from ppllava_edge.export.options import Options
from ppllava_edge.export.quantisation.precision import Precision
from ppllava_edge.export.sources.bundle_source import BundleSource
from ppllava_edge.export.sources.checkpoint_source import CheckpointSource


class Source(Protocol):
    """A model whose weights are read one by one."""

    def graphs(self, precision: Precision) -> dict[str, Callable[[], Graph]]:
        """Return a function per stage that builds its graph.

        Graphs are in the precision's floating types and not yet quantised; no weight is loaded.
        """

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Return the token embeddings (V, D) and image_newline (D)."""

    def write_tokenizers(self, folder: Path) -> None:
        """Write the tokenizers into a bundle's folder."""

    def manifest(self, precision: Precision, hash_weights: bool = True) -> Manifest:
        """Return the bundle's manifest. Call write_tokenizers first: it determines the token ids.

        Args:
            precision: The precision of every part.
            hash_weights: Whether to compute the checkpoint's hash, which reads all weights.
        """

    def close(self) -> None:
        """Release open files."""


def open_source(options: Options) -> Source:
    """Open the checkpoint or bundle that options.checkpoint names.

    Raises:
        PPLLaVAError: Nothing is found there, or it can't be exported with these options.
    """
    folder = source_bundle(options)
    return CheckpointSource(options) if folder is None else BundleSource(folder, options)


def source_bundle(options: Options) -> Path | None:
    """Return the directory of the bundle that options.checkpoint names, or None if it names a checkpoint.

    "nano" is the packed bundle, unless a folder of that name holds a bundle or a checkpoint.
    """
    folder = expanded(options.checkpoint) / options.subfolder
    if not options.subfolder and not (folder / "config.json").is_file():
        folder = find_bundle(options.checkpoint)
    return folder if (folder / MANIFEST).is_file() else None
