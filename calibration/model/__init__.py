"""The float model, run over many calibration samples without ever loading it as a whole.

Imported by the rest of calibration/; imports calibration's data, and export/, runtime/ and engines/.
"""
