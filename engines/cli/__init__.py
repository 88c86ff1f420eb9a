"""The commands ppllava-build, ppllava-info and ppllava-doctor.

Nothing imports it. It imports every other subpackage of engines.
"""
