"""A soak test of an app's life: thousands of questions, with everything that goes wrong.

`python -m ppllava_edge.bench.soak` runs it; tests/runtime/session/test_soak.py does so with fewer questions.
"""
