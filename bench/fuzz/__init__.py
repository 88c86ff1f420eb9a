"""Fuzzing: damaged and hostile files go through the code that reads them, each in a process of its own.

python -m ppllava_edge.bench.fuzz --minutes 10

A fork server (process/) imports the package once and forks a child for every input. The child runs one target
(targets/) under limits on memory and time, so that a crash is an outcome like any other. The campaign mutates
files (inputs/), starting from generated ones, and keeps those that reach new lines of the package or give new
messages.
"""
