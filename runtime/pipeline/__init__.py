"""The model's stages, one call each, on the CPU or resident on a GPU; `factory.Pipeline.open` picks which.

May be imported from encoding/, session/ and video_qa.py; imports decoding/, language/, vision/ and engines/.
"""
