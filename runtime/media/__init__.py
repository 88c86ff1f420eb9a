"""Open, seek, decode and write video files, images and frames in memory, through PyAV (FFmpeg) and Pillow.

The lowest package of the runtime: every other one may import it. It imports engines/ only (errors, device
frames).
"""
