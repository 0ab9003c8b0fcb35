"""The model families, one row each, with everything that other code asks of the family; no other code names one.

A family is one module in `runtime/families/`, one of the same name in `exporter/families/`, and one row here.
docs/adding-a-family.md says how to write them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module

from resprune.runtime.backends.formats import ENGINE, PYTORCH, SGLANG, TRTLLM, VLLM
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.preprocessor import Preprocessor
from resprune.runtime.families.rotary import Rotary, blocks, interleaved


@dataclass(frozen=True)
class Defaults:
    """What an export takes unless an option says another; `why` has a reason for each in one sentence."""

    positions: tuple[str, ...]
    """The legal position policies, the default first."""
    alpha: float
    """Strength of the text guidance."""
    attention: str
    """"plain" or "proportional"."""
    why: Mapping[str, str]
    """By the names of the other fields."""


TRAINED = "The model was trained with it, and servers and llama.cpp have no other."
PUBLISHED = Defaults(
    ("contiguous", "original"),
    1.0,
    "plain",
    {
        "positions": "Published results of pruned LLaVAs number the shortened prompt from 0.",
        "alpha": "The published method's; the demo model, a small LLaVA, answers better without guidance at some "
        "budgets, which is too little to change it.",
        "attention": TRAINED,
    },
)
UNMEASURED = replace(
    PUBLISHED,
    why={
        "positions": "As for LLaVA, which has one position axis too; on this family not measured.",
        "alpha": "The published method's; on this family not measured.",
        "attention": TRAINED,
    },
)
M_ROPE = Defaults(
    ("original",),
    0.5,
    "plain",
    {
        "positions": "Under M-RoPE a kept token keeps its (t, h, w), and the text goes on where it stood unpruned.",
        "alpha": "Others found that guidance costs Qwen2.5-VL on documents (of an OCR-heavy score CDPruner, which is "
        "guided, keeps 85 %, DivPrune 93 %); half is a choice, not measured here, with which --about still guides.",
        "attention": TRAINED,
    },
)


@dataclass(frozen=True)
class Family:
    """One row. `name` is the `model_type` of the checkpoint's config.json, and the manifest's `family`.

    How an answer is sampled depends on no family: it is the checkpoint's generation_config.json (`bundle_sampling`).
    """

    name: str
    title: str
    """For people: what the errors and reports call it."""
    module: str
    """Of `runtime/families/`, with `preprocessor(bundle)`, and of `exporter/families/`, with `split_model`."""
    defaults: Defaults = UNMEASURED
    rotary: Rotary | None = None
    """Which of the three axes of M-RoPE's `position_ids` [3, B, S] turns each angle; None for [B, S]."""
    any_size: bool = False
    """Whether an image has as many tokens as its pixels ask for, up to --max-pixels."""
    servers: tuple[str, ...] = ()
    """The server formats and TensorRT-LLM backends that give kept tokens, and the text, their right positions."""
    research: Mapping[str, str] = field(default_factory=dict)
    """What a config.json of the code that it was published with has, which transformers does not read: keys, each with
    a pattern of the whole value."""
    placeholder: str | None = None
    """What its chat template writes for an image; None for the image token itself."""
    plain_prompt: bool = False
    """Whether it was trained with the prompt that stands in for a missing chat template (template.py)."""
    verified: tuple[str, ...] = ()
    """The repository's tests and benchmarks that compare it with transformers, for `resprune models`."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Short names for the command line, each with the hub id that it stands for."""

    @property
    def position_axes(self) -> int:
        """1 for `position_ids` [B, S], 3 for M-RoPE's [3, B, S]."""
        return 1 if self.rotary is None else 3

    def preprocessor(self, bundle: Bundle) -> Preprocessor:
        """The image preprocessor of a bundle, and with it the axes of its engines (`Preprocessor.axes`).

        The module loads only now: ten of which a device needs one were 3 % of its start.
        """
        made: Preprocessor = import_module(f"{__package__}.{self.module}").preprocessor(bundle)
        return made

    def policy(self, asked: str | None) -> str:
        """The position policy that was asked for, or the default; `ResPruneError` for one that is not legal."""
        legal = self.defaults.positions
        if asked is not None and asked not in legal:
            raise ResPruneError(f"{self.title} allows --positions {' or '.join(legal)}, not {asked}")
        return asked or legal[0]


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llava",
            "LLaVA-1.5",
            "llava",
            defaults=PUBLISHED,
            servers=(VLLM, TRTLLM, PYTORCH, ENGINE),
            plain_prompt=True,
            research={"mm_vision_tower": ".*"},
            verified=(
                "tests/exporter/test_parity_llava.py",
                "benchmarks/selection.py",
                "benchmarks/export_size.py",
            ),
            aliases={
                "llava15": "llava-hf/llava-1.5-7b-hf",
                "llava15-13b": "llava-hf/llava-1.5-13b-hf",
            },
        ),
        Family(
            "llava_next",
            "LLaVA-NeXT",
            "llava_next",
            defaults=PUBLISHED,
            servers=(VLLM, TRTLLM, PYTORCH, ENGINE),
            research={"mm_vision_tower": ".*", "image_aspect_ratio": "anyres"},
            verified=("tests/exporter/test_parity_llava_next.py", "benchmarks/llava_next.py"),
            aliases={
                "llava-next": "llava-hf/llava-v1.6-mistral-7b-hf",
                "llava-next-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
            },
        ),
        Family(
            "llava_onevision",
            "LLaVA-OneVision",
            "llava_onevision",
            research={"mm_vision_tower": ".*", "image_aspect_ratio": "anyres_max_.*"},
            verified=("tests/exporter/test_parity_onevision.py",),
            aliases={
                "llava-onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
                "llava-onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
            },
        ),
        Family(
            "qwen2_5_vl",
            "Qwen2.5-VL",
            "qwen2_vl",
            defaults=M_ROPE,
            rotary=blocks,
            any_size=True,
            servers=(SGLANG, ENGINE),
            verified=(
                "tests/exporter/test_parity_qwen.py",
                "benchmarks/qwen_vl.py",
                "benchmarks/export_size.py",
            ),
            aliases={
                "qwen25vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
                "qwen25vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
            },
        ),
        Family(
            "qwen2_vl",
            "Qwen2-VL",
            "qwen2_vl",
            defaults=M_ROPE,
            rotary=blocks,
            any_size=True,
            servers=(SGLANG, ENGINE),
            verified=("tests/exporter/test_parity_qwen.py",),
        ),
        Family(
            "qwen3_vl",
            "Qwen3-VL",
            "qwen3_vl",
            defaults=M_ROPE,
            rotary=interleaved,
            any_size=True,
            verified=("tests/exporter/test_parity_qwen3.py",),
            aliases={
                "qwen3vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
                "qwen3vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
                "qwen3vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
            },
        ),
        Family(
            "internvl",
            "InternVL",
            "internvl",
            research={"model_type": "internvl_chat"},
            verified=("tests/exporter/test_parity_tiles.py", "benchmarks/families.py"),
            aliases={
                "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
                "internvl3-2b": "OpenGVLab/InternVL3-2B-hf",
                "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
                "internvl35-1b": "OpenGVLab/InternVL3_5-1B-HF",
                "internvl35-2b": "OpenGVLab/InternVL3_5-2B-HF",
                "internvl35-4b": "OpenGVLab/InternVL3_5-4B-HF",
                "internvl35-8b": "OpenGVLab/InternVL3_5-8B-HF",
            },
        ),
        Family(
            "smolvlm",
            "SmolVLM",
            "smolvlm",
            verified=("tests/exporter/test_parity_tiles.py", "benchmarks/families.py"),
            aliases={
                "smolvlm2-256m": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
                "smolvlm2-500m": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
                "smolvlm2-2b": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
            },
        ),
        Family(
            "idefics3",
            "Idefics3",
            "smolvlm",
            verified=("tests/exporter/test_parity_tiles.py",),
        ),
        Family(
            "gemma3",
            "Gemma 3",
            "gemma3",
            placeholder="<start_of_image>",
            verified=("tests/exporter/test_parity_gemma.py", "benchmarks/families.py"),
            aliases={
                "gemma3-4b": "google/gemma-3-4b-it",
                "gemma3-12b": "google/gemma-3-12b-it",
                "gemma3-27b": "google/gemma-3-27b-it",
            },
        ),
    )
}


def aliases() -> dict[str, str]:
    """Every alias of the command line and the hub id that it stands for."""
    return {alias: hub_id for family in FAMILIES.values() for alias, hub_id in family.aliases.items()}


def known_families() -> str:
    """The families in words, for errors."""
    return ", ".join(f"{family.title} ({family.name})" for family in FAMILIES.values())


def family_of(bundle: Bundle) -> Family:
    """The row for a bundle; `ResPruneError`, listing the families, if there is none."""
    name = bundle.manifest.family
    if name not in FAMILIES:
        raise ResPruneError(
            f"the bundle is of the family {name} and this resprune runs {known_families()}; upgrade resprune"
        )
    return FAMILIES[name]
