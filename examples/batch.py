"""Ask the same question about many images, a few at a time: fewer, larger steps of the language model.

python examples/batch.py build/demo-k16 "How many objects are there?" demo/pictures/*.png
"""

import sys

from resprune import Pipeline

BATCH_SIZE = 4  # the KV caches of a batch are in memory together


def main(bundle: str, question: str, *images: str) -> None:
    with Pipeline.load(bundle) as vlm:
        for start in range(0, len(images), BATCH_SIZE):
            batch = images[start : start + BATCH_SIZE]
            for image, answer in zip(batch, vlm.ask_batch(batch, [question] * len(batch)), strict=True):
                print(f"{image}: {answer.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
