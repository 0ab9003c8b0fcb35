"""What each token of a vocabulary adds to a text, in bytes: for hosts that write text without a tokenizer."""

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from resprune.runtime.errors import ResPruneError

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # how SentencePiece writes a space


def vocabulary_pieces(tokenizer: "tokenizers.Tokenizer") -> list[str | list[int]]:
    """The piece of every token id: text, or a list of bytes where these are no whole UTF-8; "" for special tokens.

    The bytes of an answer's pieces, joined, are its text; white space at the start is not part of it. Raises
    `ResPruneError` for a tokenizer whose decoder is neither byte-level nor SentencePiece's.
    """
    to_bytes = _decoder(json.loads(tokenizer.to_str()).get("decoder") or {})
    added = tokenizer.get_added_tokens_decoder()
    pieces: list[str | list[int]] = []
    for token in range(max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1):
        name = tokenizer.id_to_token(token)
        if name is None or (token in added and added[token].special):
            pieces.append("")
            continue
        content = name.encode() if token in added else to_bytes(name)
        try:
            pieces.append(content.decode())
        except UnicodeDecodeError:
            pieces.append(list(content))
    return pieces


def _decoder(config: dict[str, Any]) -> Callable[[str], bytes]:
    """The function from a token's name to its bytes that a tokenizer.json's `decoder` stands for."""
    steps = config["decoders"] if config.get("type") == "Sequence" else [config]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level
    if "Metaspace" in kinds or any(step.get("pattern") == {"String": _SPACE} for step in steps):
        return _sentencepiece
    raise ResPruneError(
        f"the tokenizer's decoder ({', '.join(map(str, kinds))}) is neither byte-level nor SentencePiece's, so "
        "its tokens cannot be written as text one by one; use a checkpoint with one of these"
    )


def _byte_level(name: str) -> bytes:
    return bytes(_BYTES[character] for character in name)


def _sentencepiece(name: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(match[1], 16)])
    return name.replace(_SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 stands for itself, the rest for U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()
