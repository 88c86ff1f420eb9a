"""What a pipeline opens and holds: stages, the embeddings, the decoder with its KV caches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.embeddings import FILE as EMBEDDINGS
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.runtime.decoding.decoder import Decoder
from ppllava_edge.runtime.lazy import LazyTable, locked_cached_property
from ppllava_edge.runtime.pipeline.embeddings import EmbeddingTable

ENCODING = ("trunk", "temporal")  # the stages that frames need; a question needs the others


class PipelineParts(ABC):
    """The parts of a pipeline: opened on first use, each once; counted; released.

    Args:
        bundle: The opened bundle.
    """

    def __init__(self, bundle: Bundle):
        self.bundle, self.manifest = bundle, bundle.manifest
        self._closed = False
        self._stages: LazyTable[list[Any]] = LazyTable()  # name → the opened graphs, in order

    def load(self, what: str = "all") -> None:
        """Open stages now that aren't open yet.

        Stages also open on first use. Opening takes seconds for a large model, so a thread that is about to
        take the engine lock calls this before: the others then don't wait for the lock meanwhile.

        Args:
            what: "encoding" (the stages that frames need), "answering" (those that a question needs), "all".

        Raises:
            BundleError, EngineError: If a stage can't be opened, or the pipeline is closed.
        """
        try:
            for name in self.stage_names():
                if what == "all" or (name in ENCODING) == (what == "encoding"):
                    self.open_stage(name)
            if what != "encoding":
                _ = self.embedding_table, self.decoder
        finally:
            if self._closed:  # meanwhile: release what was opened since
                self.close()

    @abstractmethod
    def stage_names(self) -> list[str]:
        """The stages that a question about a video runs, by the names of `open_stage`."""

    @abstractmethod
    def open_stage(self, name: str) -> list[Any]:
        """The opened graphs of a stage, in order; opens them on first use.

        Raises:
            BundleError, EngineError: If they can't be opened, or the pipeline is closed.
        """

    def check_open(self) -> None:
        """Raise EngineError if the pipeline is closed."""
        if self._closed:
            raise EngineError("the model is closed; open it again")

    def close(self) -> None:
        """Release the stages, the free KV caches and the mapped embeddings.

        What a call under way uses is released when that call ends. Further use raises EngineError.
        """
        self._closed = True
        for name in ("decoder", "embedding_table"):
            value = self.__dict__.pop(name, None)
            if isinstance(value, Decoder):
                value.close()
        self._stages.clear()

    def weights_bytes(self) -> int:
        """Bytes of the weights of the stages that are open; memory-mapped files count by their size."""
        files = {
            file for stages in self._stages.built().values() for stage in stages for file in stage.files()
        }
        if "embedding_table" in self.__dict__:
            files.add(self.bundle.file(EMBEDDINGS))
        return sum(file.stat().st_size for file in files if file.exists())

    def cache_bytes(self) -> int:
        """Bytes of all KV caches that exist."""
        decoder = self.__dict__.get("decoder")
        return decoder.cache_bytes() if isinstance(decoder, Decoder) else 0

    @locked_cached_property
    def embedding_table(self) -> EmbeddingTable:
        """The token embeddings, mapped from their file."""
        self.check_open()
        return EmbeddingTable(self.bundle)

    @property
    @abstractmethod
    def decoder(self) -> Decoder:
        """The decoder with its KV caches."""

    def finish(self, sequence: Any) -> None:
        """Give a sequence from decoder.start back: its cache may be used for the next answer."""
        decoder = self.__dict__.get("decoder")  # none if the pipeline is closed
        if isinstance(decoder, Decoder):
            decoder.finish(sequence)
