"""Try several budgets on one image, with keywords of your own, and draw the visual tokens that were kept.

python examples/keywords.py build/demo-k16 demo/pictures/shapes.png "What color is the large square?" square kept.png
"""

import sys

from PIL import Image

from resprune import Pipeline
from resprune.runtime.drawing import draw_kept

BUDGETS = (4, "5%", None)  # a number, a share of the image's tokens, the bundle's own K


def main(bundle: str, image: str, question: str, keyword: str, drawing: str) -> None:
    with Pipeline.load(bundle) as vlm, Image.open(image) as opened:
        view = vlm.look(opened)
        for tokens in BUDGETS:
            answer = view.ask(question, about=[keyword], tokens=tokens)
            (picks,) = answer.images
            print(f"{len(picks.pick_order)} of {view.num_tokens[0]} visual tokens: {answer.text}")
        boxes = vlm.boxes(opened.size)
        draw_kept(opened, boxes, picks.pick_order.tolist(), question, answer.text).save(drawing)
        print(f"drawn: {drawing}")


if __name__ == "__main__":
    main(*sys.argv[1:])
