"""Watch a camera, a stream or a file as it happens, and speak up when the answer to a question changes to a word that matters.

python examples/camera_alerts.py /dev/video0 "Is somebody at the door?" yes
python examples/camera_alerts.py rtsp://camera/stream "What color is the circle?" red
"""

import sys
import threading

from ppllava_edge import Answer, PPLLaVAError, VideoQA


def main(source: str, question: str, word: str, fps: float = 4.0) -> None:
    qa, over = VideoQA(), threading.Event()

    def on_state(state: str, why: str) -> None:
        print(f"camera: {state} {why}", file=sys.stderr)
        if state == "ended":
            over.set()

    def on_answer(answer: Answer) -> None:
        alert = word.lower() in answer.text.lower().split()
        print(f"{'ALERT' if alert else 'ok'}: {answer.text}", flush=True)

    with qa.live(source, fps=fps, on_state=on_state) as live:
        watch = live.watch(question, every=0.5, on_answer=on_answer, last=10, changes_only=True)
        over.wait()  # Ctrl-C ends it too
        watch.stop()
        if live.wait_for(1, 5):
            on_answer(live.ask(question, last=10))  # the last frames were encoded meanwhile


if __name__ == "__main__":
    try:
        main(*sys.argv[1:4])
    except (PPLLaVAError, KeyboardInterrupt) as error:
        sys.exit(f"error: {error}" if str(error) else 130)
