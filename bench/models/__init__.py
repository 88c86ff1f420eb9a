"""Models to measure with: random checkpoints of any size, and the original algorithm in torch.

Imported by the benchmarks and the tests; imports nothing of ours.
"""
