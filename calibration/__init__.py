"""Quantisation on the user's own videos: observe activations, decide how each layer is rounded, judge.

`calibrate.quantize_with_data` is the entry point; `data` reads the clips, model/ runs the float model in
pieces, gate/ judges the result. Imports export/, runtime/ and engines/; imported by nano/ and, on first use,
by export's command line.
"""
