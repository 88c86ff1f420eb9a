"""Facts about this machine (memory, GPUs) and predictions of the memory that a model needs.

Backends, targets and the command lines import it. It imports engines.bundle.
"""
