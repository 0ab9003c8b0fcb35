"""Three kinds of tokenizer that checkpoints carry, small: byte-level BPE and SentencePiece's BPE, old and new."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL = ["<unk>", "<s>", "</s>", "<image>"]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?!.,'é日"
WORDS = ["the", "red", "square", "table", "what", "is"]


def byte_level() -> Tokenizer:
    """GPT-2, Qwen2, Llama 3: every byte has a letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(*_merged(SPECIAL + alphabet, "Ġ"), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Llama 2 and Mistral as first converted: a normalizer puts ▁ for spaces, unknown letters fall to bytes."""
    tokenizer = _sentencepiece_model()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def metaspace() -> Tokenizer:
    """The same as converted now (`legacy=False`): only the very first word gets a ▁ of its own."""
    tokenizer = _sentencepiece_model()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace}


def _sentencepiece_model() -> Tokenizer:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary, merges = _merged([*SPECIAL, *byte_tokens, "▁", *LETTERS], "▁")
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def _merged(tokens: list[str], space: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges that build each word from the left; words with a space before them come first."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    for word in [space + word for word in WORDS] + WORDS:
        built, *rest = word
        for letter in rest:
            if (built, letter) not in merges:
                merges.append((built, letter))
            built += letter
            vocabulary.setdefault(built, len(vocabulary))
    return vocabulary, merges
