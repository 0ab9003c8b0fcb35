"""OpenAI's own client gets from the server what the pipeline answers."""

import threading
import time
from collections.abc import Callable

import openai
import pytest

from resprune.runtime.prompt.messages import Turn
from tests.serving.conftest import MODEL, QUESTION, Serving, asked, image, png, text, user


def test_an_answer_is_the_pipelines(serving: Serving) -> None:
    answer = serving.pipeline.ask(png(), QUESTION, max_new_tokens=8)
    got = serving.client().chat.completions.create(**asked())
    assert got.object == "chat.completion"
    assert got.model == MODEL
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].message.content == answer.text
    assert got.choices[0].finish_reason == "length"
    assert got.usage is not None
    assert got.usage.prompt_tokens == len(answer.prompt.ids) - 1 + 7, "one image token gives way to 7 rows"
    assert got.usage.completion_tokens == len(answer.token_ids) == 8
    assert got.usage.total_tokens == got.usage.prompt_tokens + 8
    (seen,) = got.resprune["images"]  # type: ignore[attr-defined]
    assert seen == {
        "size": [60, 50],
        "num_tokens": 16,
        "kept_indices": answer.images[0].kept_indices.tolist(),
        "pick_order": answer.images[0].pick_order.tolist(),
    }
    spent = got.resprune["timings"]  # type: ignore[attr-defined]
    stages = {"queue", "encode", "prompt", "vision", "prefill", "decode", "first_token", "total"}
    assert set(spent) == stages
    assert min(spent.values()) >= 0
    assert spent["first_token"] <= spent["total"]


def test_a_stream_is_the_same_answer_in_pieces(serving: Serving) -> None:
    client = serving.client()
    whole = client.chat.completions.create(**asked(max_tokens=30))
    for usage in (True, False):
        options = {"stream_options": {"include_usage": True}} if usage else {}
        chunks = list(client.chat.completions.create(**asked(max_tokens=30, stream=True, **options)))
        assert len({chunk.id for chunk in chunks}) == 1
        with_text = [chunk for chunk in chunks if chunk.choices]
        assert with_text[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in with_text) == (
            whole.choices[0].message.content
        )
        reasons = [chunk.choices[0].finish_reason for chunk in with_text]
        assert reasons == [None] * (len(reasons) - 1) + ["length"]
        assert with_text[0].resprune["images"] == whole.resprune["images"]  # type: ignore[attr-defined]
        assert with_text[-1].resprune["timings"]["total"] > 0  # type: ignore[attr-defined]
        last = chunks[-1]
        assert (last.usage == whole.usage and last.choices == []) if usage else last.choices
        assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_text_alone_is_answered_by_the_language_model(serving: Serving) -> None:
    client = serving.client()
    chat = serving.pipeline.without_images().chat()
    messages = []
    for question in ("hello there", "and now?"):
        expected = chat.ask(question, max_new_tokens=8)
        messages.append({"role": "user", "content": question})
        got = client.chat.completions.create(**asked(messages=messages))
        assert got.choices[0].message.content == expected.text
        assert got.usage is not None
        assert got.usage.prompt_tokens == len(expected.prompt.ids)
        assert got.resprune["images"] == []  # type: ignore[attr-defined]
        messages.append({"role": "assistant", "content": got.choices[0].message.content})
    pieces = client.chat.completions.create(**asked(messages=messages[:3], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == messages[3]["content"]


def test_a_conversation_with_several_images(serving: Serving) -> None:
    """Images may come in any turn, and stand in the prompt where they stand in the message."""
    client = serving.client()
    view = serving.pipeline.look([png(1), png(2)])
    said = Turn("what is it?", "a thing")
    expected = view.ask(QUESTION, history=[said], max_new_tokens=8)
    first = user(image(png(1)), image(png(2)), text(said.question))
    answered = {"role": "assistant", "content": said.answer}
    got = client.chat.completions.create(**asked(messages=[first, answered, user(text(QUESTION))]))
    assert got.choices[0].message.content == expected.text
    seen = got.resprune["images"]  # type: ignore[attr-defined]
    assert [one["pick_order"] for one in seen] == [picks.pick_order.tolist() for picks in expected.images]

    later = [user(image(png(1)), text(said.question)), answered, user(image(png(2)), text(QUESTION))]
    got = client.chat.completions.create(**asked(messages=later))
    assert got.usage is not None
    assert got.usage.prompt_tokens == expected.prompt_tokens
    assert len(got.resprune["images"]) == 2  # type: ignore[attr-defined]

    again = [*later, got.choices[0].message, {"role": "user", "content": "is that so?"}]
    answer = client.chat.completions.create(**asked(messages=again))
    assert answer.choices[0].message.content


def test_text_around_an_image_and_a_system_message(serving: Serving) -> None:
    parts = [text("a square"), image(png()), text("what colour is it?")]
    messages = [{"role": "system", "content": "be short"}, user(*parts)]
    got = serving.client().chat.completions.create(**asked(messages=messages))
    plain = serving.client().chat.completions.create(**asked(messages=messages[1:]))
    assert got.usage is not None
    assert plain.usage is not None
    assert got.usage.prompt_tokens > plain.usage.prompt_tokens
    assert "".join(part["text"] for part in parts if "text" in part) in _prompt(serving, messages).replace(
        "<image>\n", ""
    )
    assert _prompt(serving, messages).count("be short") == 1


def _prompt(serving: Serving, messages: list[dict[str, object]]) -> str:
    converted = [
        {
            "role": message["role"],
            "content": [
                {"type": "image"} if part["type"] == "image_url" else part
                for part in (
                    [text(message["content"])] if isinstance(message["content"], str) else message["content"]  # type: ignore[union-attr]
                )
            ],
        }
        for message in messages
    ]
    return serving.pipeline.look(png()).answer(converted, max_new_tokens=1).prompt.text


def test_sampling(serving: Serving) -> None:
    def answer(**options: object) -> str:
        got = serving.client().chat.completions.create(**asked(max_tokens=20, **options))
        return got.choices[0].message.content or ""

    greedy = answer()
    assert answer(temperature=0) == answer(temperature=2, top_p=1e-6, seed=3) == greedy
    assert answer(temperature=2, seed=1) == answer(temperature=2, seed=1) != answer(temperature=2, seed=2)
    assert answer(temperature=2, seed=-1) == answer(temperature=2, seed=-1)
    expected = serving.pipeline.ask(png(), QUESTION, max_new_tokens=20, temperature=2.0, seed=1)
    assert answer(temperature=2, seed=1) == expected.text


@pytest.mark.parametrize("stream", [True, False])
def test_stop(serving: Serving, stream: bool) -> None:
    client = serving.client()
    whole = client.chat.completions.create(**asked(max_tokens=40)).choices[0].message.content or ""
    stop = [whole[9:12], "never to be seen"]
    body = asked(max_tokens=40, stop=stop)
    if stream:
        chunks = list(client.chat.completions.create(**body, stream=True))
        got = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = client.chat.completions.create(**body).choices[0]
        got, reason = choice.message.content or "", choice.finish_reason
    assert got == whole[: whole.index(whole[9:12])]
    assert reason == "stop"


def test_max_completion_tokens_and_the_context(serving: Serving) -> None:
    client = serving.client()
    body = asked()
    del body["max_tokens"]
    got = client.chat.completions.create(**body, max_completion_tokens=3)
    assert got.usage is not None
    assert got.usage.completion_tokens == 3
    got = client.chat.completions.create(**body)
    assert got.usage is not None
    assert got.usage.total_tokens <= serving.pipeline.manifest.context_length
    assert got.usage.completion_tokens > 64, (
        "unless it is told, an answer is as long as the context lets it be"
    )


def test_the_extension(serving: Serving) -> None:
    extra = {"resprune": {"tokens": 3, "about": ["square"], "boxes": True}}
    got = serving.client().chat.completions.create(**asked(), extra_body=extra)
    expected = serving.pipeline.ask(png(), QUESTION, tokens=3, about=["square"], max_new_tokens=8)
    (seen,) = got.resprune["images"]  # type: ignore[attr-defined]
    order = expected.images[0].pick_order.tolist()
    assert seen["pick_order"] == order
    assert len(order) == 3
    assert seen["boxes"] == [list(serving.pipeline.boxes((60, 50))[index] or ()) for index in order]
    assert got.choices[0].message.content == expected.text


@pytest.mark.parametrize(("tokens", "kept"), [(2, 2), ("2", 2), ("20%", 4), ("12.50001%", 3), ("all", None)])
def test_a_budget_is_a_number_a_share_or_all(serving: Serving, tokens: int | str, kept: int | None) -> None:
    got = serving.client().chat.completions.create(**asked(), extra_body={"resprune": {"tokens": tokens}})
    (seen,) = got.resprune["images"]  # type: ignore[attr-defined]
    assert len(seen["kept_indices"]) == (kept or seen["num_tokens"])
    expected = serving.pipeline.ask(png(), QUESTION, tokens=tokens, max_new_tokens=8)
    assert got.choices[0].message.content == expected.text


def test_models(serving: Serving) -> None:
    client = serving.client()
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "resprune")
    assert model.created > 1_600_000_000
    assert client.models.retrieve(MODEL) == model
    assert model.resprune["k"] == 7  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_the_second_question_about_an_image_costs_no_encoder(serving: Serving) -> None:
    client = serving.client()
    for question in (QUESTION, "is there a circle?", "how many?"):
        client.chat.completions.create(**asked(question))
    client.chat.completions.create(**asked(content=png(1)))
    assert (serving.service.cache.misses, serving.service.cache.hits) == (2, 2)
    assert 0 < serving.service.cache.nbytes < 1 << 20


def test_a_client_that_is_told_429_asks_again(serve: Callable[..., Serving]) -> None:
    serving = serve(parallel=1, queue=0)
    client = serving.client(max_retries=5)
    place = serving.service.workers.admit()
    with pytest.raises(openai.RateLimitError) as raised:
        serving.client().chat.completions.create(**asked())
    assert int(raised.value.response.headers["retry-after"]) >= 1
    assert raised.value.code == "rate_limit_exceeded"
    freeing = threading.Timer(0.5, place.leave)
    start = time.monotonic()
    freeing.start()
    assert client.chat.completions.create(**asked()).choices[0].message.content
    assert time.monotonic() - start > 0.4
    freeing.join()


@pytest.mark.parametrize(
    ("changed", "error", "param", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
        ({"n": 2}, openai.BadRequestError, "n", "unsupported_parameter"),
        ({"logprobs": True}, openai.BadRequestError, "logprobs", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools", "unsupported_parameter"),
        (
            {"response_format": {"type": "json_object"}},
            openai.BadRequestError,
            "response_format",
            "unsupported_parameter",
        ),
        ({"temperature": 2.5}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"extra_body": {"top_k": 3}}, openai.BadRequestError, "top_k", "unknown_parameter"),
        ({"extra_body": {"resprune": {"k": 3}}}, openai.BadRequestError, "resprune.k", "unknown_parameter"),
        ({"extra_body": {"resprune": {"tokens": 8}}}, openai.BadRequestError, "messages", "invalid_value"),
    ],
)
def test_errors_have_openais_form(
    serving: Serving, changed: dict[str, object], error: type[openai.APIStatusError], param: str, code: str
) -> None:
    with pytest.raises(error) as raised:
        serving.client().chat.completions.create(**asked() | changed)
    assert (raised.value.param, raised.value.code) == (param, code)  # type: ignore[attr-defined]
    assert raised.value.type == "invalid_request_error"  # type: ignore[attr-defined]
    said = raised.value.body["message"]  # type: ignore[index]
    assert said.isprintable()
    assert len(said) < 400


def test_what_asks_for_nothing_is_taken(serving: Serving) -> None:
    neutral = {
        "n": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logprobs": False,
        "tools": [],
        "response_format": {"type": "text"},
        "user": "someone",
        "stop": None,
        "seed": None,
    }
    got = serving.client().chat.completions.create(**asked(), extra_body=neutral)
    assert got.choices[0].message.content == serving.pipeline.ask(png(), QUESTION, max_new_tokens=8).text
