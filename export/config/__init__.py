"""A checkpoint's configuration: typed dataclasses (model), the defaults of config.json, and the reader.

Imports the bundle room and the activation names of export.stages; stages and sources import the dataclasses.
"""
