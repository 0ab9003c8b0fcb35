"""Ask one image one question, and see what the answer was made from.

python examples/ask.py build/demo-k16 demo/pictures/shapes.png "What color is the large square?"
"""

import sys

from resprune import Pipeline, ResPruneError


def main(bundle: str, image: str, question: str) -> None:
    with Pipeline.load(bundle) as vlm:
        answer = vlm.ask(image, question, max_new_tokens=32)
        print(answer.text)

        (picks,) = answer.images  # one entry for each image
        print(f"keywords: {', '.join(answer.prompt.nouns) or 'the whole question'}")
        print(f"kept {len(picks.pick_order)} visual tokens; picked first: {picks.pick_order[:5].tolist()}")
        for stage, milliseconds in answer.timings.items():
            print(f"{stage}: {milliseconds:.1f} ms")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ResPruneError as error:  # what the user can put right: one line that says how
        sys.exit(f"error: {error}")
