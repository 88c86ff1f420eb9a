"""The bundle directory: manifests, file integrity, prompt templates and pooling windows.

Every other subpackage may import it. It imports only engines.errors and engines.libraries.
"""
