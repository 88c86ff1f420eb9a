"""From a checkpoint to a bundle. Needs the extra `export` (onnx, safetensors); torch only for .bin shards.

Imports engines/ only. Calibration imports this package. The command line in cli.py is layered above both.
"""
