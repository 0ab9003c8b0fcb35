"""A family with planes, spans, protected and attached rows goes the whole way, though no other code knows its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from resprune.evaluation.answers import Answers, Run
from resprune.evaluation.checkpoint import open_checkpoint
from resprune.evaluation.data import DataSet, Question
from resprune.evaluation.evaluate import SELECTORS, Plan, evaluate, pick
from resprune.evaluation.model import Model, open_bundle
from resprune.evaluation.towers import early_names
from resprune.exporter.checkpoint.checkpoint import resolve
from resprune.exporter.checkpoint.weightless import fake_mode
from resprune.exporter.export import export
from resprune.exporter.language import Rows
from resprune.exporter.options import EarlyRequest, Options
from resprune.exporter.tensorrt.engines import build
from resprune.exporter.verify.difference import ParityError
from resprune.exporter.verify.reference import select
from resprune.method import Selection
from resprune.runtime.answer import Answer
from resprune.runtime.backends.backend import Embedding
from resprune.runtime.backends.session import OrtGraphs, SessionOptions
from resprune.runtime.budget import Budget
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.preprocessor import PreparedImage
from resprune.runtime.pipeline import Pipeline
from resprune.runtime.walk import Encoded, Features, Walk
from tests import synthetic_family as synthetic
from tests import traces
from tests.runtime.gpu_stand_in import stand_in_for
from tests.runtime.pipelines import OTHER, QUESTION
from tests.traces import Make

K = 11
ALWAYS = [0, 5, 4, 6, 10, 11, 15]  # those that are protected, and the one that is attached to row 5
STEPS = 20
QUESTIONS = (QUESTION, OTHER)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Iterator[Path]:
    with synthetic.registered():
        yield tiny_checkpoint(synthetic.NAME)


@pytest.fixture
def made(checkpoint: Path, tiny_bundle: Callable[..., Path]) -> Callable[..., Path]:
    """Fields of `Options` → the bundle exported with them."""
    return partial(tiny_bundle, synthetic.NAME, k=K)


@pytest.fixture(scope="module")
def in_pytorch(checkpoint: Path) -> Model:
    return open_checkpoint(str(checkpoint))


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> synthetic.Oracle:
    return synthetic.Oracle(checkpoint)


@pytest.mark.parametrize(
    "options",
    [
        {"split": True},
        {"split": True, "optimize": "ort", "attention": "proportional"},
        {"dtype": "fp16", "optimize": "ort"},
        {"dtype": "bf16", "split": True},
        {"dtype": "int8", "attention": "proportional"},
        {"dtype": "q4", "verify": "layers"},
        {"verify": "layers", "attention": "proportional"},
    ],
    ids=str,
)
def test_every_kind_of_export_is_verified(made: Callable[..., Path], options: dict[str, Any]) -> None:
    bundle = read_bundle(made(**options))
    parity = bundle.manifest.parity
    exact = options.get("dtype", "fp32") == "fp32"
    compared = {Path(graph.file).stem: name for name, graph in bundle.manifest.graphs.items()}
    outputs = {compared[stem]: names for stem, names in parity["outputs"].items()}
    assert {"image_features", "plane_features.0", "plane_features.1"} <= outputs["vision_select"].keys()
    if options.get("split"):
        assert "plane_features.1" in outputs["vision_encoder"]
        assert {"kept_planes.0", "kept_planes.1"} <= outputs["token_select"].keys()
    if options.get("verify") == "layers":
        assert parity["layers"] == [0, 1, 3]
    elif exact:
        assert parity["greedy_tokens"] == "32/32"


@pytest.mark.parametrize("verify", ["full", "layers"])
def test_planes_in_each_other_s_place_are_found(
    made: Callable[..., Path], made_once: Make, monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    added = Rows.added
    monkeypatch.setattr(Rows, "added", lambda rows, model, planes: added(rows, model, planes[::-1]))
    with (
        traces.kept(lambda name, write: made_once(f"swapped-{name}", write)),
        pytest.raises(ParityError, match="decoder_model_merged"),
    ):
        made(verify=verify, alpha=0.5)


def test_the_graphs_say_what_they_take(made: Callable[..., Path]) -> None:
    graphs = read_bundle(made(split=True)).manifest.graphs
    decoder = {tensor.name: tensor for tensor in graphs["decoder_model_merged"].inputs}
    assert decoder["plane_embeds.1"].shape == ("batch_size", "sequence_length", 64)
    assert decoder["plane_embeds.1"].dtype == "float32"
    protected = [tensor for tensor in graphs["token_select"].inputs if tensor.name == "protected_mask"]
    assert [(tensor.dtype, tensor.shape) for tensor in protected] == [("bool", ("batch_size", "num_tokens"))]
    attached = [tensor for tensor in graphs["token_select"].inputs if tensor.name == "attached_to"]
    assert [(tensor.dtype, tensor.shape) for tensor in attached] == [("int64", ("batch_size", "num_tokens"))]
    assert {"protected_mask", "attached_to"} <= {tensor.name for tensor in graphs["vision_select"].inputs}
    assert [tensor.name for tensor in graphs["vision_encoder"].inputs] == ["pixel_values"]
    selected = [tensor.name for tensor in graphs["token_select"].outputs]
    assert selected == ["kept_features", "kept_indices", "pick_order", "kept_planes.0", "kept_planes.1"]


def test_each_plane_counts_where_it_is_added(made: Callable[..., Path]) -> None:
    """The decoder's answer depends on both, and on which is which."""
    bundle = read_bundle(made(split=True))
    session = onnxruntime.InferenceSession(bundle.graph_path("decoder_model_merged"))
    generator = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        value.name: np.zeros([1, value.shape[1], 0, value.shape[3]], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    rows, planes = generator.standard_normal((1, 5, 64)), generator.standard_normal((2, 1, 5, 64))
    feeds["inputs_embeds"] = rows.astype(np.float32)
    feeds["attention_mask"], feeds["position_ids"] = np.ones((1, 5), np.int64), np.arange(5)[None]

    def logits(*planes: Any) -> Any:
        more = {f"plane_embeds.{index}": plane.astype(np.float32) for index, plane in enumerate(planes)}
        return session.run(["logits"], feeds | more)[0]

    zero = np.zeros_like(planes[0])
    answers = [logits(*planes), logits(zero, planes[1]), logits(planes[0], zero), logits(*planes[::-1])]
    for index, answer in enumerate(answers):
        assert all(abs(answer - other).max() > 1e-2 for other in answers[:index])


def image(seed: int) -> Any:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.repeat(np.repeat(blocks, 12, axis=0), 12, axis=1)


def check(vlm: Pipeline, oracle: synthetic.Oracle, answer: Answer, seeds: list[int], k: int = K) -> None:
    """Picks and tokens of an answer about images are PyTorch's."""
    shown = [vlm._walk.preprocessor(Image.fromarray(image(seed))) for seed in seeds]
    prompt = answer.prompt
    assert prompt.ids.count(vlm.manifest.image_token_id) == len(synthetic.SPANS) * len(seeds)
    orders, tokens = oracle.answer(
        [one.arrays["pixel_values"] for one in shown],
        prompt.ids,
        prompt.text_token_ids,
        k,
        vlm.manifest.positions,
        STEPS,
        proportional=vlm.manifest.selection.counts,
    )
    assert [picks.pick_order.tolist() for picks in answer.images] == orders
    assert answer.token_ids == tokens
    assert len(set(tokens)) > 5, "a model that repeats itself shows nothing"
    for picks in answer.images:
        kept = picks.pick_order.tolist()
        assert kept[: len(ALWAYS)] == ALWAYS[: len(kept)]
        for row, owner in enumerate(synthetic.ATTACHED_TO):
            assert owner < 0 or (row in kept) == (owner in kept)


@pytest.mark.parametrize(
    "options",
    [
        {"split": True},
        {"positions": "original", "split": True},
        {"split": True, "optimize": "ort", "attention": "proportional"},
    ],
    ids=str,
)
def test_answers_are_those_of_pytorch(
    made: Callable[..., Path], oracle: synthetic.Oracle, options: dict[str, Any]
) -> None:
    """Asked, looked at once and asked twice, in a conversation, in a batch; one image and two."""
    settings: Any = {"max_new_tokens": STEPS}
    with Pipeline.load(made(**options)) as vlm:
        check(vlm, oracle, vlm.ask(image(0), QUESTIONS[0], stream=False, **settings), [0])
        for k in (9, 2):
            fewer = vlm.ask(image(1), QUESTIONS[1], tokens=k, stream=False, **settings)
            check(vlm, oracle, fewer, [1], k)
        assert fewer.images[0].pick_order.tolist() == [0], "the next two go together"
        check(vlm, oracle, vlm.ask([image(2), image(3)], QUESTIONS[0], stream=False, **settings), [2, 3])
        chat = vlm.look(image(4)).chat()
        for question in QUESTIONS:
            check(vlm, oracle, chat.ask(question, **settings).finish(), [4])
        shown = [[5], [6, 7], [8]]
        asked = [QUESTIONS[0], QUESTIONS[1], "why?"]
        batch = vlm.ask_batch([[image(seed) for seed in seeds] for seeds in shown], asked, **settings)
        for answer, seeds in zip(batch, shown, strict=True):
            check(vlm, oracle, answer, seeds)


def test_images_of_different_sizes_are_selected_together(made: Callable[..., Path]) -> None:
    """As each alone: what is said of the tokens of one says nothing of what stands behind them in its row."""
    bundle = read_bundle(made(split=True))
    graphs = OrtGraphs(bundle, SessionOptions())
    walk = Walk(bundle, graphs, Embedding(graphs))
    rng = np.random.default_rng(0)
    encoded, text, budgets = [], [], [K, K, 4]
    for count, protected, attached in ((6, [5], {0: 5}), (16, [1, 2], {3: 2, 15: 7, 6: 7}), (9, None, None)):
        rules: dict[str, Any] = {}
        if protected is not None and attached is not None:
            rules["protected"] = np.isin(np.arange(count), protected)
            rules["attached_to"] = np.array([attached.get(row, -1) for row in range(count)])
        prepared = replace(PreparedImage.one_span({}, np.arange(count), count), **rules)
        rows, *planes, words = rng.standard_normal((4, count, 64)).astype(np.float32)
        encoded.append(Encoded(prepared, Features(rows, tuple(planes))))
        text.append(words[:3])
    together = walk.select(encoded, text, budgets)
    for kept, one, *asked in zip(together, encoded, text, budgets, strict=True):
        (alone,) = walk.select([one], *([part] for part in asked))
        assert kept.picks.pick_order.tolist() == alone.picks.pick_order.tolist()
        np.testing.assert_array_equal(kept.planes[1], one.tokens.planes[1][kept.picks.kept_indices])
    orders = [kept.picks.pick_order.tolist() for kept in together]
    assert orders[0][:2] == [5, 0]
    assert sorted(orders[0]) == list(range(6))
    assert orders[1][:3] == [1, 2, 3]
    assert len(orders[2]) == 4


def test_evaluation_of_the_bundle_and_of_the_checkpoint(made: Callable[..., Path], in_pytorch: Model) -> None:
    """Both give the answers of the pipeline, at the bundle's K and unpruned."""
    root = made(split=True)
    models = [open_bundle(root), in_pytorch]
    for k in (K, synthetic.NUM_TOKENS):
        texts = []
        for model in models:
            encoded = [model.look([image(seed)])[0] for seed in (0, 1)]
            asked = [
                model.read(question, [one.image.expansion])
                for question, one in zip(QUESTIONS, encoded, strict=True)
            ]
            kept = [
                model.select(*pair, k) if k == K else np.arange(k)
                for pair in zip(encoded, asked, strict=True)
            ]
            texts.append(model.answer(asked, [[one] for one in encoded], [[order] for order in kept], STEPS))
        assert texts[0] == texts[1]
        if k == K:
            with Pipeline.load(root) as vlm:
                for index, text in enumerate(texts[0]):
                    assert vlm.ask(image(index), QUESTIONS[index], max_new_tokens=STEPS).text == text
        else:
            assert len(set(texts[0])) == 2


@pytest.mark.parametrize("selector", SELECTORS)
def test_every_selector_keeps_the_protected_rows_and_whole_groups(in_pytorch: Model, selector: str) -> None:
    """First what is protected, whatever the selector, then as much as it picks: rivals are compared at one budget."""
    (encoded,) = in_pytorch.look([image(0)])
    asked = in_pytorch.read(QUESTION, [encoded.image.expansion])
    to = synthetic.ATTACHED_TO
    for k in (1, 2, 7, K, synthetic.NUM_TOKENS):
        picks = pick(
            in_pytorch, Run("", selector, str(k), 0), Budget.parse(str(k)), encoded, asked, 0
        ).tolist()
        assert picks[: len(ALWAYS)] == ALWAYS[: 1 if k == 2 else k]
        assert len(set(picks)) == len(picks) <= k
        assert all(owner < 0 or (row in picks) == (owner in picks) for row, owner in enumerate(to))
        assert len(picks) >= min(k - 2, synthetic.NUM_TOKENS), "at most a group of three is left out"


def test_selectors_in_numpy_group_as_the_reference_does(in_pytorch: Model) -> None:
    """Pick for pick, whatever is protected and attached, at every budget."""
    (encoded,) = in_pytorch.look([image(0)])
    asked = in_pytorch.read(QUESTION, [encoded.image.expansion])
    rng = np.random.default_rng(0)
    for k in range(1, synthetic.NUM_TOKENS + 1):
        to, protected = np.full(synthetic.NUM_TOKENS, -1), rng.random(synthetic.NUM_TOKENS) < 0.2
        attached = rng.permutation(synthetic.NUM_TOKENS)[: rng.integers(10)]
        to[attached] = rng.choice(np.setdiff1d(np.arange(synthetic.NUM_TOKENS), attached), len(attached))
        one = replace(encoded, image=replace(encoded.image, protected=protected, attached_to=to))
        picks = pick(in_pytorch, Run("", "no-text", str(k), 0), Budget(k), one, asked, 0)
        rows, *rules = (torch.from_numpy(array)[None] for array in (one.tokens.rows, protected, to))
        _, order = select(rows, rows[:, :0], None, Selection(k=k, alpha=0.0), None, *rules)
        assert picks.tolist() == [row for row in order[0].tolist() if row >= 0]


@pytest.mark.parametrize(
    "options", [{"split": True}, {"split": True, "optimize": "ort", "attention": "proportional"}]
)
def test_an_image_of_which_nothing_is_kept(made: Callable[..., Path], options: dict[str, Any]) -> None:
    """As where the first group has no room: the question is answered all the same."""
    model = open_bundle(made(**options))
    (encoded,) = model.look([image(0)])
    asked = model.read(QUESTION, [encoded.image.expansion])
    texts = [model.answer([asked], [[encoded]], [[np.arange(count)]], STEPS) for count in (0, 9)]
    assert texts[0] != texts[1]
    assert texts[0] != [""]


def test_a_selection_inside_its_tower_is_refused(checkpoint: Path, in_pytorch: Model, tmp_path: Path) -> None:
    """By the exporter, and by the evaluation before another selector is asked for; nothing is left on disk."""
    says = "--early would drop tokens of the synthetic family that are protected or attached"
    with pytest.raises(ResPruneError, match=says):
        export(str(checkpoint), tmp_path / "out", Options(k=K, early="1:9"), lambda line: None)
    data = DataSet("mine", "", (Question(0, "shown", lambda: image(0), QUESTION, ("red",)),))
    plan = Plan([data], ["random", *early_names(["1:9"])], [Budget(4)])
    answers = Answers(tmp_path, plan.settings(in_pytorch))
    with pytest.raises(ResPruneError, match=says):
        evaluate(in_pytorch, plan, answers)
    answers.close()
    assert not any(tmp_path.iterdir())
    components = synthetic.split_model(resolve(str(checkpoint)), torch.float32, fake_mode())
    with pytest.raises(ResPruneError, match="--early is not built for the vision tower of the synthetic"):
        EarlyRequest.parse("1:9").of(
            replace(components, protected=None, attached_to=None), synthetic.FAMILY.title
        )


def test_engines(made: Callable[..., Path], tmp_path: Path) -> None:
    """TensorRT takes every graph; planes, protected and attached rows have their bounds in the profiles."""
    pytest.importorskip("tensorrt_rtx")
    root = Path(shutil.copytree(made(split=True), tmp_path / "bundle"))
    build(root, "tensorrt-rtx", ["sm_86"], report=lambda line: None)
    bundle = read_bundle(root)
    (engines,) = bundle.manifest.engines.values()
    assert engines.graphs.keys() == bundle.manifest.graphs.keys()
    for engine in engines.graphs.values():
        assert bundle.file_path(engine.file).stat().st_size > 1000


def test_engines_answer_as_onnxruntime(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder's engine is fed the planes at prefill, and zeros at the steps after it."""
    place = stand_in_for(monkeypatch)
    root = Path(shutil.copytree(made(split=True), tmp_path / "bundle"))
    place.equip(root)
    said = []
    for engines in (None, place.flavour):
        with Pipeline.load(root, engines=engines) as vlm:
            answers = vlm.ask_batch([image(0), [image(1), image(2)]], list(QUESTIONS), max_new_tokens=STEPS)
            said.append([answer.token_ids for answer in answers])
    assert said[0] == said[1]
