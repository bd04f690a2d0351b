"""Give a model another maximum length, or the vocabulary of another tokenizer.

Both keep what was learnt where it still means something, and say what they did with the rest.
"""

from copy import deepcopy
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from megabert.convert.hf.reading import LARGEST
from megabert.convert.weight_names import WORDS
from megabert.model.configuration_megabert import MegaBertConfig

POSITIONS = "bert.embeddings.position_embeddings.weight"
BIAS = "decoder.bias"
LARGEST_TABLE = 2**31  # numbers, 8 GiB: 250,000 pieces are the largest vocabularies, 8192 the widest encoders

# One role, by the names that tokenizers give it.
SPECIAL = {name: role for role in ("pad", "unk", "cls", "sep", "mask") for name in (f"[{role.upper()}]", f"<{role}>")}
SPECIAL |= {"<s>": "cls", "</s>": "sep"}

# Bytes as GPT-2's byte-level tokenizers write them: printable ones as they are, the others from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}


class Imported(NamedTuple):
    """initialized, left_out: parameters that the folder lacks or has in vain, by name. vocabulary: what a resizing did."""

    config: MegaBertConfig
    weights: dict[str, Tensor]
    initialized: list[str]
    left_out: list[str]
    vocabulary: str | None = None


def resize_positions(model: Imported, max_length: int) -> Imported:
    """Change how long a text may be, tokens.

    ALiBi has nothing to change. Learned positions: the first rows stay as they are, so that short texts give the same; further
    ones repeat them from the start, as Longformer's authors did (https://arxiv.org/abs/2004.05150, section 5).
    """
    if max_length < 3:
        raise ValueError(f"the maximum length is {max_length}, expected at least 3: [CLS], one token, [SEP].")
    config, weights = deepcopy(model.config), dict(model.weights)
    _check_size("the maximum length", max_length, "max_position_embeddings", config.hidden_size)
    config.max_position_embeddings = max_length
    if config.position == "learned":
        table = weights[POSITIONS]
        weights[POSITIONS] = table[torch.arange(max_length) % len(table)].contiguous()
    return model._replace(config=config, weights=weights)


def resize_vocabulary(model: Imported, old: Tokenizer, new: Tokenizer, multiple: int, seed: int) -> Imported:
    """Give the model the vocabulary of `new`, its rows rounded up to a multiple.

    A piece that both have keeps its row and its bias. Another gets the mean of those that `old` cuts its text into; one that
    `old` cannot cut, and filler rows, begin anew.
    """
    if multiple < 1:
        raise ValueError(f"the vocabulary cannot be rounded up to a multiple of {multiple}.")
    config, weights = deepcopy(model.config), dict(model.weights)
    words, bias = weights[WORDS], weights[BIAS]
    theirs = _meanings(old, len(words))
    pieces = new.get_vocab(with_added_tokens=True)
    rows = -(-(max(pieces.values()) + 1) // multiple) * multiple
    _check_size("the vocabulary, rounded up,", rows, "vocab_size", words.shape[1])
    generator = torch.Generator().manual_seed(seed)
    table = torch.empty(rows, words.shape[1]).normal_(0, config.initializer_range, generator=generator)
    biases = torch.full((rows,), float(bias.min()))  # filler is never to be predicted
    counts = {"shared": 0, "composed": 0, "new": 0}
    for meaning, number in _meanings(new, rows).items():
        sources, kind = _sources(meaning, theirs, old)
        counts[kind] += 1
        if sources:
            table[number], biases[number] = words[sources].mean(dim=0), bias[sources].mean()
    if not counts["shared"]:
        raise ValueError("the two tokenizers share no piece: nothing that the model has learnt would be kept.")
    weights |= {WORDS: table, BIAS: biases}
    config.vocab_size = rows
    pad = _role(new, "pad")
    config.pad_token_id = config.pad_token_id if pad is None else pad
    said = f"{counts['shared']:,} pieces kept, {counts['composed']:,} the mean of old pieces, {counts['new']:,} new"
    return model._replace(config=config, weights=weights, vocabulary=said)


def _check_size(what: str, rows: int, name: str, width: int) -> None:
    """Raises ValueError, before anything of that size is allocated, for one that is absurd."""
    most = min(LARGEST[name], LARGEST_TABLE // width)
    if rows > most:
        raise ValueError(f"{what} is {rows:,}, expected at most {most:,} at width {width}.")


Meaning = tuple[
    str, bool, bool
]  # its text; whether it begins a word; whether it is a special token, and the text its role


def _meanings(tokenizer: Tokenizer, rows: int) -> dict[Meaning, int]:
    """What each piece of a tokenizer stands for, whatever marks words in it. Raises ValueError for an id without a row."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if (highest := max(vocabulary.values())) >= rows:
        raise ValueError(
            f"the tokenizer has the id {highest}, the model only {rows} rows: they do not belong together."
        )
    style = _style(vocabulary)
    found: dict[Meaning, int] = {}
    for piece, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        found.setdefault(_meaning(piece, style), number)
    return found


def _style(vocabulary: dict[str, int]) -> str:
    """How most pieces of a vocabulary mark words: ## on what continues one, or a sign on what begins one."""
    counts = {mark: sum(piece.startswith(mark) for piece in vocabulary) for mark in ("##", "\u2581", "\u0120")}
    return max(counts, key=counts.__getitem__)


def _meaning(piece: str, style: str) -> Meaning:
    if piece in SPECIAL:
        return SPECIAL[piece], False, True
    if style == "##":
        return piece.removeprefix("##"), not piece.startswith("##"), False
    begins = piece.startswith(style) and piece != style
    text = piece.removeprefix(style) if begins else piece
    if style == "\u0120" and all(sign in BYTES for sign in text):
        text = bytes(BYTES[sign] for sign in text).decode(errors="replace")
    return text, begins, False


def _sources(meaning: Meaning, theirs: dict[Meaning, int], old: Tokenizer) -> tuple[list[int], str]:
    """The old rows that a new piece is made of, and which kind of piece it is."""
    if meaning in theirs:
        return [theirs[meaning]], "shared"
    text, begins, special = meaning
    unknown = theirs.get(("unk", False, True))
    ids = [] if special or not text.strip() else old.encode(text, add_special_tokens=False).ids
    if not begins:  # the middle of a word: prefer the pieces that continue one
        continued = theirs.get((text.lower(), False, False))
        ids = [continued] if continued is not None else ids
    if not ids or unknown in ids:
        return [], "new"
    return ids, "composed"


def _role(tokenizer: Tokenizer, role: str) -> int | None:
    found = (tokenizer.token_to_id(name) for name, what in SPECIAL.items() if what == role)
    return next((number for number in found if number is not None), None)
