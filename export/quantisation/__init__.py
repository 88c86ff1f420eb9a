"""Quantisation of a float graph: the precision of each part, the plan per layer, rounding, the graph pass.

Imports engines.graphs only. convert.py and the calibration use it.
"""
