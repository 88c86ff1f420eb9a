"""CUDA kernels of this project, and the TensorRT plugins around them.

May be imported from graphs/ and targets/, and by the runtime and bench; imports backends/ and bundle/. CUDA
and TensorRT load on first use.
"""
