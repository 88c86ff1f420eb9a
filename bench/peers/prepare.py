"""Input of the measurements: a random checkpoint, its bundles, graphs for OpenVINO, a file for llama.cpp."""

from __future__ import annotations

import sys
from pathlib import Path

from ppllava_edge.bench.full_shape import write_test_video
from ppllava_edge.bench.measuring.child_process import ChildError, run_json, run_shown
from ppllava_edge.bench.models.random_checkpoint import SHAPES, write_random_checkpoint
from ppllava_edge.bench.peers.plain_vision import write_plain_vision
from ppllava_edge.engines.errors import PPLLaVAError

OPENVINO = Path(__file__).with_name("openvino_vision.py")
LLAMA_CPP = Path(__file__).with_name("llama_cpp_decoder.py")
OPENVINO_PACKAGES = {"numpy": "numpy", "openvino": "openvino"}
LLAMA_CPP_PACKAGES = {
    "numpy": "numpy",
    "gguf": "gguf",
    "llama_cpp": "llama-cpp-python",
    "safetensors": "safetensors",
}
BUNDLES = {  # name → options of ppllava-export
    "fp32": ["--precision", "fp32", "--engine"],
    "int8": ["--precision", "int8", "--calibration-frames", "2", "--allow-drift", "--calibrate"],
    "int4": ["--precision", "int4"],
    "int4-128": ["--precision", "int4", "--block", "128"],
}
FIND_MISSING = """
import importlib.util, json, sys
print(json.dumps({"missing": [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]}))
"""


def check_packages(python: str, packages: dict[str, str]) -> None:
    """Check that another Python has the packages of a peer, before hours are spent on preparing its input.

    Args:
        python: The interpreter.
        packages: Module → the package that it comes with.

    Raises:
        PPLLaVAError: If a package is missing or the interpreter doesn't run.
    """
    try:
        missing = run_json([python, "-c", FIND_MISSING, *packages])["missing"]
    except ChildError as error:
        raise PPLLaVAError(f"{python} doesn't run: {error.reason}") from None
    except OSError as error:
        raise PPLLaVAError(f"{python} doesn't run: {error.strerror}") from None
    if missing:
        install = " ".join(packages[name] for name in missing)
        raise PPLLaVAError(f"{python} lacks {', '.join(missing)}: {python} -m pip install {install}")


def prepare(folder: Path, llama_python: str | None) -> tuple[Path, dict[str, Path]]:
    """Create every input that the folder lacks.

    Args:
        folder: Folder for all inputs. An existing checkpoint in it, of any shape, is used.
        llama_python: A Python with llama.cpp; None: nothing is converted for it.

    Returns:
        The checkpoint, and paths by name: bundles "fp32", "int8", "int4" (blocks of 32) and "int4-128";
        graphs "plain-fp32" and "plain-int8" for OpenVINO; "gguf" for llama.cpp.

    Raises:
        PPLLaVAError: If an export or a conversion fails.
    """
    checkpoint, clip = folder / "checkpoint", folder / "clips" / "noise.mp4"
    if not (checkpoint / "config.json").exists():
        write_random_checkpoint(checkpoint, SHAPES["vit-l-336"])
    clip.parent.mkdir(parents=True, exist_ok=True)
    if not clip.exists():
        write_test_video(clip)
    paths = {}
    for name, options in BUNDLES.items():
        paths[name] = folder / f"peer-{name}"
        if not paths[name].exists():
            if "--calibrate" in options:
                options = [*options, str(clip.parent)]
            export = [
                sys.executable,
                "-m",
                "ppllava_edge.export.cli",
                str(checkpoint),
                "-o",
                str(paths[name]),
            ]
            run_shown([*export, *options])
    for name in ("fp32", "int8"):
        plain = paths[f"plain-{name}"] = folder / f"plain-{name}.onnx"
        if not plain.exists():
            write_plain_vision(paths[name] / "trunk.onnx", plain)
    if llama_python:
        paths["gguf"] = folder / "decoder.gguf"
        if not paths["gguf"].exists():
            run_shown([llama_python, str(LLAMA_CPP), "convert", str(checkpoint), str(paths["gguf"])])
    return checkpoint, paths
