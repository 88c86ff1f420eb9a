"""Helpers that tests of several rooms share: commands, doubles, servers, host builds of kernels."""
