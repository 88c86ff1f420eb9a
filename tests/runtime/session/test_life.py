"""A VideoQA's life in an app: forks, closing, warming up, what it holds in memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.commands import SAMPLE

FORK = f"""
import gc, os, sys, traceback
from ppllava_edge import EngineError, VideoQA

qa = VideoQA(device="cpu")
video = qa.open({str(SAMPLE)!r})
video.ask("What color is the circle?")
live = qa.live(None)
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    assert video.ask("What color is the circle?").text == "red"
    sys.exit(os.waitstatus_to_exitcode(status))
calls = {{
    "open": lambda: qa.open({str(SAMPLE)!r}),
    "live": lambda: qa.live(None),
    "push": lambda: live.push(None),
    "live video": lambda: live.video(),
    "ask": lambda: video.ask("What color is the circle?"),
    "stream": lambda: next(video.stream("What color is the circle?")),
    "attention": lambda: video.attention("What color is the circle?"),
    "similarity": lambda: video.similarity("What color is the circle?"),
}}
wrong = []
for name, call in calls.items():
    try:
        call()
        wrong.append(name)
    except EngineError as error:
        if "forked" not in str(error) or "\\n" in str(error):
            wrong.append((name, error))
    except BaseException:
        traceback.print_exc()
        wrong.append(name)
print(wrong)
del qa, video, live, calls, call
gc.collect()  # destroys no engine: that would crash without its threads
sys.stdout.flush()
os._exit(1 if wrong else 7)
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
def test_a_forked_child_is_told_to_load_its_own() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 7, (run.returncode, run.stdout, run.stderr)
