"""The layout: folders at the top of the repository install as sub-packages of ppllava_edge (metadata stands in pyproject.toml)."""

from setuptools import setup

FOLDERS = {
    "": "api", ".engines": "engines", ".engines.plugins": "engines/plugins", ".engines.plugins.weighted_pool": "engines/plugins/weighted_pool",
    ".engines.plugins.prepare_frame": "engines/plugins/prepare_frame",
    ".export": "export", ".calibration": "calibration", ".runtime": "runtime", ".bench": "bench", ".nano": "nano",
}  # fmt: skip

setup(
    packages=[f"ppllava_edge{name}" for name in FOLDERS],
    package_dir={f"ppllava_edge{name}": folder for name, folder in FOLDERS.items()},
)
