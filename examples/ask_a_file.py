"""Ask several questions about a video file. It is decoded and encoded once.

python examples/ask_a_file.py nano/sample/shapes.mp4 "What color is the circle?" "Describe the video."
"""

import sys

from ppllava_edge import PPLLaVAError, VideoQA


def main(path: str, *questions: str) -> None:
    qa = VideoQA()  # the packed demonstration model; VideoQA("path/to/bundle") for a real one
    video = qa.open(path)
    for question in questions:
        print(f"{question} ", end="", flush=True)
        stream = video.stream(question)
        for piece in stream:  # text, as it is generated
            print(piece, end="", flush=True)
        answer = stream.answer
        milliseconds = 1000 * answer.timings["first_token"]
        moments = ", ".join(f"{moment.seconds:.1f} s" for moment in answer.moments)
        print(f"\n    {milliseconds:.0f} ms to the first token; most relevant frames: {moments}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except PPLLaVAError as error:  # the base class of all errors: the message is one clear line
        sys.exit(f"error: {error}")
