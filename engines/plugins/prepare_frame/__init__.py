"""Frames that lie on the GPU already: resized and normalised there, exactly as Pillow does it on the host."""
