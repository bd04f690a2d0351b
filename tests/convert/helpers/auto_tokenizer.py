"""Load a folder's tokenizer as users of transformers do."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_auto_tokenizer(folder: Path | str, **options: object) -> PreTrainedTokenizerBase:
    """Return AutoTokenizer's tokenizer of a folder. Its own type also allows None, which no folder gives."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
