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

from benchmarks.measure import THREADS, Samples, peak_megabytes, reset_peak
from benchmarks.stages import every_token
from resprune.exporter.reference import keep, residual_select, text_gain
from resprune.runtime.bundle import Bundle, read_bundle
from resprune.runtime.families import family_of
from resprune.runtime.image import load_image
from resprune.runtime.picture import Picture
from resprune.runtime.prompt import Prompter
from resprune.runtime.splice import KeptTokens, cut_picks, splice


class HuggingFace:
    """A checkpoint in transformers; `attention` is its name there, `dtype` torch's."""

    def __init__(self, checkpoint: Path, bundle: Bundle, attention: str, dtype: torch.dtype) -> None:
        torch.set_num_threads(THREADS)
        self.bundle = bundle
        self.prompter = Prompter(bundle)
        self.processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        self.model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation=attention
        ).eval()
        self.dtype = dtype

    def pixels(self, picture: Path) -> dict[str, Tensor]:
        """What the model's encoder takes."""
        inputs = self.processor(images=load_image(picture), return_tensors="pt")
        return {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in inputs.items()
        }

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """All tokens [N, D] of the picture."""
        features: Tensor = self.model.model.get_image_features(**inputs).pooler_output[0]
        return features

    def embed(self, ids: Tensor) -> Tensor:
        """Rows [S, D] of the input table."""
        embeds: Tensor = self.model.get_input_embeddings()(ids)
        return embeds

    def select(self, picture: Picture, features: Tensor, text: Tensor, k: int) -> KeptTokens:
        """The reference's choice of `k` of `features` [N, D] for `text` [M, D]."""
        selection = self.bundle.manifest.selection
        gain = text_gain(features[None], text[None], alpha=selection.alpha, scale=selection.scale)
        order = residual_select(features[None], gain, k)
        rows, indices = keep(features[None], order)
        return cut_picks(
            rows[0].float().numpy(),
            indices[0].numpy(),
            order[0].numpy(),
            None,
            picture.offsets,
            picture.advance,
        )

    def forward(self, embeds: Tensor, positions: Tensor, cache: DynamicCache) -> int:
        """The token after `embeds` [1, S, D]; the head sees the last position only, as in `generate`."""
        hidden = self.model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return int(self.model.lm_head(hidden[:, -1:])[0, -1].argmax())

    def decode(self, token: int, position: Tensor, cache: DynamicCache, steps: int) -> None:
        """`steps` tokens after `token`, which stands at `position`."""
        for step in range(steps):
            token = self.forward(self.embed(torch.tensor([[token]])), position + step, cache)


@torch.inference_mode()
def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """As `stages.measure`; `spec` has `checkpoint`, `attention`, `dtype` and `budgets` besides, and no selectors."""
    bundle = read_bundle(spec["bundle"], check_hashes=False)
    model = HuggingFace(Path(spec["checkpoint"]), bundle, spec["attention"], getattr(torch, spec["dtype"]))
    places = family_of(bundle).preprocessor(bundle)(load_image(Path(spec["picture"])))
    samples = Samples()
    tokens: dict[str, int] = {}
    memory: dict[str, float] = {}
    for turn in range(spec["repeats"] + 1):
        warm_up = turn == 0
        clock = Samples() if warm_up else samples
        with clock.time("pixels"):
            inputs = model.pixels(Path(spec["picture"]))
        with clock.time("encode"):
            features = model.encode(inputs)
        with clock.time("prompt"):
            prompt = model.prompter.prompt(spec["question"], 1)
            ids = torch.tensor(prompt.ids)
            embeds = model.embed(ids)
        for k in [*sorted(spec["budgets"])[: 1 if warm_up else None], *([] if warm_up else [None])]:
            name = "all" if k is None else str(k)
            reset_peak()
            with clock.time("select", name):
                kept = (
                    every_token(places, features.float().numpy())
                    if k is None
                    else model.select(places, features, embeds[prompt.text_positions], k)
                )
            with clock.time("prefill", name):
                spliced = splice(
                    [embeds.float().numpy()],
                    [prompt.ids],
                    [[kept]],
                    image_token_id=bundle.manifest.image_token_id,
                    positions=bundle.manifest.positions,
                )
                cache = DynamicCache()
                positions = torch.from_numpy(spliced.position_ids)
                first = model.forward(
                    torch.from_numpy(spliced.inputs_embeds).to(model.dtype), positions, cache
                )
            with clock.time("decode", name):
                model.decode(first, positions[..., -1:] + 1, cache, spec["steps"])
            memory[name] = peak_megabytes()
            tokens[name] = spliced.inputs_embeds.shape[1]
    return {
        "samples": samples.values,
        "steps": spec["steps"],
        "memory": memory,
        "prompt tokens": tokens,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    print(json.dumps(measure(json.loads(sys.argv[1]))))
