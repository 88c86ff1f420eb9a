"""The model's stages, one call each, on the CPU or resident on a GPU; `factory.Pipeline.open` picks which.

May be imported from session/, live/ and cli/; imports decoding/, language/, vision/ and engines/.
"""
