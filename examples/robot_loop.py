"""A control loop that must never block: it pushes camera frames and asks questions while steering.

    python examples/robot_loop.py

Pushing a frame takes microseconds: a new frame replaces one that isn't encoded yet. Questions run in asyncio
and end after a timeout. The program measures how late the loop was.
"""

import asyncio
import sys
import time

import numpy as np

from ppllava_edge import BusyError, MediaError, PPLLaVAError, VideoQA
from ppllava_edge.nano.clips import clip_frames, sample_scene_for_the_readme

RATE = 50.0  # control steps a second
SECONDS = 4.0
STEPS_BETWEEN_QUESTIONS = 25
QUESTION = "What color is the circle?"


def camera() -> np.ndarray:
    """Frames of a drawn scene in place of a camera: (T, H, W, 3) RGB uint8."""
    return clip_frames(sample_scene_for_the_readme(), np.random.default_rng(1), frames=int(RATE * 2))


def print_answer(task: asyncio.Task) -> bool:
    """Print a finished question's answer, or why there is none. Returns whether there is one."""
    try:
        print(f"answer: {task.result().text}")
        return True
    except (MediaError, BusyError) as error:  # no frame encoded yet, or too many questions: continue
        print(f"no answer: {error}")
        return False


async def main() -> None:
    frames = camera()
    qa = VideoQA(threads=1)  # leave a core to the robot
    question: asyncio.Task | None = None
    answers = 0
    late = []
    with qa.live(fps=4, window=16) as live:
        started = time.monotonic()
        for step in range(int(RATE * SECONDS)):
            live.push(frames[step % len(frames)])  # never waits
            if question is None and step % STEPS_BETWEEN_QUESTIONS == STEPS_BETWEEN_QUESTIONS - 1:
                question = asyncio.create_task(live.ask_async(QUESTION, last=2, timeout=1.0))
            if question is not None and question.done():
                answers += print_answer(question)
                question = None
            # Here the robot would steer.
            due = started + (step + 1) / RATE
            await asyncio.sleep(max(due - time.monotonic(), 0))
            late.append(max(time.monotonic() - due, 0.0))
        if question is not None:
            await asyncio.wait([question])
            answers += print_answer(question)
    median, high = (1000 * np.percentile(late, share) for share in (50, 99))
    print(f"{answers} answers; the loop was late by {median:.1f} ms (median), {high:.1f} ms (99 %)")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except PPLLaVAError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
