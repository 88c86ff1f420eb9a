"""Text and tokens: tokenizers, prompts, detokenisation, sampling, prompt lookup.

May be imported from decoding/ and the packages above it; imports engines/ only.
"""
