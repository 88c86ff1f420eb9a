"""Prompt-guided pooling on the GPU: one CUDA kernel, launched directly or as a TensorRT plugin.

The runtime imports `kernel`; `tensorrt_plugin` and `aot` are the two forms of the plugin.
"""
