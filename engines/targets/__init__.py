"""Engines of a bundle: one build target per file; `build.build` writes one, `select.select` chooses one.

May be imported from cli/, and by runtime, export and bench; imports graphs/, plugins/, machine/ and bundle/.
The runtime imports only `select`, which needs no onnx.
"""
