"""Live views of a camera, a stream or pushed frames: encoded as they arrive, asked at any moment.

May be imported from video_qa.py and cli/; imports session/ and the packages below it.
"""
