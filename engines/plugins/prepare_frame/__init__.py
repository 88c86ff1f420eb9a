"""Frames in GPU memory, resized and normalised there, bit for bit as Pillow does on the host.

`kernel` runs on the GPU; `resampling` and `letterbox` are its arithmetic on the host. The runtime imports
`kernel` and `letterbox`.
"""
