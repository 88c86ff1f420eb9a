"""Shared by the benchmarks: timing a bundle's stages, child processes that report in JSON, plots.

Imported by the commands of bench/; imports runtime/ and engines/.
"""
