"""Answers over the wire are the local ones, token for token; what goes wrong on the way is one sentence."""

import base64
import io
import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resprune import Pipeline, ResPruneError
from resprune.runtime.backends.http_client import Exchange
from resprune.runtime.backends.servers import APIS, KEY_VARIABLE, server
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.cli import main
from resprune.runtime.options import SERVER_FORMATS
from resprune.runtime.prompt.splice import Floats
from tests.runtime.pipelines import QUESTION, picture, with_manifest
from tests.runtime.wire import Fault, Model, Wire

DEMO = Path(__file__).parents[2] / "demo"
QUESTIONS = ("What color is the large square?", "How many objects are there?", "Is there a circle?")
STEPS = 24


@pytest.fixture(scope="module")
def demo_model() -> Model:
    return Model(DEMO / "model")


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle("clip-llama", k=7, split=True)


def remote(bundle: Path, wire: Wire, **options: Any) -> Pipeline:
    return Pipeline.load(bundle, generator=server(wire.url, **options))


@pytest.mark.parametrize("api", ["vllm", "trtllm"])
def test_the_demo_answers_over_the_wire_as_it_does_here(
    demo_bundle: Path, demo_model: Model, api: str
) -> None:
    photo = DEMO / "pictures" / "shapes.png"
    with Wire(demo_model) as wire, remote(demo_bundle, wire, api=api) as far:
        near = Pipeline.load(demo_bundle)
        for question in QUESTIONS:
            here, there = near.ask(photo, question), far.ask(photo, question)
            assert there.text == here.text
            assert there.finish_reason == here.finish_reason == "stop"
            assert there.token_ids == (here.token_ids if api == "vllm" else [])
            assert [p.pick_order.tolist() for p in there.images] == [
                p.pick_order.tolist() for p in here.images
            ]
        chat = [vlm.look(photo).chat() for vlm in (near, far)]
        for question in QUESTIONS:
            here, there = (side.ask(question) for side in chat)
            assert there.text == here.text
    assert {path for path, _, _ in wire.seen} == {"/v1/chat/completions"}
    assert {body["model"] for _, _, body in wire.seen} == {"the-model"}


@pytest.mark.parametrize("api", ["vllm", "trtllm"])
@pytest.mark.parametrize(("limit", "longest"), [(3, 9), (9, 3)])
def test_an_answer_that_was_cut_says_so(
    bundle: Path, tiny_model: Model, api: str, limit: int, longest: int
) -> None:
    """At the limit that was asked for, or at one of the server's own."""
    with Wire(tiny_model, longest=longest) as wire, remote(bundle, wire, api=api) as vlm:
        answer = vlm.ask(picture(1), QUESTION, max_new_tokens=limit)
        assert answer.text
        assert answer.finish_reason == "length"


def test_the_local_decoder_is_not_opened(
    demo_bundle: Path, demo_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resprune.runtime.backends import onnxruntime

    def opened(*_: object) -> None:
        raise AssertionError("the decoder was opened")

    monkeypatch.setattr(onnxruntime, "OrtDecoder", opened)
    with Wire(demo_model) as wire, remote(demo_bundle, wire) as vlm:
        assert "decoder_model_merged" not in vlm._graphs._sessions
        assert vlm.ask(DEMO / "pictures" / "shapes.png", QUESTIONS[0]).text == "black"


def test_streamed_tokens_several_pictures_and_batches(bundle: Path, tiny_model: Model) -> None:
    images = [picture(1), [picture(2), picture(3)], picture(4)]
    questions = [
        QUESTION,
        "how many?",
        "is the small red circle left of the large green square on the table?",
    ]
    near = Pipeline.load(bundle)
    with Wire(tiny_model) as wire, remote(bundle, wire) as far:
        here = near.ask_batch(images, questions, tokens=4, max_new_tokens=STEPS)
        there = far.ask_batch(images, questions, tokens=4, max_new_tokens=STEPS)
        assert [answer.token_ids for answer in there] == [answer.token_ids for answer in here]
        assert len({tuple(answer.token_ids) for answer in here}) == 3, "shows nothing"
        assert len(wire.seen) == 3
        streamed = far.ask(picture(1), QUESTION, max_new_tokens=STEPS)
        assert list(streamed) == list(near.ask(picture(1), QUESTION, max_new_tokens=STEPS))
        assert list(streamed.timings) == ["pixels", "prompt", "vision", "prefill", "decode"]


def test_an_answer_comes_while_it_is_written(bundle: Path, tiny_model: Model) -> None:
    with (
        Wire(tiny_model, fault=Fault(after=6, silent=True)) as wire,
        remote(bundle, wire, timeout=1.5) as vlm,
    ):
        answer = vlm.ask(picture(1), QUESTION, max_new_tokens=STEPS)
        pieces = iter(answer)
        assert next(pieces)
        assert len(answer._row.token_ids) < 6
        with pytest.raises(ResPruneError, match=r"silent for 1\.5 seconds"):
            list(pieces)


def test_an_answer_nobody_reads_hangs_up(
    bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left in its middle or before its first piece, dropped or closed."""
    hung_up: list[Exchange] = []
    close = Exchange.close

    def closed(exchange: Exchange) -> None:
        hung_up.append(exchange)
        close(exchange)

    with Wire(tiny_model, fault=Fault(after=6, silent=True)) as wire, remote(bundle, wire) as vlm:
        monkeypatch.setattr(Exchange, "close", closed)
        for begun in (True, False):
            for how in (lambda answer: answer.close(), lambda answer: None):
                answer = vlm.ask(picture(1), QUESTION, max_new_tokens=STEPS)
                if begun:
                    next(iter(answer))
                before = len(hung_up)
                how(answer)
                del answer
                assert len(hung_up) == before + 1
                assert hung_up[-1]._connection.sock is None


@pytest.mark.parametrize("variant", ["next-llama"])
def test_pictures_of_any_size(
    tiny_bundle: Callable[..., Path], tiny_checkpoint: Callable[[str], Path], variant: str
) -> None:
    bundle = tiny_bundle(variant, k=88, split=True)
    near = Pipeline.load(bundle)
    with Wire(Model(tiny_checkpoint(variant))) as wire, remote(bundle, wire) as far:
        for size in ((60, 50), (20, 110)):
            here, there = (
                vlm.ask(picture(1, size), QUESTION, tokens=20, max_new_tokens=STEPS) for vlm in (near, far)
            )
            assert there.token_ids == here.token_ids


@pytest.mark.parametrize("incremental", [False, True])
def test_sglang_gets_the_true_positions(tiny_qwen: tuple[Path, Model], incremental: bool) -> None:
    bundle, model = tiny_qwen
    near = Pipeline.load(bundle)
    images = [picture(1, (70, 50)), picture(2, (30, 120))]
    with Wire(model, incremental=incremental) as wire, remote(bundle, wire, api="sglang") as far:
        for shown in (images[0], images):
            here, there = (vlm.ask(shown, QUESTION, max_new_tokens=STEPS) for vlm in (near, far))
            assert there.token_ids == here.token_ids
            assert there.text == here.text
            assert len(set(here.token_ids)) > 5, "shows nothing"
        wire.longest = 3
        assert far.ask(images[0], QUESTION, max_new_tokens=STEPS).finish_reason == "length"
    assert {path for path, _, _ in wire.seen} == {"/generate"}
    positions = np.array(wire.seen[0][2]["image_data"][0]["mrope_positions"])
    assert (positions[1] != positions[2]).any(), "shows nothing"


def test_sampling_reaches_the_server(bundle: Path, tiny_model: Model) -> None:
    with Wire(tiny_model) as wire, remote(bundle, wire) as vlm:
        hot = {"temperature": 1.5, "top_p": 0.9, "max_new_tokens": 9}
        answers = [vlm.ask(picture(1), QUESTION, **hot, seed=seed).token_ids for seed in (1, 1, 2)]
        vlm.ask(picture(1), QUESTION, max_new_tokens=3, stream=False)
    assert answers[0] == answers[1] != answers[2]
    bodies = [body for _, _, body in wire.seen]
    sent = {"max_tokens": 9, "temperature": 1.5, "top_p": 0.9, "seed": 1, "stream": True}
    assert sent.items() <= bodies[0].items()
    assert bodies[-1]["max_tokens"] == 3
    assert bodies[-1]["temperature"] == 0
    assert "seed" not in bodies[-1]


def test_every_setting_is_said_so_that_the_server_fills_none_in(bundle: Path, tiny_model: Model) -> None:
    neutral = {"top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0}
    set_here = {"top_k": 7, "min_p": 0.2, "repetition_penalty": 1.05, "min_new_tokens": 2}
    with Wire(tiny_model) as wire, remote(bundle, wire) as vlm:
        vlm.ask(picture(1), QUESTION, max_new_tokens=2, stream=False)
        vlm.ask(picture(1), QUESTION, max_new_tokens=2, temperature=0.5, **set_here, stream=False)
        with pytest.raises(ResPruneError, match="vLLM has no no_repeat_ngram_size, and it is 3 here"):
            vlm.ask(picture(1), QUESTION, no_repeat_ngram_size=3)
        with pytest.raises(ResPruneError, match="--suppress-tokens"):
            vlm.ask(picture(1), QUESTION, suppress_tokens=(9,))
    plain, changed = (body for _, _, body in wire.seen)
    assert neutral.items() <= plain.items()
    assert {"top_k": 7, "min_p": 0.2, "repetition_penalty": 1.05, "min_tokens": 2}.items() <= changed.items()


def test_rows_are_sent_as_float16_only_where_nothing_is_lost(
    bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resprune.runtime import walk

    def sent(body: dict[str, Any]) -> torch.Tensor:
        data = body["messages"][0]["content"][0]["image_embeds"]
        tensor: torch.Tensor = torch.load(io.BytesIO(base64.b64decode(data)), weights_only=True)
        return tensor

    cut = walk.cut_picks

    def halved(of: Any, rows: Floats, *rest: Any) -> Any:
        return cut(of, rows.astype(np.float16).astype(np.float32), *rest)

    with Wire(tiny_model) as wire, remote(bundle, wire) as vlm:
        vlm.ask(picture(1), QUESTION, max_new_tokens=1, stream=False)
        monkeypatch.setattr(walk, "cut_picks", halved)
        vlm.ask(picture(1), QUESTION, max_new_tokens=1, stream=False)
    whole, half = (sent(body) for _, _, body in wire.seen)
    assert (whole.dtype, half.dtype) == (torch.float32, torch.float16)
    assert torch.equal(whole.half(), half)


def test_a_key_is_sent_only_if_there_is_one(
    bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Wire(tiny_model) as wire:
        remote(bundle, wire).ask(picture(1), QUESTION, max_new_tokens=1, stream=False)
        for key in ("secret", "secret\n", " \n"):  # as a file that the shell reads it from may end
            monkeypatch.setenv(KEY_VARIABLE, key)
            remote(bundle, wire).ask(picture(1), QUESTION, max_new_tokens=1, stream=False)
    sent = [headers.get("Authorization") for _, headers, _ in wire.seen]
    assert sent == [None, "Bearer secret", "Bearer secret", None]


@pytest.mark.parametrize("key", ["schlüssel", "ключ", "two\nlines"])
def test_a_key_that_no_header_can_carry(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ResPruneError, match=f"{KEY_VARIABLE} should be printable ASCII; set it") as raised:
        server("http://host")
    assert key not in str(raised.value)


MESSAGE = "You must set `--enable-mm-embeds` to input `image_embeds`"
FAULTS = {
    "refusal": (
        Fault(status=400, body=json.dumps({"error": {"message": MESSAGE, "type": "BadRequestError"}})),
        f"refused with status 400: {MESSAGE}",
    ),
    "detail": (Fault(status=422, body='{"detail": [{"msg": "Field required"}]}'), "status 422: .*Field required"),
    "page": (Fault(status=502, body="<html>\n  <b>Bad Gateway</b></html>"), "status 502: <html> <b>Bad Gateway"),
    "nothing": (Fault(status=503), "status 503: Service Unavailable"),
    "silence": (Fault(silent=True), r"silent for 1\.5 seconds"),
    "cut": (Fault(cut=True), "cut its answer off|broke"),
    "garbage": (Fault(event="data: {no json\n\n"), "which is not what such a server says"),
    "list": (Fault(event="data: [1]\n\n"), "which is not what such a server says"),
    "other": (Fault(event='data: {"choices": [{"text": "x"}]}\n\n'), r"not one of vLLM's \(KeyError: 'delta'\)"),
    "error": (Fault(event='data: {"error": {"message": "out of\\nmemory"}}\n\n'), "gave up the answer: out of memory"),
    "prompt": (Fault(event='data: {"choices": [], "prompt_token_ids": [1]}\n\n'), "makes another prompt"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_server_is_one_sentence(bundle: Path, tiny_model: Model, name: str) -> None:
    fault, sentence = FAULTS[name]
    patience = 1.5 if fault.silent else 60
    with Wire(tiny_model, fault=fault) as wire, remote(bundle, wire, timeout=patience) as vlm:
        with pytest.raises(ResPruneError, match=sentence) as raised:
            vlm.ask(picture(1), QUESTION, max_new_tokens=STEPS, stream=False)
        assert "\n" not in str(raised.value)
        assert len(wire.seen) == 1, "only connecting is tried again"
        wire.fault = None
        assert vlm.ask(picture(1), QUESTION, max_new_tokens=3).token_ids


def test_connecting_is_tried_again(bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import http.client

    from resprune.runtime.backends import http_client

    pauses: list[float] = []
    monkeypatch.setattr(http_client, "sleep", pauses.append)
    connect = http.client.HTTPConnection.connect
    with Wire(tiny_model) as wire:
        vlm = remote(bundle, wire, model="the-model")

        def late(connection: http.client.HTTPConnection) -> None:
            if len(pauses) < 2:
                raise ConnectionRefusedError(111, "Connection refused")
            connect(connection)

        monkeypatch.setattr(http.client.HTTPConnection, "connect", late)
        assert len(vlm.ask(picture(1), QUESTION, max_new_tokens=3).token_ids) == 3
        assert pauses == [0.25, 0.5]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ResPruneError, match=r"cannot be reached \(Connection refused\); check the address"):
        Pipeline.load(bundle, generator=server(url))


def test_a_server_that_would_get_positions_wrong_is_refused(
    bundle: Path, tiny_qwen: tuple[Path, Model], tmp_path: Path
) -> None:
    nowhere = "http://127.0.0.1:9"  # nothing is sent
    for api, title in (("vllm", "vLLM"), ("trtllm", "TensorRT-LLM")):
        with pytest.raises(
            ResPruneError, match=rf"{title} numbers the visual tokens of Qwen2\.5-VL by the image's grid"
        ):
            Pipeline.load(tiny_qwen[0], generator=server(nowhere, api=api))
    with pytest.raises(ResPruneError, match=r"SGLang lays out the visual tokens of LLaVA-1\.5"):
        Pipeline.load(bundle, generator=server(nowhere, api="sglang"))
    with pytest.raises(ResPruneError, match="exported with --positions original; export it again"):
        Pipeline.load(with_manifest(bundle, tmp_path, positions="original"), generator=server(nowhere))
    counting = replace(read_bundle(bundle).manifest.selection, counts=True)
    weighing = with_manifest(bundle, tmp_path / "weighing", selection=counting)
    with pytest.raises(ResPruneError, match=r"vLLM attends to every row alike, .* with --attention plain"):
        Pipeline.load(weighing, generator=server(nowhere))
    with (
        Wire(None, version="0.5.22.post1") as wire,
        pytest.raises(ResPruneError, match=r"runs SGLang 0\.5\.22"),
    ):
        Pipeline.load(tiny_qwen[0], generator=server(wire.url, api="sglang"))


@pytest.mark.parametrize("models", [[], ["a", "b"]])
def test_which_model_must_be_clear(bundle: Path, models: list[str]) -> None:
    with Wire(None, models=models) as wire, pytest.raises(ResPruneError, match=f"has {len(models)} models"):
        Pipeline.load(bundle, generator=server(wire.url))


@pytest.mark.parametrize(
    ("url", "options", "sentence"),
    [
        ("localhost:8000", {}, "is not the address of a server; give one like http"),
        ("http://host:port", {}, "not the address"),
        ("http://", {}, "not the address"),
        ("http://a..b:8000", {}, "not the address"),
        (f"http://{'a' * 64}", {}, "not the address"),
        ("http://h h:8000", {}, "not the address"),
        ("http://host/ä", {}, "not the address"),
        ("http://host/\n", {}, "not the address"),
        ("http://host", {"timeout": 0}, "time-out should be above 0 and at most 86,400 seconds, not 0"),
        ("http://host", {"timeout": 1e30}, "at most 86,400 seconds"),
        ("http://host", {"timeout": float("nan")}, "time-out should be a finite number"),
        ("http://host", {"api": "tgi"}, "api should be one of vllm, trtllm, sglang, not str 'tgi'"),
    ],
)
def test_wrong_settings_are_one_sentence(url: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ResPruneError, match=sentence):
        server(url, **options)


def test_ask_takes_a_server(
    bundle: Path, tiny_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((60, 50)).convert("RGB").save(photo)
    words = ["ask", str(bundle), str(photo), QUESTION, "--max-new-tokens", "12"]
    assert main(words) == 0
    here = capsys.readouterr().out
    with Wire(tiny_model, models=["a", "b"]) as wire:
        assert main([*words, "--server", wire.url, "--server-model", "b"]) == 0
        assert capsys.readouterr().out == here
        assert wire.seen[0][2]["model"] == "b"
        assert main([*words, "--server", wire.url, "--server-model", "c"]) == 2
        assert capsys.readouterr().err.endswith("status 400: The model `c` does not exist.\n")
        arguments = ["--server", wire.url, "--server-model", "a", "--server-format", "sglang"]
        assert main([*words, *arguments]) == 2
        assert "SGLang lays out" in capsys.readouterr().err
    assert tuple(APIS) == SERVER_FORMATS
    assert main([*words, "--server-timeout", "5"]) == 2
    assert "--server-timeout is for --server" in capsys.readouterr().err
