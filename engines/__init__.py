"""The bundle, and everything that opens or builds an engine from it.

Export, calibration, runtime, bench and nano import this folder; it imports none of them. A subpackage imports
only those to its right: cli > targets > graphs > plugins > backends > machine > bundle > the files in this
folder.
"""
