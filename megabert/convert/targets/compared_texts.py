"""Make the texts with which targets are compared, and store what the checkpoint's encoder gives for them."""

import json
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from megabert.convert.check.export_check import EXPECTED_OUTPUTS
from megabert.convert.hf.writer import save_tensors
from megabert.convert.targets.target import DiffersError, Expected, batches
from megabert.data.shards.manifest import TOKENIZER
from megabert.data.shards.tokenizer import rust_errors_as_value_error
from megabert.model.modeling_megabert import MegaBertModel

# Written only if there are targets. The texts are stored, so that another version can repeat the comparison.
TEXTS = "target_check.json"
ANSWERS = "target_check.safetensors"

NUM_TEXTS = 1000
# The number of further lines of which only the ids are compared.
NUM_LINES = 10_000
# The longest text has this many tokens, if the model reads that many.
LONGEST = 512
MARKERS = ("##", "\u2581", "\u0120")
PUNCTUATION = ", . ; : ! ? ' \" ( ) - / & % $ # @ * + = < > [ ] _ ~".split()
# First and last character of blocks of letters: Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic, Devanagari, Thai,
# Georgian, more Latin and Greek, signs, kana, Chinese, Korean, full-width forms, emoji.
SCRIPTS = (
    (0xC0, 0x24F), (0x391, 0x3CE), (0x400, 0x45F), (0x531, 0x556), (0x5D0, 0x5EA), (0x621, 0x64A), (0x905, 0x939),
    (0xE01, 0xE2E), (0x10D0, 0x10F0), (0x1E00, 0x1EFF), (0x1F00, 0x1F15), (0x2190, 0x21FF), (0x3041, 0x3096),
    (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xFF01, 0xFF5E), (0x1F600, 0x1F64F),
)  # fmt: skip


def make_texts(tokenizer: Tokenizer, count: int, longest: int, seed: int = 17) -> list[str]:
    """Make texts of words of the vocabulary, in small and capital letters, with letters of many scripts.

    Most are short, because a comparison computes all of them; one in a hundred has up to `longest` tokens. The same
    tokenizer, count, longest and seed give the same texts.
    """
    rng = random.Random(seed)
    words = _words(tokenizer)
    texts = []
    for number in range(count):
        size = rng.randint(longest // 8, longest) if number % 100 == 0 else min(12, 1 + int(rng.expovariate(0.4)))
        texts.append(" ".join(_word(rng, words) for _ in range(size)))
    return texts


def _words(tokenizer: Tokenizer) -> list[str]:
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokens = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    words = [token for token, _ in tokens if token not in special]
    for marker in MARKERS:
        words = [word.removeprefix(marker) for word in words]
    # A byte-level vocabulary writes other letters as bytes; and specials must not appear inside a word.
    return [word for word in words if word.isalnum()] or ["a"]


def _word(rng: random.Random, words: list[str]) -> str:
    kind = rng.random()
    if kind < 0.08:
        return rng.choice(PUNCTUATION)
    if kind < 0.16:
        first, last = rng.choice(SCRIPTS)
        letters = (chr(rng.randint(first, last)) for _ in range(rng.randint(1, 5)))
        return "".join(letter for letter in letters if letter.isprintable()) or "x"
    word = rng.choice(words) + (rng.choice(words) if kind < 0.3 else "")
    if kind > 0.97:
        return unicodedata.normalize("NFD", word)
    if kind > 0.85:
        return word.upper() if kind > 0.95 else word.capitalize()
    return word + (rng.choice(PUNCTUATION[:6]) if kind > 0.75 else "")


def read_tokenizer(folder: Path, max_length: int) -> Tokenizer:
    """Read a folder's tokenizer, cutting texts at max_length tokens and padding none.

    Raises ValueError if it is damaged.
    """
    with rust_errors_as_value_error(str(folder / TOKENIZER)):
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def write_expected(encoder: MegaBertModel, folder: Path, max_length: int) -> None:
    """Write the texts and the states that the checkpoint's encoder gives for them. The export check's must exist.

    Raises OSError if they cannot be written, for example because the disk is full.
    """
    tokenizer = read_tokenizer(folder, max_length)
    texts = make_texts(tokenizer, NUM_TEXTS, min(LONGEST, max_length))
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    pooled = np.zeros((len(texts), encoder.config.hidden_size), dtype=np.float32)
    with torch.no_grad():
        for group, rows, mask in batches(ids, encoder.config.pad_token_id or 0):
            states = encoder(torch.from_numpy(rows), torch.from_numpy(mask)).last_hidden_state
            real = torch.from_numpy(mask)[:, :, None].to(states.dtype)
            pooled[group] = ((states * real).sum(dim=1) / real.sum(dim=1)).float().numpy()
        inputs = load_file(folder / EXPECTED_OUTPUTS)
        states = encoder(*(torch.from_numpy(inputs[name]) for name in ("input_ids", "attention_mask")))
    real_states = states.last_hidden_state[torch.from_numpy(inputs["attention_mask"]).bool()].float()
    save_tensors({"pooled": torch.from_numpy(pooled), "states": real_states}, folder / ANSWERS)
    # safetensors creates files that only their owner can read.
    (folder / ANSWERS).chmod((folder / TOKENIZER).stat().st_mode)
    (folder / TEXTS).write_text(json.dumps(texts, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def read_expected(folder: Path, max_length: int) -> Expected:
    """Read what write_expected() wrote; the ids are the tokenizer's again."""
    texts: Any = json.loads((folder / TEXTS).read_text(encoding="utf-8"))
    ids = [encoding.ids for encoding in read_tokenizer(folder, max_length).encode_batch(texts)]
    answers = load_file(folder / ANSWERS)
    return Expected(texts, ids, answers["pooled"], load_file(folder / EXPECTED_OUTPUTS), answers["states"])


def check_ids(folder: Path, expected: Expected, length: int) -> None:
    """Raise DiffersError if the folder's tokenizer gives other ids for the texts of at most `length` tokens."""
    encodings = read_tokenizer(folder, length).encode_batch(expected.texts)
    for text, encoding, wanted in zip(expected.texts, encodings, expected.ids, strict=True):
        if encoding.ids != wanted and len(wanted) <= length:
            raise DiffersError(f"the tokenizer gives other ids for {text[:60]!r}")


def make_lines(folder: Path) -> list[str]:
    """Make the lines whose ids another program must give too, of the folder's vocabulary."""
    return make_texts(Tokenizer.from_file(str(folder / TOKENIZER)), NUM_LINES, LONGEST // 8, seed=18)


def lines_with_ids(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield those lines and their ids, which are never cut."""
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    lines = make_lines(folder)
    for line, encoding in zip(lines, tokenizer.encode_batch(lines), strict=True):
        yield line, encoding.ids
