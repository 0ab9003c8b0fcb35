"""How tokens are chosen: the settings, what a checkpoint says of them, and what a question changes.

The names are those of transformers' `GenerationConfig`, and so is what they mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from resprune.runtime.arguments import number, whole
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError, shown

SETTINGS_FILE = "generation_config.json"
LARGEST_ID = (1 << 31) - 1
"""Of a token: far above any vocabulary."""


class SamplingOptions(TypedDict, total=False):
    """What every way of asking takes by keyword; what is left out is the bundle's (see `Sampling`)."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    min_new_tokens: int
    suppress_tokens: tuple[int, ...]
    begin_suppress_tokens: tuple[int, ...]
    forced_eos_token_id: tuple[int, ...]
    seed: int | None


PENALTY = (1e-3, 1e3)
"""Of repetition: beyond these, logits leave the range of float32."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults leave the logits as they are and take the largest.

    `temperature` 0 is greedy. Above it a token is drawn from the `top_k` most likely (0: all), of these from the
    nucleus that `top_p` reaches, of these from what is at least `min_p` as likely as the most likely; `seed` repeats
    a draw. Greedy or not: `repetition_penalty` divides the positive logit of an id that stands in the prompt or in
    the answer, and multiplies a negative one; `no_repeat_ngram_size` n lets no n ids follow each other twice there;
    the ids that end an answer wait for `min_new_tokens`; `suppress_tokens` never come, `begin_suppress_tokens` not
    first; and where an answer reaches `max_new_tokens`, its last token is one of `forced_eos_token_id`, if there are.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_eos_token_id: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        whole(self.max_new_tokens, "max_new_tokens", 1)
        for name in ("top_k", "no_repeat_ngram_size", "min_new_tokens"):
            whole(getattr(self, name), name, 0)
        if self.seed is not None:
            whole(self.seed, "seed", 0)
        if number(self.temperature, "temperature") < 0:
            raise ResPruneError(f"temperature should be 0 (greedy) or more, not {self.temperature}")
        if not PENALTY[0] <= number(self.repetition_penalty, "repetition_penalty") <= PENALTY[1]:
            raise ResPruneError(
                f"repetition_penalty should be {PENALTY[0]:g} to {PENALTY[1]:g} (1 is none), "
                f"not {self.repetition_penalty}"
            )
        for name in ("top_p", "min_p"):
            if not 0 <= number(value := getattr(self, name), name) <= 1:
                raise ResPruneError(f"{name} should be from 0 to 1, not {value}")
        for name in ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"):
            ids = getattr(self, name)
            if not isinstance(ids, tuple | list):
                raise ResPruneError(f"{name} should be a list of token ids, not {type(ids).__name__}")
            object.__setattr__(
                self,
                name,
                tuple(whole(token, f"each id of {name}", -LARGEST_ID, LARGEST_ID) for token in ids),
            )

    def changed(self, options: Mapping[str, Any]) -> "Sampling":
        """These settings with others in place of some; `ResPruneError` for a wrong value or a name there is not."""
        known = [field.name for field in fields(self)]
        if unknown := [name for name in options if name not in known]:
            raise ResPruneError(f"there is no setting {unknown[0]}; choose from {', '.join(known)}")
        return replace(self, **options)

    @property
    def processed(self) -> bool:
        """Whether logits are changed before the largest is taken, or one is drawn."""
        return bool(
            self.repetition_penalty != 1
            or self.no_repeat_ngram_size
            or self.min_new_tokens
            or self.suppress_tokens
            or self.begin_suppress_tokens
            or self.forced_eos_token_id
        )


# transformers' own defaults of what only drawing reads (`GenerationConfig._get_default_generation_params`).
_DRAWN: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
_ALWAYS = ("max_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")
_IDS = ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id")
# What `generate` does and this runtime does not, with the values that leave an answer as it is.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "sequence_bias": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "min_length": (0,),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "stop_strings": ([], ""),
    "token_healing": (False,),
    "num_return_sequences": (1,),
    "max_time": (),
}
_UNSUPPORTED_DRAWN: dict[str, tuple[Any, ...]] = {
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}


def checkpoint_sampling(settings: Mapping[str, Any]) -> Sampling:
    """What `generate` would do with the values of a generation_config.json; `ResPruneError` for a wrong one.

    It draws if `do_sample` is true, then from 50 ids unless `top_k` says otherwise, as transformers does. What it
    would draw with stands ready also where it is false: a temperature is all that a question has to give.
    `max_length`, which counts the prompt, is left out: the context bounds an answer, and `max_new_tokens` does.
    """
    said = {name: value for name, value in settings.items() if value is not None}
    values = {name: said[name] for name in _ALWAYS if name in said}
    values |= {name: said.get(name, default) for name, default in _DRAWN.items()}
    values |= {
        name: [said[name]] if isinstance(said[name], int) else said[name] for name in _IDS if name in said
    }
    if not said.get("do_sample"):
        values["temperature"] = 0.0
    return Sampling(**values)


def require_supported(settings: Mapping[str, Any]) -> None:
    """`ResPruneError` for a setting of generation_config.json that changes answers, and that nothing here does."""
    drawn = _UNSUPPORTED_DRAWN if settings.get("do_sample") else {}
    for name, neutral in (_UNSUPPORTED | drawn).items():
        value = settings.get(name)
        if value is not None and value not in neutral:
            raise ResPruneError(
                f"{SETTINGS_FILE} asks for {name} {shown(value)}, which resprune does not do; take it out of a copy "
                "of the checkpoint, and the answers are those of generate without it"
            )


def generation_settings(bundle: Bundle) -> dict[str, Any]:
    """What the bundle says of generating: generation_config.json, else what older checkpoints say in config.json."""
    if SETTINGS_FILE in bundle.manifest.files:
        return bundle.json(SETTINGS_FILE)
    config = bundle.json("config.json") if "config.json" in bundle.manifest.files else {}
    text = config.get("text_config")
    said = {name: value for name, value in config.items() if value is not None}
    return (text if isinstance(text, dict) else {}) | said


def bundle_sampling(bundle: Bundle) -> Sampling:
    """The settings that the bundle's checkpoint was published with (see `checkpoint_sampling`)."""
    try:
        return checkpoint_sampling(generation_settings(bundle))
    except ResPruneError as error:
        raise ResPruneError(f"{SETTINGS_FILE} in {bundle.root}: {error}; export it again") from None


def eos_token_ids(bundle: Bundle) -> frozenset[int]:
    """The ids that end an answer, from `generation_config.json`, else from `config.json`."""
    for name in (SETTINGS_FILE, "config.json"):
        config = bundle.json(name) if name in bundle.manifest.files else {}
        for table in (config, config.get("text_config") or {}):
            found = table.get("eos_token_id") if isinstance(table, dict) else None
            if found is not None and found != []:
                ids = found if isinstance(found, list) else [found]
                return frozenset(whole(token, f"eos_token_id in {name}", 0, LARGEST_ID) for token in ids)
    raise ResPruneError(
        f"neither generation_config.json nor config.json in {bundle.root} has an eos_token_id; export it again"
    )


def named_settings(
    sampling: Sampling, names: Mapping[str, str], title: str, leave_neutral: bool = False
) -> dict[str, Any]:
    """The settings as `title` takes them: `names` says what it calls each; all others must change nothing.

    Greedy, what only drawing reads is neutral. `leave_neutral` leaves out what changes nothing. Raises
    `ResPruneError`, naming the setting, for one that is at work and that it does not have.
    """
    neutral = Sampling()
    if sampling.temperature == 0:
        sampling = replace(sampling, top_k=0, top_p=1.0, min_p=0.0, seed=None)
    settings: dict[str, Any] = {}
    for field in fields(sampling):
        value, changes = (
            getattr(sampling, field.name),
            getattr(sampling, field.name) != getattr(neutral, field.name),
        )
        if field.name in names:
            if changes or not leave_neutral:
                settings[names[field.name]] = value
        elif changes:
            option = "--" + field.name.replace("_", "-")
            raise ResPruneError(
                f"{title} has no {field.name}, and it is {shown(value)} here; ask with another {option}, or let the "
                "bundle's own decoder answer"
            )
    return settings
