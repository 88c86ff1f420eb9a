"""The layout: folders at the top of the repository install as sub-packages of ppllava_edge.

Metadata stands in pyproject.toml.
"""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
FOLDERS = {
    "ppllava_edge": "api",
    **{
        f"ppllava_edge.{name}": name
        for name in ("engines", "export", "calibration", "runtime", "bench", "nano")
    },
}


def packages() -> list[str]:
    """Every folder with an __init__.py below FOLDERS, as the dotted name it installs under."""
    found = []
    for name, folder in FOLDERS.items():
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            found.append(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    return found


setup(packages=packages(), package_dir=FOLDERS)
