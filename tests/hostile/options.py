"""Options and questions: what nobody would type, and what somebody did."""

from pathlib import Path
from random import Random

from tests.hostile.case import QUESTION, SHORT, Case, World, clean_answer
from tests.hostile.values import TEXTS

WORDS = (
    "--tokens",
    "--max-new-tokens",
    "--temperature",
    "--top-p",
    "--top-k",
    "--min-p",
    "--seed",
    "--threads",
    "--max-pixels",
)
FREE = ("--about", "--provider", "--engines", "--server-format", "--suppress-tokens", "--repetition-penalty")
VALUES = (
    *(
        "0",
        "-1",
        "1",
        "2",
        "1.5",
        "1e999",
        "nan",
        "inf",
        "-inf",
        "1e-320",
        "10" * 200,
        "9" * 5000,
        "0x10",
        "１２",
        "1_000",
    ),
    *("true", "None", "11%", "all", "cpu", "cuda", "cpu,cpu", ",", "square", "square,colour", "tensorrt"),
)
CHANGES_NOTHING = (
    ("--threads", "1"),
    ("--seed", "3"),
    ("--max-pixels", "70000000"),
    ("--provider", "cpu"),
    ("--temperature", "0"),
)
QUESTIONS = (
    *(
        "",
        " ",
        "?",
        "\n",
        "square",
        "</s>",
        "<s>" * 40,
        "<image>",
        "what is <image>?",
        "\x1b[31m",
        "a\udcff",
        "\ud800",
        "\ufdd0",
    ),
    *(
        "日本語 🎉",
        "é" * 300,
        "the " * 5000,
        "x" * 300_000,
        "square " * 40_000,
        "'" * 2000,
        "\u202eabc",
        "a" + "\u0301" * 3000,
    ),
    *("{{ 7 * 7 }}", "{% for %}", "%s %n", "-- --help", "<|im_end|>", "n't" * 100, "\u2028"),
)


def make(random: Random, folder: Path, world: World) -> Case:
    """A case about the command line."""
    return random.choice([_option, _option, _question, _question, _usage, _same])(random, folder, world)


def _option(random: Random, folder: Path, world: World) -> Case:
    bundle = random.choice(list(world.bundles.values()))
    option = random.choice(WORDS + FREE)
    given = random.choice([*VALUES, *(text for text in TEXTS if "\0" not in text)])
    words = ["ask", str(bundle), str(world.photo), QUESTION, *SHORT, f"{option}={given}"]
    return Case("option", f"{option} {given[:30]!a}", words, reason="the option changes the answer")


def _same(random: Random, folder: Path, world: World) -> Case:
    bundle = random.choice(list(world.bundles.values()))
    options = [word for pair in random.sample(CHANGES_NOTHING, 2) for word in pair]
    words = ["ask", str(bundle), str(world.photo), QUESTION, *SHORT, *options]
    return Case("option", f"{options}", words, lambda: clean_answer(bundle, world.photo))


def _question(random: Random, folder: Path, world: World) -> Case:
    bundle = random.choice(list(world.bundles.values()))
    question = random.choice(QUESTIONS) if random.random() < 0.7 else _noise(random)
    plain = ["--plain-text"] if random.random() < 0.4 else []
    words = ["ask", str(bundle), *SHORT, *plain, "--", str(world.photo), question]
    return Case("option", f"question {question[:30]!a}", words, reason="another question has another answer")


def _noise(random: Random) -> str:
    ranges = [
        (32, 127),
        (0xA0, 0x250),
        (0x4E00, 0x4F00),
        (0x1F300, 0x1F600),
        (0x300, 0x370),
        (0x2000, 0x2070),
    ]
    picked = [random.choice(ranges) for _ in range(random.choice([1, 20, 300]))]
    return "".join(chr(random.randrange(*pair)) for pair in picked)


def _usage(random: Random, folder: Path, world: World) -> Case:
    texts = [text for text in TEXTS if "\0" not in text and not text.startswith("/")]
    words = [
        random.choice(
            [
                *texts,
                "ask",
                "inspect",
                "export",
                "--help",
                "-h",
                "--version",
                "--json",
                "--tokens",
                "photo.png",
            ]
        )
    ]
    words += [
        random.choice([*texts, "--json", "--show", "--tokens=", "-k", "--"])
        for _ in range(random.randrange(4))
    ]
    if "export" in words or "build" in words:
        words = ["export", "--no-such-option"]
    return Case(
        "option", f"{[word[:20] for word in words]!a}", words, reason="help and version are always given"
    )
