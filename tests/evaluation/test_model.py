"""Stages that run apart give the answers of the whole: the pipeline's for a bundle, Hugging Face's in PyTorch."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import resprune
from resprune.evaluation.checkpoint import open_checkpoint
from resprune.evaluation.model import code, engine, open_bundle
from resprune.runtime.budget import Budget
from resprune.runtime.bundle.files import describe_file, read_bundle, write_manifest
from resprune.runtime.errors import ResPruneError
from resprune.runtime.generate import TextStream
from resprune.runtime.pipeline import Pipeline
from tests.exporter.hugging_face import HuggingFace, with_positions
from tests.exporter.hugging_face_qwen import HuggingFaceQwen
from tests.runtime.pipelines import OTHER, QUESTION
from tests.tiny_qwen import VARIANTS
from tests.tiny_qwen import write_checkpoint as write_qwen

ASKED = [QUESTION, OTHER]
STEPS = 12


def picture(seed, height=4, width=5):
    blocks = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.repeat(np.repeat(blocks, 10, axis=0), 10, axis=1)


def answers(model, pictures, k):
    """Answers to ASKED, each about its own picture, in one batch, and the picks."""
    encoded = [model.look([shown])[0] for shown in pictures]
    asked = [model.read(question) for question in ASKED]
    kept = [model.select(*pair, k) for pair in zip(encoded, asked, strict=True)]
    return model.answer(asked, [[one] for one in encoded], [[order] for order in kept], STEPS), kept


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_a_bundle_answers_as_its_pipeline(bundle, positions, tmp_path):
    pictures = [picture(0), picture(1)]
    model = open_bundle(bundle, positions=positions)
    with Pipeline.load(with_positions(bundle, tmp_path / "bundle", positions)) as vlm:
        for k in (3, 16):
            texts, kept = answers(model, pictures, k)
            for question, shown, text, order in zip(ASKED, pictures, texts, kept, strict=True):
                whole = vlm.ask(shown, question, tokens=k, max_new_tokens=STEPS)
                assert text == whole.text
                assert order.tolist() == whole.images[0].pick_order.tolist()


@pytest.mark.parametrize(
    ("variant", "options", "size"), [("next-llama", {"k": 88}, (12, 3)), ("qwen25", {"share": 1.0}, (4, 14))]
)
def test_a_bundle_of_pictures_of_any_size_answers_as_its_pipeline(variant, options, size, tiny_bundle):
    """Of different numbers of tokens, in one batch, and a share of each."""
    path = tiny_bundle(variant, split=True, **options)
    pictures = [picture(0, 5, 7), picture(1, *size)]
    model, budget = open_bundle(path), Budget.parse("20%")
    encoded = [model.look([shown])[0] for shown in pictures]
    asked = [model.read(question) for question in ASKED]
    counts = [budget.of(one.image.num_tokens) for one in encoded]
    assert counts[0] != counts[1]
    kept = [model.select(*each) for each in zip(encoded, asked, counts, strict=True)]
    texts = model.answer(asked, [[one] for one in encoded], [[order] for order in kept], STEPS)
    with Pipeline.load(path) as vlm:
        for question, shown, text, order, k in zip(ASKED, pictures, texts, kept, counts, strict=True):
            whole = vlm.ask(shown, question, tokens=k, max_new_tokens=STEPS)
            assert text == whole.text
            assert order.tolist() == whole.images[0].pick_order.tolist()


def test_a_bundle_of_proportional_attention_answers_as_its_pipeline(tiny_bundle, bundle):
    """Its selector's counts are those that are given to every selection; with all tokens, or on demand, it is plain."""
    weighing = tiny_bundle("clip-llama", k=7, split=True, attention="proportional")
    pictures = [picture(0), picture(1)]
    model = open_bundle(weighing)
    with Pipeline.load(weighing) as vlm:
        for k in (2, 7):
            texts, _ = answers(model, pictures, k)
            for question, shown, text in zip(ASKED, pictures, texts, strict=True):
                assert text == vlm.ask(shown, question, tokens=k, max_new_tokens=STEPS).text
    plain = open_bundle(bundle)
    assert answers(open_bundle(weighing, attention="plain"), pictures, 2)[0] == answers(plain, pictures, 2)[0]
    encoded, asked = model.look(pictures), [model.read(question) for question in ASKED]
    everything = [[[one] for one in encoded], [[np.arange(16)]] * 2, STEPS]
    assert model.answer(asked, *everything) == plain.answer(asked, *everything)
    with pytest.raises(
        ResPruneError, match="exported with --attention plain, and its decoder takes no counts"
    ):
        open_bundle(bundle, attention="proportional")


def text_of(model, tokens):
    stream = TextStream(model._prompter.tokenizer)
    return "".join([*map(stream.push, tokens), stream.finish()])


def expected(model, hugging_face, pictures, **options):
    made = []
    for question, shown in zip(ASKED, pictures, strict=True):
        prompt = model.read(question).prompt
        made.append(hugging_face.pruned([shown], prompt.ids, prompt.text_token_ids, steps=STEPS, **options))
    return [text_of(model, one.token_ids) for one in made], [one.pick_orders[0] for one in made]


@pytest.mark.parametrize("attention", ["plain", "proportional"])
@pytest.mark.parametrize(
    ("variant", "positions"),
    [("clip-llama", "contiguous"), ("next-llama", "original"), ("siglip-mistral", "original")],
)
def test_a_checkpoint_answers_as_hugging_face(variant, positions, attention, tiny_checkpoint):
    root = tiny_checkpoint(variant)
    model = open_checkpoint(str(root), positions=positions, attention=attention)
    pictures = [picture(0), picture(1, 9, 3)]
    texts, kept = answers(model, pictures, 7)
    how = {"k": 7, "positions": positions, "proportional": attention == "proportional"}
    wanted = expected(model, HuggingFace(root), pictures, **how)
    assert (texts, [order.tolist() for order in kept]) == wanted


def test_a_qwen_checkpoint_answers_as_hugging_face(tmp_path):
    root = write_qwen(tmp_path / "qwen", VARIANTS["qwen25"])
    model = open_checkpoint(str(root))
    pictures = [picture(0, 5, 7), picture(1, 12, 3)]
    texts, kept = answers(model, pictures, 6)
    wanted = expected(model, HuggingFaceQwen(root), pictures, budgets=[6])
    assert (texts, [order.tolist() for order in kept]) == wanted
    assert model.num_tokens is None
    with pytest.raises(ResPruneError, match="allows --positions original, not contiguous"):
        open_checkpoint(str(root), positions="contiguous")


def test_other_words_can_steer(bundle):
    model = open_bundle(bundle)
    nouns, words = model.read(ASKED[0]), model.read(ASKED[0], about=[ASKED[0]])
    assert nouns.prompt.ids == words.prompt.ids
    assert set(nouns.prompt.text_positions) < set(words.prompt.text_positions)


@pytest.mark.parametrize("opened", [open_bundle, open_checkpoint])
def test_words_that_the_question_has_not_steer_as_in_the_pipeline(opened, bundle, tiny_checkpoint):
    path = bundle if opened is open_bundle else tiny_checkpoint("clip-llama")
    model, words = opened(str(path)), ["square", "a red circle"]
    picks = []
    with Pipeline.load(bundle) as vlm:
        for question, about in (("which is it?", words), (ASKED[0], words), (ASKED[0], None)):
            (encoded,), asked = model.look([picture(0)]), model.read(question, about=about)
            kept = model.select(encoded, asked, 3)
            whole = vlm.ask(picture(0), question, about=about, tokens=3, max_new_tokens=STEPS)
            assert asked.prompt.text_token_ids == whole.prompt.text_token_ids
            assert kept.tolist() == whole.images[0].pick_order.tolist()
            assert model.answer([asked], [[encoded]], [[kept]], STEPS) == [whole.text]
            picks.append(kept.tolist())
    assert picks[1] != picks[2], "words that are left out change nothing: shows nothing"


@pytest.mark.parametrize("opened", [open_bundle, open_checkpoint])
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"positions": "orignal"}, "positions should be contiguous or original, not orignal"),
        ({"attention": "proportinal"}, "attention should be plain or proportional, not proportinal"),
    ],
)
def test_a_policy_that_there_is_none_of(opened, wrong, sentence, bundle, tiny_checkpoint):
    with pytest.raises(ResPruneError, match=sentence):
        opened(str(bundle if opened is open_bundle else tiny_checkpoint("clip-llama")), **wrong)


def test_what_a_model_cannot_keep(bundle, tiny_bundle):
    model = open_bundle(tiny_bundle("clip-llama", k=7, split=True))
    model.check([Budget(8), Budget()], own=False)
    with pytest.raises(ResPruneError, match="-k 17 is more than the 16 visual tokens"):
        model.check([Budget(17)], own=False)
    with pytest.raises(ResPruneError, match="-k 8 is more than the 7 tokens this bundle's selection keeps"):
        model.check([Budget(8)], own=True)
    assert model.most == 7
    model.check([Budget(share=0.4375)], own=True)
    model.check([Budget(share=0.44)], own=False)
    with pytest.raises(ResPruneError, match="-k 44% of 16 tokens is more than the 7 tokens"):
        model.check([Budget(share=0.44)], own=True)


def test_what_cannot_be_kept_of_the_largest_picture(tiny_bundle, tmp_path):
    """Though a smaller picture would do: which sizes come is known only when they have."""
    copy = shutil.copytree(tiny_bundle("next-llama", k=88, split=True), tmp_path / "bundle")
    whole = read_bundle(copy).manifest
    selection = dataclasses.replace(whole.selection, k=22)
    write_manifest(copy, dataclasses.replace(whole, selection=selection))
    model, most = open_bundle(copy), selection.max_tokens
    assert model.num_tokens is None
    model.check([Budget(22), Budget(share=22 / most), Budget()], own=True)
    model.check([Budget(share=1.0), Budget(most)], own=False)
    with pytest.raises(ResPruneError, match=f"-k 50% of {most} tokens is more than the 22 tokens"):
        model.check([Budget(share=0.5)], own=True)
    with pytest.raises(ResPruneError, match=f"-k {most + 1} is more than the {most} visual tokens"):
        model.check([Budget(most + 1)], own=False)


def test_versions_are_those_that_were_imported():
    """onnxruntime may come from a package of another name, as onnxruntime-gpu, and then there is none of its own."""
    module = SimpleNamespace(__name__="in_no_package_of_this_name", __version__="1.2.3")
    assert engine("cpu", 0, module).versions[module.__name__] == "1.2.3"


def test_a_bundle_without_its_encoder_apart(bundle, tmp_path):
    """As an export without --split leaves it."""
    whole = read_bundle(bundle).manifest
    graphs = {name: graph for name, graph in whole.graphs.items() if name != "vision_encoder"}
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    write_manifest(copy, dataclasses.replace(whole, graphs=graphs))
    with pytest.raises(ResPruneError, match="export it with --split"):
        open_bundle(copy)


def test_a_question_past_the_context(bundle):
    model = open_bundle(bundle)
    with pytest.raises(ResPruneError, match="past the context"):
        model.read("what colour? " * 2000)


def test_engines_that_are_built_leave_the_answers_key_as_it_is(tiny_bundle, tmp_path):
    """They are made of the same graphs; any other file makes another model."""
    copy = shutil.copytree(tiny_bundle("clip-llama", k=7, split=True), tmp_path / "bundle")
    before = open_bundle(copy).fingerprint
    for name, same in (("engines/tensorrt-sm_86/vision_select.engine", True), ("README.txt", False)):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"new")
        manifest = read_bundle(copy).manifest
        write_manifest(
            copy, dataclasses.replace(manifest, files=manifest.files | {name: describe_file(copy, name)})
        )
        assert (open_bundle(copy).fingerprint == before) == same


@pytest.mark.parametrize(
    "name",
    ["method.py", "evaluation/selectors.py", "exporter/early.py", "graphs/selection.py", "runtime/walk.py"],
)
def test_the_fingerprint_of_the_sources_changes_with_any_of_them(name, tmp_path):
    """Though the version stays what it is."""
    source = tmp_path / name
    source.parent.mkdir(exist_ok=True)
    text = (Path(resprune.__file__).parent / name).read_text(encoding="utf-8")
    source.write_text(text, encoding="utf-8")
    before = code(tmp_path)
    source.write_text(text + "\n", encoding="utf-8")
    code.cache_clear()
    assert code(tmp_path) != before
