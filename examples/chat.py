"""Encode an image once, then ask about it several times, and print each answer while it is written.

python examples/chat.py build/demo-k16 demo/pictures/shapes.png "What color is the large square?" "Is there a circle?"
"""

import sys

from resprune import Pipeline


def main(bundle: str, image: str, *questions: str) -> None:
    with Pipeline.load(bundle) as vlm:
        # A bundle of `resprune export --split` encodes here; any other encodes at every question.
        chat = vlm.look(image).chat()
        for question in questions:
            print(f"> {question}")
            answer = chat.ask(question)  # knows what was said before, and selects visual tokens anew
            for piece in answer:
                print(piece, end="", flush=True)
            print(f"\n  ({answer.prompt_tokens} tokens in the prompt)")


if __name__ == "__main__":
    main(*sys.argv[1:])
