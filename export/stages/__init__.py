"""The network, one file per ONNX graph: trunk, temporal, question, similarity, pooling, decoder.

Each file imports the typed configuration (export.config.model) and the graph writer (engines.graphs) only.
export.sources builds the graphs.
"""
