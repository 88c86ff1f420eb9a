"""Benchmarks: `ppllava-bench`, and one module per experiment (`python -m ppllava_edge.bench.NAME`).

May import every other room; nothing but tests imports it.
"""
