"""examples/node on onnxruntime-node: the tokens and picks that Python gets from the same bundle."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resprune import Pipeline
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.cli import main
from resprune.runtime.families.image import ImageProcessor
from tests.hosts.demo import PICTURES, QUESTIONS, copy_of
from tests.hosts.npm import EXAMPLES, install, node


@pytest.fixture(scope="session")
def ask() -> Path:
    return install(EXAMPLES / "node") / "ask.mjs"


def write_prompt(bundle: Path, out: Path, question: str, images: int = 1) -> Path:
    assert main(["prompt", str(bundle), question, "--out", str(out), "--images", str(images)]) == 0
    return out


def same(
    ask: Path, bundle: Path, prompt: Path, images: Sequence[Path], question: str, tokens: int | None = None
) -> None:
    """Node and Python give the same text, token ids and picks."""
    words: list[Any] = [] if tokens is None else ["--tokens", tokens]
    done = node(ask, bundle, prompt, *images, *words, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with Pipeline.load(bundle) as pipeline:
        answer = pipeline.ask([*images], question, tokens=tokens, stream=False)
    assert found["token_ids"] == answer.token_ids != []
    assert found["text"] == answer.text
    assert found["images"] == [
        {"kept_indices": picks.kept_indices.tolist(), "pick_order": picks.pick_order.tolist()}
        for picks in answer.images
    ]


@pytest.mark.parametrize("example", QUESTIONS, ids=lambda example: example["image"])
def test_demo_images(
    ask: Path, exported: Callable[..., Path], tmp_path: Path, example: dict[str, str]
) -> None:
    bundle = exported(k=144, split=True, positions="original")
    prompt = write_prompt(bundle, tmp_path / "prompt.json", example["question"])
    same(ask, bundle, prompt, [PICTURES / example["image"]], example["question"], tokens=16)


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "contiguous"},
        {"positions": "original"},
        {"positions": "contiguous", "attention": "proportional"},
        {"dtype": "fp16"},
        {"dtype": "int8"},
        {"dtype": "q4"},
        {"body": "unrolled", "form": "linear"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_every_kind_of_bundle(
    ask: Path, exported: Callable[..., Path], tmp_path: Path, options: dict[str, str]
) -> None:
    bundle = exported(k=16, **options)
    question = "How many objects are there?"
    prompt = write_prompt(bundle, tmp_path / "prompt.json", question)
    same(ask, bundle, prompt, [PICTURES / "count.png"], question)


def test_two_images(ask: Path, exported: Callable[..., Path], tmp_path: Path) -> None:
    bundle = exported(k=144, split=True, positions="original")
    question = "What color is the large square?"
    prompt = write_prompt(bundle, tmp_path / "prompt.json", question, images=2)
    same(ask, bundle, prompt, [PICTURES / "shapes.png", PICTURES / "digit.png"], question, tokens=9)


def test_streams_plain_text(ask: Path, exported: Callable[..., Path], tmp_path: Path) -> None:
    bundle = exported(k=16, positions="original")
    prompt = write_prompt(bundle, tmp_path / "prompt.json", "What color is the large square?")
    done = node(ask, bundle, prompt, PICTURES / "shapes.png")
    assert (done.returncode, done.stdout, done.stderr) == (0, "black\n", "")


SETTINGS: list[dict[str, Any]] = [
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 96}, "crop_size": 96},
    {"image_processor_type": "SiglipImageProcessor", "size": {"height": 64, "width": 80}, "resample": 2},
    {
        "image_processor_type": "LlavaImageProcessor",
        "do_pad": True,
        "size": {"shortest_edge": 56},
        "crop_size": 56,
    },
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 30}, "crop_size": [50, 44]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["image_processor_type"])
@pytest.mark.parametrize(
    "size",
    [(97, 211), (640, 480), (13, 500), (96, 96), (31, 7), (1600, 1200)],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
def test_pixels_are_pillows_to_the_bit(
    tmp_path: Path, size: tuple[int, int], settings: dict[str, Any]
) -> None:
    width, height = size
    rgba = np.random.default_rng(7).integers(0, 256, (height, width, 4), dtype=np.uint8)
    (tmp_path / "rgba").write_bytes(rgba.tobytes())
    done = node(
        Path(__file__).with_name("pixels.mjs"),
        tmp_path / "rgba", width, height, json.dumps(settings), tmp_path / "values",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    white = Image.new("RGBA", size, (255, 255, 255, 255))
    blended = Image.alpha_composite(white, Image.fromarray(rgba)).convert("RGB")
    expected = ImageProcessor.from_config(settings)(blended)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "values", np.float32), expected.ravel())


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("no bundle", "resprune.json cannot be read"),
        ("altered", "was altered after the export"),
        ("cut", "bytes where"),
        ("newer", "format version 99"),
        ("other prompt", "written for another bundle"),
        ("two images", "asks about 1 images, and 2 are given"),
        ("no PNG", "cannot be read as PNG"),
        ("K", "should be 1 to 16"),
        ("optimized", "export it without --optimize"),
        ("broken graph", "cannot be opened"),
        ("no words", "usage"),
    ],
)
def test_faults_are_one_line(
    ask: Path, exported: Callable[..., Path], tmp_path: Path, fault: str, told: str
) -> None:
    source = exported(k=16, positions="original")
    prompt = write_prompt(source, tmp_path / "prompt.json", "What color is the large square?")
    image = PICTURES / "shapes.png"
    bundle = copy_of(source, tmp_path / "bundle")
    words: list[Any] = [bundle, prompt, image]
    config = bundle / "preprocessor_config.json"
    if not config.exists() or "processor_config.json" in read_bundle(source).manifest.files:
        config = bundle / "processor_config.json"
    if fault == "no bundle":
        words[0] = tmp_path
    elif fault == "altered":
        config.write_bytes(config.read_bytes().replace(b"0", b"1"))
    elif fault == "cut":
        config.write_bytes(config.read_bytes()[:-5])
    elif fault == "newer":
        manifest = bundle / "resprune.json"
        manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 99'))
    elif fault == "other prompt":
        content = json.loads(prompt.read_text(encoding="utf-8")) | {"tokenizer_sha256": "0" * 64}
        prompt.write_text(json.dumps(content), encoding="utf-8")
    elif fault == "two images":
        words.append(image)
    elif fault == "no PNG":
        words[2] = prompt
    elif fault == "optimized":
        words[0] = exported(k=16, optimize="ort")
    elif fault == "broken graph":
        graph = bundle / "onnx" / "embed_tokens.onnx"
        graph.unlink()
        graph.write_bytes(b"no graph")
    elif fault == "K":
        words += ["--tokens", "17"]
    else:
        words = []
    done = node(ask, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
