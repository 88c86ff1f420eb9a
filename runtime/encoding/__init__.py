"""From a source to features: choosing, decoding and encoding frames, guided candidates, cache entries.

May be imported from session/ and the packages above it; imports pipeline/, vision/, media/ and engines/.
"""
