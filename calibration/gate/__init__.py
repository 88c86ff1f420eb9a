"""The parity gate: a quantised bundle against the float model on held-back clips, and the report about it.

Imported by calibration's other files; imports model/, choose.py and runtime/.
"""
