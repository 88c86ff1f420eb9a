"""Quantisation on the user's own videos: observe activations, choose each layer's rounding, check the result.

`calibrate.quantize_with_data` is the entry point; `data` reads the clips, model/ runs the float model in
pieces, gate/ compares the result with the float model. Imports export/, runtime/ and engines/; imported by
nano/ and, on first use, by export's command line.
"""
