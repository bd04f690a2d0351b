"""Change a model's maximum length, or its vocabulary to that of another tokenizer, keeping what was learnt."""

from copy import deepcopy
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from megabert.convert.hf.reader import MAX_SIZES
from megabert.convert.weight_names import WORD_EMBEDDINGS
from megabert.model.configuration_megabert import MegaBertConfig

POSITION_EMBEDDINGS = "bert.embeddings.position_embeddings.weight"
DECODER_BIAS = "decoder.bias"
# The largest table has 8 GiB in fp32. The largest vocabularies have 250,000 tokens, the widest encoders 8192
# dimensions.
MAX_TABLE_NUMEL = 2**31

# The role of each special token, by the names that tokenizers use for it.
SPECIAL_ROLES = {
    name: role for role in ("pad", "unk", "cls", "sep", "mask") for name in (f"[{role.upper()}]", f"<{role}>")
}
SPECIAL_ROLES |= {"<s>": "cls", "</s>": "sep", "<bos>": "cls", "<eos>": "sep"}

# GPT-2's byte-level tokenizers write printable bytes as themselves, and the others as characters from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + index): byte for index, byte in enumerate(_OTHERS)}


class ImportedModel(NamedTuple):
    """A model in our names.

    initialized: parameters that the source lacks; unused: parameters of the source that the model does not have;
    vocabulary: what was done with the tokenizer, in words. reused: it was read from a finished import.
    """

    config: MegaBertConfig
    weights: dict[str, Tensor]
    initialized: list[str]
    unused: list[str]
    vocabulary: str | None = None
    reused: bool = False


def resize_positions(model: ImportedModel, max_length: int) -> ImportedModel:
    """Change the maximum length of a text, in tokens.

    With ALiBi only the config changes. The first rows of learned positions stay, so that short texts give the same
    output; additional rows repeat them from the start, as in Longformer (https://arxiv.org/abs/2004.05150, section 5).
    """
    if max_length < 3:
        raise ValueError(f"the maximum length is {max_length}, expected at least 3: [CLS], one token, [SEP].")
    config, weights = deepcopy(model.config), dict(model.weights)
    _check_size("the maximum length", max_length, "max_position_embeddings", config.hidden_size)
    config.max_position_embeddings = max_length
    if config.position == "learned":
        first, table = weights[POSITION_EMBEDDINGS].split(
            [config.position_offset, model.config.max_position_embeddings]
        )
        weights[POSITION_EMBEDDINGS] = torch.cat([first, table[torch.arange(max_length) % len(table)]])
    return model._replace(config=config, weights=weights)


def change_rope_theta(model: ImportedModel, theta: float) -> ImportedModel:
    """Change RoPE's theta in global layers, for training on longer texts; local layers keep theirs.

    Raises ValueError for a model without RoPE.
    """
    config = deepcopy(model.config)
    if config.position != "rope":
        raise ValueError(f"--rope-theta: the model's position is {config.position}, not rope. Leave it out.")
    if config.global_attention_every > 1 and config.local_rope_theta is None:
        config.local_rope_theta = config.rope_theta
    config.rope_theta = theta
    return model._replace(config=config)


def resize_vocabulary(model: ImportedModel, old: Tokenizer, new: Tokenizer, multiple: int, seed: int) -> ImportedModel:
    """Change the vocabulary to that of `new`, its number of rows rounded up to a multiple.

    A token that both vocabularies have keeps its row and its bias. Another token gets the mean of the rows of those
    that `old` splits its text into. Tokens that `old` cannot split and the rows added by rounding are initialized.
    """
    if multiple < 1:
        raise ValueError(f"the vocabulary cannot be rounded up to a multiple of {multiple}.")
    config, weights = deepcopy(model.config), dict(model.weights)
    old_rows, old_bias = weights[WORD_EMBEDDINGS], weights[DECODER_BIAS]
    old_ids = _index_meanings(old, len(old_rows))
    num_rows = -(-(max(new.get_vocab(with_added_tokens=True).values()) + 1) // multiple) * multiple
    _check_size("the vocabulary, rounded up,", num_rows, "vocab_size", old_rows.shape[1])
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(num_rows, old_rows.shape[1]).normal_(0, config.initializer_range, generator=generator)
    # With the smallest old bias, the rows added by rounding are never predicted.
    bias = torch.full((num_rows,), float(old_bias.min()))
    counts = {"shared": 0, "composed": 0, "new": 0}
    for meaning, number in _index_meanings(new, num_rows).items():
        sources, origin = _find_source_rows(meaning, old_ids, old)
        counts[origin] += 1
        if sources:
            rows[number], bias[number] = old_rows[sources].mean(dim=0), old_bias[sources].mean()
    if not counts["shared"]:
        raise ValueError(
            "the two tokenizers have no token in common, so nothing that the model has learnt would be kept."
        )
    weights |= {WORD_EMBEDDINGS: rows, DECODER_BIAS: bias}
    config.vocab_size = num_rows
    pad = find_special(new, "pad")
    config.pad_token_id = config.pad_token_id if pad is None else pad
    numbers = {origin: f"{count:,}" for origin, count in counts.items()}
    summary = "{shared} tokens kept, {composed} the mean of old tokens, {new} initialized".format(**numbers)
    return model._replace(config=config, weights=weights, vocabulary=summary)


def _check_size(what: str, rows: int, name: str, width: int) -> None:
    """Raise ValueError for an excessive size, before anything of that size is allocated."""
    most = min(MAX_SIZES[name], MAX_TABLE_NUMEL // width)
    if rows > most:
        raise ValueError(f"{what} is {rows:,}, expected at most {most:,} at width {width}.")


class Meaning(NamedTuple):
    """What a token stands for, however its tokenizer writes it. text: a special token's role."""

    text: str
    begins_word: bool
    is_special: bool


def _index_meanings(tokenizer: Tokenizer, rows: int) -> dict[Meaning, int]:
    """Map the meaning of each token to its lowest id. Raises ValueError if an id has no row."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if (highest := max(vocabulary.values())) >= rows:
        raise ValueError(
            f"the tokenizer has the id {highest}, but the model has only {rows} rows: they do not belong together."
        )
    marker = _find_word_marker(vocabulary)
    found: dict[Meaning, int] = {}
    for token, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        found.setdefault(_parse_meaning(token, marker), number)
    return found


def _find_word_marker(vocabulary: dict[str, int]) -> str:
    """Find how most tokens mark words: ## before the continuation of a word, or a sign before its beginning."""
    counts = {marker: sum(token.startswith(marker) for token in vocabulary) for marker in ("##", "\u2581", "\u0120")}
    return max(counts, key=counts.__getitem__)


def _parse_meaning(token: str, marker: str) -> Meaning:
    if token in SPECIAL_ROLES:
        return Meaning(SPECIAL_ROLES[token], False, True)
    if marker == "##":
        return Meaning(token.removeprefix("##"), not token.startswith("##"), False)
    begins_word = token.startswith(marker) and token != marker
    text = token.removeprefix(marker) if begins_word else token
    if marker == "\u0120" and all(sign in BYTES for sign in text):
        text = bytes(BYTES[sign] for sign in text).decode(errors="replace")
    return Meaning(text, begins_word, False)


def _find_source_rows(meaning: Meaning, old_ids: dict[Meaning, int], old: Tokenizer) -> tuple[list[int], str]:
    """Find the old rows that make a new token's row, and the token's origin: shared, composed or new."""
    if meaning in old_ids:
        return [old_ids[meaning]], "shared"
    text, begins_word, is_special = meaning
    unknown = old_ids.get(Meaning("unk", False, True))
    ids = [] if is_special or not text.strip() else old.encode(text, add_special_tokens=False).ids
    # A token that continues a word is preferred to the one that begins it.
    if not begins_word:
        continuation = old_ids.get(Meaning(text.lower(), False, False))
        ids = [continuation] if continuation is not None else ids
    if not ids or unknown in ids:
        return [], "new"
    return ids, "composed"


def find_special(tokenizer: Tokenizer, role: str) -> int | None:
    ids = (tokenizer.token_to_id(name) for name, other in SPECIAL_ROLES.items() if other == role)
    return next((number for number in ids if number is not None), None)
