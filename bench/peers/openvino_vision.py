"""OpenVINO on a vision tower. Run by a Python that has openvino; imports nothing of ours.

python openvino_vision.py GRAPH FRAMES PRECISION → JSON
"""

from __future__ import annotations

import json
import sys
import time

RUNS = 3
THREADS = 2


def main(path: str, frames: int, precision: str) -> None:
    """Print version, milliseconds per frame and the norm of the output.

    Args:
        path: The graph (plain_vision.py).
        frames: Frames in a run.
        precision: Precision of the layers that aren't INT8 in the graph: f32 or bf16.
    """
    import numpy as np
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    side = model.inputs[0].get_partial_shape()[2].get_length()
    shape = [frames, 3, side, side]
    model.reshape(shape)
    options = {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": precision}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    pixels = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        request.infer({0: pixels})
        seconds.append(time.perf_counter() - started)
    states = request.get_output_tensor(0).data
    report = {
        "version": openvino.__version__,
        "ms_per_frame": 1000 * min(seconds) / frames,
        "norm": float(np.linalg.norm(states.astype(np.float64))),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
