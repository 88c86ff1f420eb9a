"""Push frames from OpenCV (a capture, a simulator, your own pipeline) into a live view.

python examples/opencv_frames.py nano/sample/shapes.mp4 "What color is the circle?"
"""

import sys

from ppllava_edge import PPLLaVAError, VideoQA

try:
    import cv2
except ImportError:
    sys.exit("error: this example needs OpenCV: pip install opencv-python-headless")


def main(source: str, question: str) -> None:
    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    if not capture.isOpened():
        sys.exit(f"error: OpenCV can't open {source}")
    rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
    qa = VideoQA()
    with qa.live(fps=4, window=16, color="bgr") as live:
        number = 0
        while True:
            success, frame = capture.read()
            if not success:
                break
            # wait=True encodes every due frame of a file. With a camera leave it out: the newest frame wins.
            live.push(frame, t=number / rate, wait=True)
            number += 1
        capture.release()
        if not live.wait_for(1, timeout=10):
            sys.exit(f"error: {source} gave no frames")
        print(live.ask(question).text)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:3])
    except PPLLaVAError as error:
        sys.exit(f"error: {error}")
