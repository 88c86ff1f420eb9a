"""The decoder: KV caches (in place, growing, on a GPU) and the one loop that generates token ids.

May be imported from pipeline/ and the packages above it; imports language/ and engines/ only.
"""
