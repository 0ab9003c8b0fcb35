"""Training's own forward pass computes what the Hugging Face model computes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from demo.forward import question_states, visual_tokens  # noqa: E402


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


def test_visual_tokens(model: LlavaForConditionalGeneration) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
        torch.testing.assert_close(visual_tokens(model, pixels), expected, rtol=1e-4, atol=1e-5)


def test_each_question_sees_the_picture_and_itself(model: LlavaForConditionalGeneration) -> None:
    prefix = torch.randn(2, 7, 48)
    asked = torch.randint(5, 99, (2, 3, 6))
    with torch.no_grad():
        states = question_states(model, prefix, asked)
        for picture in range(2):
            for question in range(3):
                words = model.get_input_embeddings()(asked[picture, question])
                alone = torch.cat([prefix[picture], words])[None]
                expected = model.model.language_model(inputs_embeds=alone).last_hidden_state
                torch.testing.assert_close(states[picture, question], expected[0, 7:], rtol=1e-4, atol=1e-5)
