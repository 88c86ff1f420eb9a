"""Start a Python process that has the parent's modules and nothing else of it."""

from __future__ import annotations

import json
import multiprocessing.spawn
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ppllava_edge.engines.errors import EngineError

KEPT_VARIABLES = ("LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
# Libraries would reserve address space for each thread, and the memory limit counts it.
OWN_VARIABLES = {"MALLOC_ARENA_MAX": "2", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
# Runs in the child. An error is sent as protocol.Channel does, whose import may be what failed.
BOOTSTRAP = """
import json, os, sys
try:
    path, module, parent = json.loads(sys.argv[1])
    sys.path[:] = path + [entry for entry in sys.path if entry not in path]
    from importlib import import_module
    import_module(module).main(parent)
except BaseException as error:
    text = json.dumps({"type": "error", "text": f"{type(error).__name__}: {error}"[:400]}).encode()
    os.write(0, len(text).to_bytes(4, "big") + text)
    os._exit(1)
"""

_starter: list[ThreadPoolExecutor] = []  # the thread that starts processes, once there is one


def start_python(
    module: str, connection: socket.socket, variables: tuple[str, ...] = ()
) -> subprocess.Popen[bytes]:
    """Start `module.main(this process's id)` in a new Python process.

    Args:
        module: Its name.
        connection: Becomes the child's standard input. The child gets no other open file.
        variables: Environment variables to pass on beside KEPT_VARIABLES.

    Returns:
        The process, in a session of its own: Ctrl-C in a terminal doesn't reach it.

    Raises:
        EngineError: If there is no Python to run.
        OSError: If it can't be started.
    """
    arguments = json.dumps([_import_path(), module, os.getpid()])
    command = [find_python(), "-I", "-B", "-c", BOOTSTRAP, arguments]
    environment = {name: os.environ[name] for name in (*KEPT_VARIABLES, *variables) if name in os.environ}
    # Linux ends a child that asked for it when the parent's *thread* ends that started it: one thread that
    # lives as long as the parent starts all of them.
    if not _starter:
        _starter.append(ThreadPoolExecutor(1, thread_name_prefix="ppllava-isolation"))

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=connection.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**environment, **OWN_VARIABLES},
            start_new_session=True,
        )

    return _starter[0].submit(start).result()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_starter.clear)  # a forked child has no threads


def find_python() -> str:
    """The Python to run: sys.executable, or what the app gave to multiprocessing.set_executable.

    Where sys.executable is missing or is the app itself (frozen, or with Python embedded), the interpreter
    of its Python installation.

    Raises:
        EngineError: If there is none.
    """
    given = os.fsdecode(multiprocessing.spawn.get_executable() or "")
    if given and (given != sys.executable or _is_python(given)):
        return given
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for prefix in dict.fromkeys((sys.exec_prefix, sys.base_exec_prefix)):
        for name in (version, "python3"):
            candidate = str(Path(prefix, "bin", name))
            if _is_python(candidate):
                return candidate
    raise EngineError(
        "isolate=True runs a Python process, and this app has no Python interpreter: "
        "give the path of one to multiprocessing.set_executable"
    )


def _is_python(path: str) -> bool:
    """Whether a file is a Python interpreter, by its name: an app would start itself again."""
    frozen = getattr(sys, "frozen", False) and path == sys.executable
    name = os.path.basename(path).lower()
    return not frozen and name.startswith(("python", "pypy")) and os.access(path, os.X_OK)


def _import_path() -> list[str]:
    """The folders that this process imports from.

    Relative ones are left out: they depend on the current folder, which may hold foreign files by now. The
    folder that this package was imported from is added in their place.
    """
    path = [entry for entry in sys.path if os.path.isabs(entry)]
    home = Path(sys.modules[__name__.partition(".")[0]].__file__ or "").absolute().parent
    if home.name == "ppllava_edge" and str(home.parent) not in path:
        path.append(str(home.parent))
    return path
