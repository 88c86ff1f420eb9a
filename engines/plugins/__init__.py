"""Kernels of our own, and the plugins that bring them into TensorRT."""
