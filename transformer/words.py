"""Tokens as a reader sees them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Byte-level tokenizers write bytes that are no visible characters as those from 256 on, in order.
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_BYTES = {chr(byte): byte for byte in _VISIBLE} | {
    chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - _VISIBLE))
}


def token_texts(tokenizer: "Tokenizer", ids: Sequence[int]) -> list[str]:
    """The text of each token, spaces included; bytes that are no whole character as <E2 82>."""
    return [_text(tokenizer, id) for id in ids]


def visible(text: str) -> str:
    """A token's text with no spaces around it, and something to see in any case."""
    return text.replace("\n", "⏎").strip() or "␣"


def labels(tokenizer: "Tokenizer", ids: Sequence[int]) -> list[str]:
    """token_texts() made visible(), for pictures and lists."""
    return [visible(text) for text in token_texts(tokenizer, ids)]


def _text(tokenizer: "Tokenizer", id: int) -> str:
    text = tokenizer.decode([id], skip_special_tokens=False)
    token = tokenizer.id_to_token(id)
    if "\ufffd" in text and token is not None and all(char in _BYTES for char in token):
        return "<" + " ".join(f"{_BYTES[char]:02X}" for char in token) + ">"
    return text
