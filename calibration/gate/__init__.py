"""The parity gate: a quantised bundle against the float model on held-back clips, and the report about it.

Imported by calibration's other files; imports model/, layer_choice.py and runtime/.
"""
