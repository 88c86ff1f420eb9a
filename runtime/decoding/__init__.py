"""The decoder at work: KV caches (in place, growing, on a GPU) and the one loop that generates token ids.

May be imported from pipeline/ and the rooms above it; imports language/ and engines/ only.
"""
