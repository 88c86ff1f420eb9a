"""Run one graph or engine: ONNX Runtime on the CPU or CUDA, TensorRT, and the CUDA driver beneath them.

The runtime, calibration and engines.plugins, graphs, targets and cli may import it. It imports
engines.machine and engines.bundle.
"""
