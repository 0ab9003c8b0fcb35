"""Hugging Face in PyTorch, with and without pruning: `python -m benchmarks.hugging_face SPEC` prints JSON.

Pruned, it is the reference selection between the model's own encoder and its own language model, with the prompt and
the positions of the runtime: what someone writes who adds ResPrune to transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, DynamicCache

from benchmarks.measure import THREADS, sample_stages
from resprune.exporter.verify.reference import residual_select, text_gain
from resprune.runtime.bundle.files import Bundle, read_bundle
from resprune.runtime.families.image import load_image
from resprune.runtime.families.table import family_of
from resprune.runtime.prompt.prompter import Prompt, Prompter
from resprune.runtime.prompt.splice import KeptTokens, keep, keep_all, splice


class HuggingFace:
    """A checkpoint in transformers; `attention` is its name there, `dtype` torch's."""

    def __init__(
        self, checkpoint: Path, bundle: Bundle, picture: Path, attention: str, dtype: torch.dtype
    ) -> None:
        torch.set_num_threads(THREADS)
        self.manifest = bundle.manifest
        self.prompter = Prompter(bundle)
        self.places = family_of(bundle).preprocessor(bundle)(load_image(picture))
        self.processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        self.model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation=attention
        ).eval()
        self.dtype = dtype
        self.cache = DynamicCache()
        self.position = torch.empty(0)

    def pixels(self, picture: Path) -> dict[str, Tensor]:
        """What the model's encoder takes."""
        inputs = self.processor(images=load_image(picture), return_tensors="pt")
        return {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in inputs.items()
        }

    def encode(self, pixels: dict[str, Tensor]) -> Tensor:
        """All tokens [N, D] of the picture."""
        features: Tensor = self.model.model.get_image_features(**pixels).pooler_output[0]
        return features

    def prompt(self, question: str) -> tuple[Prompt, Tensor]:
        """The runtime's prompt, and its rows [S, D] of the input table."""
        prompt = self.prompter.prompt(question, 1)
        return prompt, self.embed(torch.tensor(prompt.ids))

    def select(
        self, pixels: dict[str, Tensor], features: Tensor, prompt: tuple[Prompt, Tensor], k: int | None
    ) -> KeptTokens:
        """The reference's choice of `k` of `features` [N, D], or all of them."""
        if k is None:
            return keep_all(self.places, features.float().numpy())
        text = self.embed(torch.tensor(prompt[0].text_token_ids))
        selection = self.manifest.selection
        gain = text_gain(features[None], text[None], alpha=selection.alpha, scale=selection.scale)
        order = residual_select(features[None], gain, k)
        return keep(self.places, features.float().numpy(), order[0].numpy())

    def prefill(self, prompt: tuple[Prompt, Tensor], kept: KeptTokens) -> tuple[int, int]:
        """The length of the prompt, and the first token."""
        ids, embeds = prompt[0].ids, prompt[1]
        spliced = splice(
            [embeds.float().numpy()],
            [ids],
            [[kept]],
            image_token_id=self.manifest.image_token_id,
            positions=self.manifest.positions,
        )
        self.cache = DynamicCache()
        positions = torch.from_numpy(spliced.position_ids)
        self.position = torch.from_numpy(spliced.following)
        first = self.forward(torch.from_numpy(spliced.inputs_embeds).to(self.model.dtype), positions)
        return spliced.inputs_embeds.shape[1], first

    def decode(self, token: int, steps: int) -> None:
        """`steps` tokens after `token`."""
        for step in range(steps):
            token = self.forward(self.embed(torch.tensor([[token]])), self.position + step)

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the input table."""
        embeds: Tensor = self.model.get_input_embeddings()(ids)
        return embeds

    def forward(self, embeds: Tensor, positions: Tensor) -> int:
        """The token after `embeds` [1, S, D]; the head sees the last position only, as in `generate`."""
        hidden = self.model.get_decoder()(
            inputs_embeds=embeds, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        return int(self.model.lm_head(hidden[:, -1:])[0, -1].argmax())


@torch.inference_mode()
def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """As `sample_stages`; `spec` has `checkpoint`, `bundle`, `attention`, `dtype` and `budgets` besides."""
    bundle = read_bundle(spec["bundle"], check_hashes=False)
    picture, dtype = Path(spec["picture"]), getattr(torch, spec["dtype"])
    model = HuggingFace(Path(spec["checkpoint"]), bundle, picture, spec["attention"], dtype)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {**sample_stages(model, spec, spec["budgets"]), "versions": versions}


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    print(json.dumps(measure(json.loads(sys.argv[1]))))
