"""Choose and preprocess frames for the vision tower, and cache encoded videos on disk.

May be imported from pipeline/ and the packages above it; imports media/ and engines/.
"""
