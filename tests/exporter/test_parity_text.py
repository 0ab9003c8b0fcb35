"""A conversation without images is answered as the checkpoint's language model answers it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from resprune import Pipeline, ResPruneError

STEPS = 30
# One of each way to number positions and to feed the decoder; the bundles are other tests' as well.
BUNDLES: dict[str, dict[str, Any]] = {
    "clip-llama": {"k": 7, "split": True},  # positions from 0, one axis
    "qwen25": {"share": 0.4},  # M-RoPE
    "qwen3": {"share": 1.0, "split": True},  # planes, which are zero here
}


@pytest.mark.parametrize("variant", BUNDLES)
@torch.no_grad()
def test_text_alone(
    variant: str, tiny_bundle: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(variant), dtype=torch.float32)
    with Pipeline.load(tiny_bundle(variant, **BUNDLES[variant])) as vlm:
        view = vlm.without_images()
        assert view.num_tokens == view.budgets() == view.budgets("11%") == []
        chat = view.chat()
        answers = [
            chat.ask(question, max_new_tokens=STEPS, min_new_tokens=STEPS, stream=False)
            for question in ("what colour is the square on the table?", "and is it a large one?")
        ]
        for answer in answers:
            ids = torch.tensor([answer.prompt.ids])
            expected = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=STEPS,
                min_new_tokens=STEPS,
                do_sample=False,
            )
            assert answer.token_ids == expected[0, ids.shape[1] :].tolist()
            assert (answer.images, answer.prompt_tokens) == ([], ids.shape[1])
            assert len(set(answer.token_ids)) > 5, "a model that repeats itself shows nothing"
        assert answers[0].text.strip() in answers[1].prompt.text
        with pytest.raises(ResPruneError, match="there is no image; give at least one"):
            vlm.ask([], "what is it?")  # most often a mistake: the paths that were looked for are not there
