"""Answer the same questions about every video below a folder, as JSON Lines.

python examples/batch_folder.py videos/ answers.jsonl "What color is the circle?" "How many objects?"

Run it again after an interruption: it skips questions that the output already answers.
"""

import json
import sys

from ppllava_edge import PPLLaVAError, VideoQA
from ppllava_edge.runtime.batch import run_batch


def show_progress(video: str, done: int, total: int) -> None:
    print(f"{done}/{total} {video}", file=sys.stderr)


def main(folder: str, output: str, *questions: str) -> None:
    # With cache=True encoded videos stay on disk, so further questions need no decoding, even weeks later.
    qa = VideoQA(cache=True)
    result = run_batch(qa, folder, questions, output, progress=show_progress)
    print(f"{result.answered} answered, {result.failed} failed, {result.skipped} were there already")
    with open(output, encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            answer = line["text"] if "text" in line else line["error"]
            print(f"{line['video']}: {line['question']} {answer}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except PPLLaVAError as error:
        sys.exit(f"error: {error}")
