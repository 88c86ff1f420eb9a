"""ONNX graphs: a small writer and reader, and every pass that rewrites a graph.

May be imported from targets/ and cli/, and by export, calibration and bench; imports plugins/, bundle/ and
errors only. Needs the package onnx, so no code that runs engines imports it.
"""
