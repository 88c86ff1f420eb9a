"""What a model's threads and locks do when the process exits or was forked. Each case is a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.commands import SAMPLE

OPENED = f"""
import asyncio, os, sys, threading
import numpy as np
from ppllava_edge import EngineError, VideoQA

QUESTION = "Describe the video."
qa = VideoQA(device="cpu", parallel=1)
video = qa.open({str(SAMPLE)!r})
stream = video.stream(QUESTION)
next(stream)
"""

BLOCKED_CALLBACK = """
live, called = qa.live(None), threading.Event()
live.push(np.zeros((64, 64, 3), np.uint8))
stream.close()

def wait_for_ever(answer):
    called.set()
    threading.Event().wait()  # as for a main thread that has ended

live.watch(QUESTION, every=0.01, on_answer=wait_for_ever)
assert called.wait(60)
"""

LEFT_IN_AN_EVENT_LOOP = """
loop = asyncio.new_event_loop()
task = loop.create_task(video.ask_async(QUESTION))  # waits for the slot of the stream

async def until_it_waits():
    while not qa.admission.waiting:
        await asyncio.sleep(0.005)

loop.run_until_complete(until_it_waits())
loop.close()
task._log_destroy_pending = False  # asyncio's own warning
"""

FORKED = """
stream.close()
live, go_on = qa.live(None), threading.Event()
stream = video.stream(QUESTION)
next(stream)
locks = [live.window._lock, live._state._changed, live._encoder._slot._changed, qa._life]
locks += [qa.admission._lock, qa.engine_lock._lock]
held = threading.Event()

def hold():  # as another thread that is inside at the moment of the fork
    for lock in locks:
        lock.acquire()
    held.set()
    go_on.wait()
    for lock in locks:
        lock.release()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if child:
    go_on.set()
    thread.join()
    _, status = os.waitpid(child, 0)
    assert len(list(stream)) > 3 and live.status.state == "playing"
    sys.exit(os.waitstatus_to_exitcode(status))
calls = [lambda: next(stream), stream.exhaust, qa.memory, lambda: live.status, lambda: live.wait_for(1)]
for call in calls:
    try:
        call()
        os._exit(1)
    except EngineError as error:
        if "forked" not in str(error):
            os._exit(2)
stream.close()
del stream
live.close()
qa.close()
os._exit(7)
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script that begins with an opened video and a stream that holds the only slot."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OPENED + script], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("left_open", [BLOCKED_CALLBACK, LEFT_IN_AN_EVENT_LOOP])
def test_a_process_exits_whatever_its_threads_wait_for(left_open: str) -> None:
    ended = run(left_open)
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_waits_for_no_lock_of_its_parents_threads() -> None:
    ended = run(FORKED)
    assert ended.returncode == 7, (ended.returncode, ended.stderr)
