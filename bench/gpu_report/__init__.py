"""The parts of `python bench/gpu.py`: the kernel's checks and roofline, a whole answer, the compile table.

Imported by bench/gpu.py only, once the package can be found.
"""
