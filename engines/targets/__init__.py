"""Engines of a bundle: a file per target on ONNX Runtime, a folder for TensorRT.

`build.build` writes an engine, `select.select` chooses one. May be imported from cli/, and by runtime, export
and bench; imports graphs/, plugins/, machine/ and bundle/. The runtime imports only `select`, which needs no
onnx.
"""
