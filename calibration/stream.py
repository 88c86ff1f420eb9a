"""Running a float graph that doesn't fit in memory: some layers at a time, over all samples, with what lies between on disk."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ppllava_edge.engines.backends.onnxruntime_stage import Stage, first_line
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.pieces import split
from ppllava_edge.engines.libraries import import_onnxruntime

SEGMENT_BYTES = 128 << 20  # of float32 weights that are in memory at once, and so of layers whose inputs are
Observe = Callable[[int, str, np.ndarray], None]  # sample, value name, value


class Values:
    """Arrays by sample and name, on disk: activations of a few videos are larger than a layer."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, sample: int, name: str) -> Path:
        return self.folder / f"{sample}-{hashlib.sha256(name.encode()).hexdigest()[:24]}.npy"

    def put(self, sample: int, name: str, value: np.ndarray) -> None:
        """Store; whole or not at all."""
        path = self._path(sample, name)
        part = path.with_suffix(".part")
        array = np.ascontiguousarray(value)
        with open(part, "wb") as file:  # not np.save: on a full disk it loses the error's number
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data.cast("B") if array.size else b"")
        part.replace(path)

    def get(self, sample: int, name: str) -> np.ndarray:
        """Load."""
        return np.load(self._path(sample, name), allow_pickle=False)

    def has(self, sample: int, name: str) -> bool:
        """Whether it is there."""
        return self._path(sample, name).exists()

    def drop(self, sample: int, name: str) -> None:
        """Delete."""
        self._path(sample, name).unlink(missing_ok=True)


class StageStream:
    """A stage that can be run over samples, segment by segment. Small stages are one segment, which stays open.

    fill: gives inputs that no sample carries (the empty cache), by sample and name.
    """

    def __init__(
        self,
        g: Graph,
        scratch: Path,
        taps: Sequence[str] = (),
        fill: Callable[[int, str], np.ndarray] | None = None,
        budget: int = SEGMENT_BYTES,
    ):
        self.name, self.scratch, self.fill, self.taps = g.name, scratch, fill, set(taps)
        self.segments = split(g, taps, budget)
        self._open: dict[int, Stage] = {}

    def run_segment(
        self, index: int, samples: Sequence[int], values: Values, observe: Observe | None = None
    ) -> None:
        """Run one segment over samples: reads from and gives to values; the other outputs go to observe."""
        segment, stage = self.segments[index], self._stage(index)
        wanted = [name for name in stage.outputs if name in segment.gives or observe]
        wanted = [name for name in wanted if not name.startswith("present.")]
        if not wanted:
            return  # sizes only, which whoever needs them makes again
        for sample in samples:
            feeds = {
                name: values.get(sample, name) if values.has(sample, name) else self._filled(sample, name)
                for name in segment.reads
            }
            for name in (
                self.taps & set(feeds) if observe and index == 0 else ()
            ):  # a layer that reads the stage's own input
                observe(sample, name, feeds[name])  # type: ignore[misc]
            try:
                outputs = stage.session.run(wanted, feeds)
            except Exception as error:
                raise EngineError(f"{self.name}, segment {index}: {first_line(error)}") from None
            for name, value in zip(wanted, outputs):
                if name in segment.gives:
                    values.put(sample, name, value)
                if observe:
                    observe(sample, name, value)
        if len(self.segments) > 1:
            self.close()

    def run(self, samples: Sequence[int], values: Values, observe: Observe | None = None) -> None:
        """All segments, one after the other; what lies between is dropped when it isn't needed any more."""
        for index in range(len(self.segments)):
            self.run_segment(index, samples, values, observe)
            for name in self.finished_after(index):
                for sample in samples:
                    values.drop(sample, name)

    def finished_after(self, index: int) -> Iterator[str]:
        """Values between segments that nothing after this one reads."""
        later = {name for segment in self.segments[index + 1 :] for name in segment.reads}
        between = {name for segment in self.segments[:index] for name in segment.gives}
        yield from ((between & set(self.segments[index].reads)) - later) - set(self.segments[-1].gives)

    def close(self) -> None:
        """Let go of sessions and their files."""
        self._open.clear()
        shutil.rmtree(self.scratch / self.name, ignore_errors=True)

    def _filled(self, sample: int, name: str) -> np.ndarray:
        if self.fill is None:
            raise EngineError(f"{self.name} needs {name}, which no sample has")
        return self.fill(sample, name)

    def _stage(self, index: int) -> Stage:
        if index not in self._open:
            folder = self.scratch / self.name
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{index}.onnx"
            self.segments[index].graph.save(path, check=False)
            import_onnxruntime()
            self._open[index] = Stage(path, lean=len(self.segments) > 1)
        return self._open[index]
