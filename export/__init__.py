"""From a checkpoint to a bundle. Needs the extra `export` (onnx, safetensors); torch only for .bin shards.

Imports the engines only; calibration imports it, and so does the command line in cli.py, which stands above
both.
"""
