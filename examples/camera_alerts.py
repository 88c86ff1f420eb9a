"""Watch a camera, a stream or a file, and print an alert when the answer to a question contains a word.

python examples/camera_alerts.py /dev/video0 "Is somebody at the door?" yes
python examples/camera_alerts.py rtsp://camera/stream "What color is the circle?" red
"""

import sys
import threading

from ppllava_edge import Answer, PPLLaVAError, VideoQA


def main(source: str, question: str, word: str) -> None:
    ended = threading.Event()

    def on_state(state: str, why: str) -> None:  # connecting, playing, reconnecting, ended, closed
        print(f"camera: {state} {why}", file=sys.stderr)
        if state == "ended":
            ended.set()

    def on_answer(answer: Answer) -> None:
        alert = word.lower() in answer.text.lower().split()
        print(f"{'ALERT' if alert else 'ok'}: {answer.text}", flush=True)

    qa = VideoQA()
    with qa.live(source, fps=4, on_state=on_state) as live:
        # Ask every half second about the last 10 seconds; call on_answer only when the answer changes.
        watch = live.watch(question, every=0.5, on_answer=on_answer, last=10, changes_only=True)
        ended.wait()  # a camera never ends: stop with Ctrl-C
        watch.stop()
        if live.wait_for(
            1, timeout=5
        ):  # a file's last frames arrive after the last question, so ask once more
            on_answer(live.ask(question, last=10))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:4])
    except PPLLaVAError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
