"""TensorRT and TensorRT-RTX engines: the plan of a build, its graphs, and one process per graph that builds.

May be imported from engines/targets/build.py and the commands; imports the packages below targets.
"""
