"""Choose the pipeline that runs a bundle on this machine: resident on a GPU, or over numpy arrays."""

from __future__ import annotations

import os

from ppllava_edge.engines.backends.onnxruntime_stage import has_cuda_provider
from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.errors import EngineError
from ppllava_edge.engines.machine.gpu_facts import load_driver
from ppllava_edge.engines.targets.select import ON_CPU, check_name, select
from ppllava_edge.runtime.pipeline.base import BasePipeline
from ppllava_edge.runtime.pipeline.cpu import CpuPipeline


class Pipeline(BasePipeline):
    """The model's stages, one call each (listed in BasePipeline). Use `open` to create one."""

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str],
        device: str = "cpu",
        threads: int | None = None,
        engine: str = "auto",
    ) -> BasePipeline:
        """Open and check a bundle directory.

        Args:
            bundle: A directory that ppllava-export wrote, or "nano", the packed demonstration model.
            device: auto | cpu | cuda.
            threads: CPU threads of the engine; None: one per core.
            engine: auto (the fastest that is built and fits), onnxruntime, tensorrt, rtx, standard (the
                bundle's own graphs), or the name of a folder below engines/.

        Returns:
            The pipeline; isinstance(it, Pipeline) holds.

        Raises:
            BundleError: If the bundle is damaged or isn't one; in one line.
            EngineError: If the device or the engine isn't available; in one line.
        """
        return open_pipeline(Bundle.open(bundle), device, threads, engine)


Pipeline.register(CpuPipeline)


def open_pipeline(
    bundle: Bundle, device: str = "cpu", threads: int | None = None, engine: str = "auto"
) -> BasePipeline:
    """The pipeline of an opened bundle, on a GPU if there is one and an engine for it.

    Raises:
        EngineError: If the device or the engine isn't available; in one line.
    """
    check_name(engine)
    if device in ("auto", "cuda") and engine not in (*ON_CPU, "standard"):
        if load_driver() is not None:
            chosen, _ = select(bundle, "cuda", engine)
            if chosen is not None and (chosen.library != "onnxruntime" or has_cuda_provider()):
                from ppllava_edge.runtime.pipeline.gpu import GpuPipeline

                Pipeline.register(GpuPipeline)
                return GpuPipeline(bundle, chosen, threads)
        elif engine not in ("auto", "onnxruntime"):
            raise EngineError(
                f"engine={engine} needs an NVIDIA GPU, and no driver was found on this machine; "
                "ppllava-doctor says what is missing"
            )
    return CpuPipeline(bundle, device, threads, engine)
