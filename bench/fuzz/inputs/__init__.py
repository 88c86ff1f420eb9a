"""Inputs: seed files that the package's own libraries write, and mutations of them, blind or by structure."""
