"""Decoding in a child process: its crash, its memory or its silence is a MediaError in the parent.

`reader.IsolatedReader` runs in the parent, `worker` in the child; both speak the messages of `protocol` over
a socket. The child isn't trusted: a hostile file may have taken it over.
"""
