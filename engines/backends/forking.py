"""What becomes of an engine in a forked child: it is kept and never used.

A child has the engine's memory, but not its threads. Destroying the engine there, when the app drops its
VideoQA, would crash or wait for those threads for ever. (ONNX Runtime's own exit handlers wait too, from its
import on: end such a child with os._exit, as multiprocessing does.)
"""

from __future__ import annotations

import ctypes
import os
import weakref

_engines: weakref.WeakSet[object] = weakref.WeakSet()


def keep_in_children(engine: object) -> None:
    """Never destroy this object in a forked child. It may be destroyed in this process as any other."""
    _engines.add(engine)


def _keep_all() -> None:
    for engine in list(_engines):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))  # a reference that nobody gives back


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_all)
