"""The sources of an export: a checkpoint in upstream's layout, or a float bundle, read tensor by tensor.

Imports export.config, export.stages and the engines; convert.py and the calibration open a model with
source.open_source.
"""
