"""Weighted convolutional pooling on the GPU: one CUDA kernel, launched directly or as a TensorRT plugin."""
