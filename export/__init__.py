"""From a checkpoint to a bundle. Needs the extra `export` (onnx, safetensors); never torch."""
