"""Run a float graph that doesn't fit in memory: some layers at a time, over all samples."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ppllava_edge.calibration.model.values import Values
from ppllava_edge.engines.backends.onnxruntime_stage import Stage, first_line
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.graphs.graph import Graph
from ppllava_edge.engines.graphs.pieces import Segment, split

SEGMENT_BYTES = 128 << 20  # float32 weights in memory at once; bounds the number of observed layers too
Observe = Callable[[int, str, np.ndarray], None]  # sample, value name, value


class StageStream:
    """A stage that runs over many samples, segment by segment.

    A stage with one segment stays open between runs; with several segments, one is open at a time.

    Args:
        g: The stage.
        scratch: A folder for the segments' files.
        taps: Values to show to observers.
        fill: Creates inputs that no sample has (the empty KV cache): (sample, name) → array.
        budget: Maximum bytes of a segment's weights.
    """

    def __init__(
        self,
        g: Graph,
        scratch: Path,
        taps: Sequence[str] = (),
        fill: Callable[[int, str], np.ndarray] | None = None,
        budget: int = SEGMENT_BYTES,
    ):
        self.name = g.name
        self.scratch = scratch
        self.fill = fill
        self.taps = set(taps)
        self.segments = split(g, taps, budget)
        self._open: dict[int, Stage] = {}

    def run_segment(
        self, index: int, samples: Sequence[int], values: Values, observe: Observe | None = None
    ) -> None:
        """Run one segment over samples.

        Args:
            index: Number of the segment.
            samples: Samples whose inputs are stored in `values`.
            values: Store of inputs, to which outputs for later segments are added.
            observe: Called with every tapped value and output.

        Raises:
            EngineError: If an input is missing or the engine fails.
        """
        segment = self.segments[index]
        stage = self._stage(index)
        outputs = [name for name in stage.outputs if name in segment.gives or observe]
        outputs = [name for name in outputs if not name.startswith("present.")]
        if not outputs:
            return  # shape computations only; later segments repeat them
        for sample in samples:
            inputs = self._inputs(segment, sample, values)
            if observe and index == 0:  # a tapped value may be the stage's own input
                for name in self.taps & set(inputs):
                    observe(sample, name, inputs[name])
            try:
                results = stage.session.run(outputs, inputs)
            except Exception as error:
                raise EngineError(f"{self.name}, segment {index}: {first_line(error)}") from None
            for name, value in zip(outputs, results):
                if name in segment.gives:
                    values.put(sample, name, value)
                if observe:
                    observe(sample, name, value)
        if len(self.segments) > 1:
            self.close()

    def run(self, samples: Sequence[int], values: Values, observe: Observe | None = None) -> None:
        """Run all segments in order; intermediate values are dropped after their last use."""
        for index in range(len(self.segments)):
            self.run_segment(index, samples, values, observe)
            self.drop_finished(index, samples, values)

    def drop_finished(self, index: int, samples: Sequence[int], values: Values) -> None:
        """Drop values between segments that no segment after this one reads."""
        for name in self._finished_after(index):
            for sample in samples:
                values.drop(sample, name)

    def _finished_after(self, index: int) -> Iterator[str]:
        later = {name for segment in self.segments[index + 1 :] for name in segment.reads}
        between = {name for segment in self.segments[:index] for name in segment.gives}
        results = set(self.segments[-1].gives)
        yield from ((between & set(self.segments[index].reads)) - later) - results

    def close(self) -> None:
        """Close the engine's sessions and delete the segments' files."""
        self._open.clear()
        shutil.rmtree(self.scratch / self.name, ignore_errors=True)

    def _inputs(self, segment: Segment, sample: int, values: Values) -> dict[str, np.ndarray]:
        return {
            name: values.get(sample, name) if values.has(sample, name) else self._filled(sample, name)
            for name in segment.reads
        }

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
            self._open[index] = Stage(path, lean=len(self.segments) > 1)
        return self._open[index]
