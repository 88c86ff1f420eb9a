"""OpenVINO on a vision tower, in an environment of its own: python peer_openvino.py GRAPH FRAMES PRECISION → JSON. Stands alone."""

from __future__ import annotations

import json
import sys
import time


def main(path: str, frames: int, precision: str) -> None:
    """precision: of what isn't INT8 in the graph, f32 or bf16."""
    import numpy as np
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    side = model.inputs[0].get_partial_shape()[2].get_length()
    model.reshape([frames, 3, side, side])
    compiled = core.compile_model(
        model, "CPU", {"INFERENCE_NUM_THREADS": 2, "INFERENCE_PRECISION_HINT": precision}
    )
    request, pixels = (
        compiled.create_infer_request(),
        np.random.default_rng(0).standard_normal((frames, 3, side, side)).astype(np.float32),
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        request.infer({0: pixels})
        seconds.append(time.perf_counter() - started)
    states = request.get_output_tensor(0).data
    print(
        json.dumps(
            {
                "version": openvino.__version__,
                "ms_per_frame": 1000 * min(seconds) / frames,
                "norm": float(np.linalg.norm(states.astype(np.float64))),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
