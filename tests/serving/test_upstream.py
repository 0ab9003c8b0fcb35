"""In front of a server such as vLLM: the image is encoded and pruned here, and the language model answers there."""

from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from resprune import Pipeline
from resprune.runtime.backends.servers import server
from tests.runtime.wire import Fault, Model, Wire
from tests.serving.conftest import QUESTION, Serving, asked, png


def test_the_answer_is_the_bundles(
    serve: Callable[..., Serving], bundle: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    with Wire(Model(tiny_checkpoint("clip-llama"))) as wire:
        client = serve(server(wire.url)).client()
        with Pipeline.load(bundle) as near:
            here = near.ask(png(), QUESTION, max_new_tokens=8, stream=False)
        extra = {"resprune": {"tokens": 3, "about": ["square"]}}
        there = client.chat.completions.create(**asked())
        assert there.choices[0].message.content == here.text
        assert there.choices[0].finish_reason == here.finish_reason
        assert there.usage.prompt_tokens == here.prompt_tokens
        assert there.usage.completion_tokens == len(here.token_ids)
        kept = here.images[0].pick_order.tolist()
        assert there.resprune["images"][0]["pick_order"] == kept
        pieces = client.chat.completions.create(**asked(stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == here.text
        fewer = client.chat.completions.create(**asked(), extra_body=extra)
        assert there.usage.prompt_tokens - fewer.usage.prompt_tokens == len(kept) - 3
        assert [path for path, _, _ in wire.seen] == ["/v1/chat/completions"] * 3
        wire.fault = Fault(after=2, cut=True)
        with pytest.raises(openai.APIError):
            list(client.chat.completions.create(**asked(stream=True)))
        wire.fault = None
        assert client.chat.completions.create(**asked()).choices[0].message.content == here.text
    with pytest.raises(openai.InternalServerError, match="cannot be reached") as gone:
        client.chat.completions.create(**asked())
    assert gone.value.status_code == 502
