"""examples/web in Debian's Chromium: texts and picks are Python's, and nothing leaves this machine."""

import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

from resprune import Pipeline
from tests.hosts.conftest import Drive
from tests.hosts.demo import PICTURES, QUESTIONS, copy_of
from tests.hosts.npm import EXAMPLES, install
from tests.hosts.serve_page import Step

READY = "/WASM|WebGPU/.test(document.querySelector('#status').textContent)"
FAULT = "!document.querySelector('#fault').hidden"
ANSWERED = f"document.querySelector('#answer').dataset.ids || {FAULT}"
FOUND = """(() => {
  const at = (id) => document.getElementById(id);
  const parsed = (text) => JSON.parse(text ?? "null");
  return {
    status: at("status").textContent, fault: at("fault").hidden ? "" : at("fault").textContent,
    text: at("answer").textContent, ids: parsed(at("answer").dataset.ids), about: at("about").value,
    kept: parsed(at("stage").dataset.kept), picks: parsed(at("stage").dataset.picks),
  };
})()"""


@contextmanager
def served(bundle: Path) -> Iterator[str]:
    """The page's address with this bundle; whatever browsers do, the server prints nothing."""
    install(EXAMPLES / "web")
    command = [sys.executable, EXAMPLES / "web" / "serve.py", bundle, "--samples", PICTURES, "--port", "0"]
    with tempfile.TemporaryFile("w+") as printed:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=printed, text=True)
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.terminate()
            server.wait()
        printed.seek(0)
        assert printed.read() == ""


@pytest.fixture(scope="module")
def demo(exported: Callable[..., Path]) -> Path:
    return exported(k=144, split=True, positions="original")


@pytest.fixture(scope="module")
def address(demo: Path) -> Iterator[str]:
    with served(demo) as url:
        yield url


def test_a_browser_that_goes_away_is_no_error(demo: Path) -> None:
    """It resets the connection in the middle of the largest file, and after a whole answer."""
    largest = max(demo.iterdir(), key=lambda file: file.stat().st_size).name
    with served(demo) as url:
        for path in (f"/bundle/{largest}", "/index.html"):
            gone = socket.create_connection(("127.0.0.1", urlsplit(url).port))
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            gone.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert gone.recv(10)
            gone.close()
        with urlopen(url) as answer:
            assert answer.status == 200


def opened(url: str) -> list[Step]:
    samples = f"document.querySelectorAll('#samples button').length === {len(QUESTIONS)}"
    ready = f"({READY} && {samples}) || {FAULT}"
    return [{"do": "goto", "url": url}, {"do": "wait", "until": ready}]


def answered() -> list[Step]:
    return [{"do": "wait", "until": ANSWERED}, {"do": "read", "of": FOUND}]


def sample(image: str) -> list[Step]:
    return [{"do": "click", "at": f"#samples [data-image='{image}']"}, *answered()]


def asked(question: str, about: str) -> list[Step]:
    forget = "delete document.querySelector('#answer').dataset.ids, null"
    return [
        {"do": "fill", "at": "#question", "value": question},
        {"do": "fill", "at": "#about", "value": about},
        {"do": "read", "of": forget},
        {"do": "click", "at": "#ask"},
        *answered(),
    ]


def check(found: dict[str, Any], pipeline: Pipeline, image: Path, question: str, **options: Any) -> None:
    """What the page shows is what Python answers."""
    answer = pipeline.ask(image, question, stream=False, **options)
    assert found["fault"] == ""
    assert found["text"] == answer.text
    assert found["ids"] == answer.token_ids != []
    assert found["kept"] == answer.images[0].kept_indices.tolist()
    assert found["picks"] == answer.images[0].pick_order.tolist()


def words(about: str) -> list[str]:
    return [word.strip() for word in about.split(",") if word.strip()]


def test_demo_images_with_the_pages_keywords(drive: Drive, address: str, demo: Path) -> None:
    steps = opened(address)
    for example in QUESTIONS:
        steps += sample(example["image"])
    with Pipeline.load(demo) as pipeline:
        for found, example in zip(drive(steps)["read"], QUESTIONS, strict=True):
            about = words(found["about"])
            assert about
            check(found, pipeline, PICTURES / example["image"], example["question"], tokens=16, about=about)


def test_demo_images_with_pythons_keywords(drive: Drive, address: str, demo: Path) -> None:
    with Pipeline.load(demo) as pipeline:
        steps = opened(address)
        for example in QUESTIONS:
            image, question = example["image"], example["question"]
            keywords = pipeline.ask(PICTURES / image, question, stream=False).prompt.nouns
            steps += [*sample(image)[:-1], *asked(question, ", ".join(keywords))]
        reads = [read for read in drive(steps)["read"] if read is not None]
        for found, example in zip(reads, QUESTIONS, strict=True):
            check(found, pipeline, PICTURES / example["image"], example["question"], tokens=16)


def test_slider_draws_at_once_and_asks_again(drive: Drive, address: str, demo: Path) -> None:
    drawn = "JSON.parse(document.querySelector('#stage').dataset.picks).length"
    steps = [*opened(address), *sample("count.png"), {"do": "focus", "at": "#tokens"}]
    for key in ("ArrowRight", "End", "Home"):
        steps += [{"do": "press", "key": key}, {"do": "read", "of": drawn}, *answered()]
    first, *pairs = drive(steps)["read"]
    example = next(example for example in QUESTIONS if example["image"] == "count.png")
    with Pipeline.load(demo) as pipeline:
        for drawn_now, found, tokens in zip(pairs[::2], pairs[1::2], (17, 144, 1), strict=True):
            assert drawn_now == tokens
            about = words(first["about"])
            check(found, pipeline, PICTURES / "count.png", example["question"], tokens=tokens, about=about)


def test_no_keywords_is_no_guidance(drive: Drive, address: str, demo: Path) -> None:
    steps = [*opened(address), *sample("shapes.png")[:-1], *asked(QUESTIONS[0]["question"], "")]
    *_, found = drive(steps)["read"]
    with Pipeline.load(demo) as pipeline:
        check(found, pipeline, PICTURES / "shapes.png", QUESTIONS[0]["question"], tokens=16, about=[])


@pytest.mark.parametrize("kind", ["png", "jpeg", "turned"])
def test_twelve_megapixels(drive: Drive, address: str, demo: Path, tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(3).integers(0, 40, (3000, 4000, 3), dtype=np.uint8)
    shapes = Image.open(PICTURES / "shapes.png").convert("RGB").resize((4000, 3000))
    large = Image.fromarray(np.asarray(shapes) // 2 + noise)
    photo = tmp_path / f"photo.{'png' if kind == 'png' else 'jpg'}"
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == "turned" else 1
    large.save(photo, exif=exif, **({"compress_level": 1} if kind == "png" else {"quality": 92}))
    question = QUESTIONS[0]["question"]
    steps = [
        *opened(address),
        {"do": "fill", "at": "#question", "value": question},
        {"do": "file", "at": "#file", "path": str(photo)},
        *answered(),
    ]
    (found,) = drive(steps)["read"]
    with Pipeline.load(demo) as pipeline:
        check(found, pipeline, photo, question, tokens=16, about=words(found["about"]))


def test_streams_a_long_answer_of_another_checkpoint(drive: Drive, tiny_bundle: Callable[..., Path]) -> None:
    bundle = tiny_bundle("clip-llama", k=7)  # not split: encoder and selection in one graph
    count_pieces = """(() => {
      window.pieces = 0;
      new MutationObserver(() => window.pieces++).observe(document.querySelector("#answer"), { childList: true });
    })()"""
    with served(bundle) as url:
        steps = [
            *opened(f"{url}?tokens=5"),
            {"do": "read", "of": count_pieces},
            *sample("shapes.png"),
            {"do": "read", "of": "window.pieces"},
        ]
        _, found, pieces = drive(steps)["read"]
    with Pipeline.load(bundle) as pipeline:
        check(
            found,
            pipeline,
            PICTURES / "shapes.png",
            QUESTIONS[0]["question"],
            tokens=5,
            about=words(found["about"]),
        )
    assert pieces > 5


def test_webgpu(drive: Drive, address: str, demo: Path) -> None:
    """On Chromium's GPU in software: the provider is the real one."""
    gpu = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
    (found,) = drive([*opened(address), *sample("shapes.png")], gpu)["read"]
    assert found["status"].endswith("WebGPU")
    with Pipeline.load(demo) as pipeline:
        about = words(found["about"])
        check(found, pipeline, PICTURES / "shapes.png", QUESTIONS[0]["question"], tokens=16, about=about)


def test_camera(drive: Drive, address: str) -> None:
    playing = "document.querySelector('#video').videoWidth > 0"
    steps = [
        *opened(address),
        {"do": "fill", "at": "#question", "value": "What color is the circle?"},
        {"do": "click", "at": "#camera"},
        {"do": "wait", "until": playing},
        {"do": "click", "at": "#shoot"},
        *answered(),
        {"do": "read", "of": "document.querySelector('#video').srcObject.active"},
    ]
    found, active = drive(steps, permissions=["camera"])["read"]
    assert found["fault"] == ""
    assert found["text"]
    assert len(found["kept"]) == 16
    assert not active


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_small_screen_and_keyboard(drive: Drive, address: str, colors: str) -> None:
    steps = [
        *opened(address),
        {"do": "focus", "at": "#samples [data-image='digit.png']"},
        {"do": "press", "key": "Enter"},
        *answered(),
        {"do": "focus", "at": "#question"},
        {"do": "press", "key": "Tab"},
        {"do": "read", "of": "document.activeElement.id"},
        {"do": "read", "of": "document.documentElement.scrollWidth"},
        {"do": "read", "of": "getComputedStyle(document.body).backgroundColor"},
        # Every control has a name, and is large enough for a finger.
        {
            "do": "read",
            "of": "[...document.querySelectorAll('button, input:not(.hidden)')].filter((control) => "
            "control.offsetParent && !(control.labels?.length || control.textContent.trim() || "
            "control.querySelector('img[alt]'))).map((control) => control.outerHTML)",
        },
    ]
    found, after, width, page, nameless = drive(
        steps, viewport={"width": 390, "height": 844}, colorScheme=colors
    )["read"]
    assert found["text"] == QUESTIONS[1]["answer"]
    assert after == "ask"
    assert width == 390
    assert page == {"light": "rgb(244, 245, 247)", "dark": "rgb(16, 18, 22)"}[colors]
    assert nameless == []


def broken(source: Path, target: Path, fault: str) -> Path:
    bundle = copy_of(source, target)
    manifest = bundle / "resprune.json"
    weights = bundle / "onnx" / "decoder_model_merged.onnx_data"
    if fault == "no manifest":
        manifest.unlink()
    elif fault == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:500])
    elif fault == "newer":
        manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 99'))
    elif fault == "another family":
        manifest.write_text(manifest.read_text().replace('"family": "llava"', '"family": "qwen2_vl"'))
    elif fault == "weights missing":
        weights.unlink()
    else:
        content = bytearray(weights.read_bytes())
        weights.unlink()
        if fault == "weights altered":
            content[1000] ^= 1
        weights.write_bytes(content[:-1] if fault == "weights cut" else content)
    return bundle


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("no manifest", "resprune.json is not there (404"),
        ("half a manifest", "resprune.json is not valid JSON"),
        ("newer", "format version 99"),
        ("another family", "the family qwen2_vl"),
        ("weights missing", "decoder_model_merged.onnx_data is not there (404"),
        ("weights altered", "was altered after the export"),
        ("weights cut", "bytes where"),
    ],
)
def test_a_broken_bundle_is_one_line_and_the_next_one_opens(
    drive: Drive, address: str, demo: Path, fault: str, told: str
) -> None:
    # Beside the page, so that its server has both.
    folder = EXAMPLES / "web" / "node_modules" / ".broken"
    shutil.rmtree(folder, ignore_errors=True)
    broken(demo, folder, fault)
    steps = [
        {"do": "goto", "url": f"{address}?bundle=node_modules/.broken/"},
        {"do": "wait", "until": FAULT},
        {"do": "read", "of": FOUND},
        {"do": "click", "at": "summary"},
        {"do": "fill", "at": "#url", "value": "bundle"},
        {"do": "click", "at": "#open button"},
        {"do": "wait", "until": READY},
        {"do": "read", "of": FOUND},
        *sample("shapes.png"),
    ]
    try:
        fails, mended, found = drive(steps)["read"]
    finally:
        shutil.rmtree(folder)
    assert told in fails["fault"]
    assert "\n" not in fails["fault"]
    assert fails["status"] == "No bundle is open"
    assert mended["fault"] == ""
    assert found["text"] == QUESTIONS[0]["answer"]


def test_faults_of_asking_are_one_line(drive: Drive, address: str) -> None:
    question = QUESTIONS[0]["question"]
    steps = [
        *opened(address),
        *sample("shapes.png"),
        *asked(question, "horse"),
        *asked("Where is <image>?", ""),
        {"do": "file", "at": "#file", "path": str(PICTURES / "questions.json")},
        {"do": "wait", "until": "document.querySelector('#fault').textContent.includes('not an image')"},
        {"do": "read", "of": FOUND},
    ]
    reads = [read for read in drive(steps)["read"] if read is not None]
    assert [read["fault"] for read in reads] == [
        "",
        '"horse" is not in the question; name words as they stand in it',
        "the question contains <image>, which stands for an image; leave it out",
        "this file is not an image that the browser can read; choose another",
    ]
