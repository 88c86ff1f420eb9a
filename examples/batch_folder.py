"""Answer the same questions about every video below a folder, into JSON Lines. Run it again after a crash: it goes on where it stopped.

python examples/batch_folder.py videos/ answers.jsonl "What color is the circle?" "How many objects are there?"
"""

import json
import sys

from ppllava_edge import PPLLaVAError, VideoQA
from ppllava_edge.runtime.batch import run_batch


def main(folder: str, output: str, *questions: str) -> None:
    qa = VideoQA(cache=True)  # encoded videos are kept on disk: further questions next week cost no decoding
    result = run_batch(
        qa,
        folder,
        questions,
        output,
        progress=lambda video, done, of: print(f"{done}/{of} {video}", file=sys.stderr),
    )
    print(f"{result.answered} answered, {result.failed} failed, {result.skipped} were there already")
    with open(output, encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            print(f"{line['video']}: {line['question']} {line.get('text', line.get('error'))}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except PPLLaVAError as error:
        sys.exit(f"error: {error}")
