"""Tokenizers of two folders, compared by their files: whether the same number is the same token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modeconn.errors import ModeconnError
from modeconn.parameters.folders import read_json

# Files that say which token has which number, and how a text is cut; in the order in which
# transformers prefers them.
_WHOLE = "tokenizer.json"
_PARTS = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")


def tokenizer_difference(a: Path, b: Path) -> str | None:
    """Say in what the tokenizers in two folders differ.

    Returns:
        None where there is nothing to compare in one of the folders, "" where they are equal, and a
        text otherwise.

    Raises:
        ModeconnError: a file is damaged.
    """
    if all((folder / _WHOLE).is_file() for folder in (a, b)):
        one, other = (read_json(folder / _WHOLE) for folder in (a, b))
        return _of_numbers(_numbers(one), _numbers(other)) or _of_rules(one, other)
    common = [name for name in _PARTS if (a / name).is_file() and (b / name).is_file()]
    if not common:
        return None
    differ = [name for name in common if _content(a / name) != _content(b / name)]
    return f"{', '.join(differ)} differ" if differ else ""


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ModeconnError(f"{file}: cannot be read: {error.strerror}") from error


def _numbers(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """The number of each token, by a tokenizer.json."""
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, Mapping):
        found = dict(vocab)
    else:  # pairs of a token and its score, in the order of their numbers
        pairs = vocab if isinstance(vocab, list) else []
        found = {str(pair[0]): i for i, pair in enumerate(pairs)}
    for added in tokenizer.get("added_tokens") or ():
        found[added["content"]] = added["id"]
    return found


def _of_numbers(one: Mapping[str, int], other: Mapping[str, int]) -> str:
    moved = [token for token in one if other.get(token) != one[token]]
    more = len(other) - sum(token in one for token in other)
    if not moved and not more:
        return ""
    texts = [f"{len(one):,} and {len(other):,} tokens"]
    if moved:
        token = moved[0]
        there = other.get(token)
        place = f"{there} in b" if there is not None else "missing in b"
        texts.append(f"{len(moved):,} of a have another number ({token!r}: {one[token]}, {place})")
    if more:
        texts.append(f"{more:,} are in b alone")
    return "; ".join(texts)


def _of_rules(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Tells how texts are cut, where the tokens are the same."""
    keys = ("normalizer", "pre_tokenizer", "post_processor", "model")
    differ = [key for key in keys if one.get(key) != other.get(key)]
    return f"the same tokens, by other rules: {', '.join(differ)}" if differ else ""
