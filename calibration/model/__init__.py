"""The float model, run over many calibration samples without ever being whole in memory.

Imported by the rest of calibration/; imports calibration's data, and export/, runtime/ and engines/.
"""
