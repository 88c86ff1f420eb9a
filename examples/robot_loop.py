"""A control loop that must never block: it pushes camera frames and asks questions, and goes on while the answer is being made.

    python examples/robot_loop.py

Pushing a frame takes microseconds (a newer one replaces one that wasn't encoded yet); asking happens in asyncio; a question that takes too long ends as it
is. The loop measures by how much it was late.
"""

import asyncio
import time

import numpy as np

from ppllava_edge import BusyError, MediaError, VideoQA
from ppllava_edge.nano.clips import clip_frames, sample_scene_for_the_readme

RATE = 50.0  # control steps a second
SECONDS = 4.0


def camera() -> np.ndarray:
    """Frames of a drawn scene in the place of a camera: (T,H,W,3) RGB uint8."""
    return clip_frames(sample_scene_for_the_readme(), np.random.default_rng(1), frames=int(RATE * 2))


async def main() -> None:
    frames, qa = camera(), VideoQA(threads=1)  # leave a core to the robot
    question: asyncio.Task | None = None
    late, answers = [], 0
    with qa.live(fps=4, window=16) as live:
        began = time.monotonic()
        for step in range(int(RATE * SECONDS)):
            live.push(frames[step % len(frames)])  # never waits
            if question is None and step % 25 == 24:
                question = asyncio.create_task(
                    live.ask_async("What color is the circle?", last=2, timeout=1.0)
                )
            if question is not None and question.done():
                try:
                    print(f"{time.monotonic() - began:.2f} s: {question.result().text}")
                    answers += 1
                except (
                    MediaError,
                    BusyError,
                ) as error:  # nothing seen yet, or too much asked: a robot goes on
                    print(f"no answer: {error}")
                question = None
            due = began + (step + 1) / RATE  # … here the robot would steer …
            await asyncio.sleep(max(due - time.monotonic(), 0))
            late.append(max(time.monotonic() - due, 0.0))
        if question is not None:
            await question
    late.sort()
    print(
        f"{answers} answers; the loop was late by {1000 * late[len(late) // 2]:.1f} ms (median), {1000 * late[int(0.99 * len(late))]:.1f} ms (99 %)"
    )


if __name__ == "__main__":
    asyncio.run(main())
