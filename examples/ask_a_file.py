"""Ask a video file several questions: it is decoded and encoded once.

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
        for piece in stream:
            print(piece, end="", flush=True)
        answer = stream.answer
        when = ", ".join(f"{m.seconds:.1f} s" for m in answer.moments)
        print(
            f"\n    {1000 * answer.timings['first_token']:.0f} ms to the first token; looked mostly at {when}"
        )


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except PPLLaVAError as error:
        sys.exit(f"error: {error}")
