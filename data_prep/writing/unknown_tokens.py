"""Refuse shards with too many [UNK], and name texts that become it."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from megabert.data.shards.sample_format import SPECIAL_TOKENS
from megabert.data.shards.tokenizer import read_tokenizer, special_tokens

EXAMPLES = 5
DOCUMENTS_SEARCHED = 10_000


def check_share(share: float, limit: float, tokenizer: Path, documents: Iterable[str]) -> None:
    """Raise ValueError if the share of [UNK] is above the limit.

    documents: of the corpus, in which examples are looked for.
    """
    if share <= limit:
        return
    examples = ", ".join(map(repr, itertools.islice(unknown_texts(tokenizer, documents), EXAMPLES)))
    such_as = f", such as {examples}" if examples else ""
    raise ValueError(
        f"{tokenizer}: makes {share:.1%} of the tokens of this corpus {SPECIAL_TOKENS['unk']}{such_as}; at "
        f"most {limit:.1%} are allowed. Use a tokenizer that was trained on such text, or if this is intended, pass "
        f"--max-unknown {min(1.0, round(share + 0.01, 2))}: the work that is done is kept."
    )


def unknown_texts(tokenizer_path: Path, documents: Iterable[str]) -> Iterator[str]:
    """Yield different pieces of text that become [UNK]."""
    tokenizer = read_tokenizer(tokenizer_path)
    unknown = tokenizer.token_to_id(special_tokens(tokenizer)["unk"])
    seen: set[str] = set()
    for document in itertools.islice(documents, DOCUMENTS_SEARCHED):
        encoding = tokenizer.encode(document, add_special_tokens=False)
        for number, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            text = document[begin:end].strip()[:20]
            if number == unknown and text and text not in seen:
                seen.add(text)
                yield text
