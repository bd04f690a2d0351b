"""Check on a few documents that their token ids were made with a tokenizer."""

import itertools
from pathlib import Path

from data_prep.sources.base import InputSplit, LeftOut, ReadOptions
from data_prep.sources.tokens import datatrove, read_token_split
from data_prep.sources.tokens.ids import IdRule
from megabert.data.shards.tokenizer import encode, read_tokenizer

# At most this many documents of each input split are looked at.
DOCUMENTS = 100
# Documents with more tokens are not tokenized again.
TOKENS = 2048
EXAMPLE_CHARS = 60
# Share of documents whose text gets the same ids again. It was 0.90 to 1 with the right tokenizer; with one whose ids
# were shuffled 0 (BPE), 0.31 (WordPiece) and 0.54 to 0.63 (unigram). A right one that does not restore its text may be
# below; then only a reader of the text can tell.
ENOUGH = 0.75


def check_tokenizer(splits: list[InputSplit], options: ReadOptions, rule: IdRule, path: Path, trusted: bool) -> str:
    """Tokenize the text of some documents again. Returns a sentence about the result, with the beginning of a document.

    trusted: whether the user says that the tokenizer is the right one. Raises ValueError if the ids do not look like
    those of this tokenizer, and it is not trusted.
    """
    tokenizer = read_tokenizer(path)
    documents: list[list[int]] = []
    for split in dict.fromkeys((splits[0], splits[len(splits) // 2], splits[-1])):
        for batch in itertools.islice(read_token_split(split, options, rule, LeftOut(True)), 1):
            ends = batch.lengths.cumsum()
            spans = zip((ends - batch.lengths)[:DOCUMENTS].tolist(), ends.tolist(), strict=False)
            documents += [batch.ids[a:b].tolist() for a, b in spans if a < b <= a + TOKENS]
    if not documents:
        return f"{splits[0].paths[0]}: no document is short enough to compare it with {path}"
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in documents]
    share = sum(a == b for a, b in zip(documents, encode(tokenizer, texts), strict=True)) / len(documents)
    found = f"the ids of {share:.0%} of {len(documents)} documents are those that {path} gives their text"
    where, example = splits[0].paths[0], repr(texts[0][:EXAMPLE_CHARS])
    if share < ENOUGH and not trusted:
        name = datatrove.tokenizer_name(Path(where)) if splits[0].kind == "datatrove" else None
        raise ValueError(
            f"{where}: {found}; one begins with {example}. If that is no sensible text, they were made with another "
            f"tokenizer: pass {name or 'that one'} as --tokenizer. If it is, this tokenizer does not restore its text "
            "exactly: pass --trust-tokenizer, too."
        )
    return f"{where}: {found}; one begins with {example}"
