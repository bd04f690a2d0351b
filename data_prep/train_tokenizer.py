"""Learn a tokenizer from a corpus, or take an existing one, and write it as transformers reads it.

    python data_prep/train_tokenizer.py --source data/quickstart/text --out data/quickstart/tokenizer
    python data_prep/train_tokenizer.py --existing bert-base-uncased/vocab.txt --out data/bert/tokenizer

All have BERT's five special tokens. One that comes from sentencepiece is compared with it on the corpus, and the lines
to which the two give different ids are counted.
"""

import hashlib
import io
import itertools
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import sentencepiece
from tokenizers import Tokenizer, models, processors, trainers

from data_prep.sources import ReadOptions, list_units, read_unit, stamps
from data_prep.tokenizer.existing import LONGEST_WORD, Existing, as_bert_does, load
from data_prep.tokenizer.from_sentencepiece import as_tokenizer, differences, own_symbols
from megabert.config import cli
from megabert.data.shards.manifest import TOKENIZER
from megabert.data.shards.sample_format import SPECIAL_TOKENS
from megabert.data.shards.tokenizer import TOKENIZER_CONFIG, read_tokenizer
from megabert.files.atomic import write_atomically

SAMPLED_UNITS = 16  # a sample is taken from at least so many places of the corpus, if it has them
COMPARED_LINES = 10_000


@dataclass(frozen=True, kw_only=True)
class Options:
    source: str = "docstrings"
    """text, as for write_shards.py: docstrings, a file or folder, text shards, hf:OWNER/NAME"""
    out: str = "data/quickstart/tokenizer"
    """folder to write tokenizer.json and tokenizer_config.json to (from sentencepiece: tokenizer.model too)"""
    existing: str | None = None
    """take this instead of learning: vocab.txt, a sentencepiece .model, tokenizer.json, or a Hugging Face folder"""
    vocab_size: int = 8192
    """pieces, special tokens included"""
    model: Literal["unigram", "bpe", "wordpiece"] = "unigram"
    """sentencepiece's unigram or bpe, or BERT's wordpiece"""
    lowercase: bool = True
    """fold case, as bert-base-uncased does; also of an existing vocab.txt"""
    sample_bytes: int = 10_000_000
    """text to learn from, bytes; more takes longer and changes little"""
    text_key: str = "text"
    """the field (.jsonl) or column (.parquet, hf:) that holds the text"""
    blank_lines: bool = False
    """whether a blank line separates documents of a .txt; otherwise each file is one document"""
    dataset_config: str | None = None
    """configuration of a data set hf:OWNER/NAME, such as en"""
    dataset_split: str = "train"
    """split of a data set hf:OWNER/NAME"""
    seed: int = 0
    """seed of the sample"""

    def __post_init__(self):
        if self.vocab_size <= len(SPECIAL_TOKENS):
            raise ValueError(
                f"vocab_size is {self.vocab_size}, expected more than the {len(SPECIAL_TOKENS)} special tokens."
            )

    @property
    def read(self) -> ReadOptions:
        return ReadOptions(self.text_key, self.blank_lines, self.dataset_config, self.dataset_split)


def sample_lines(options: Options) -> Iterator[str]:
    """Yield lines of units in random order, until sample_bytes are read. Large units give a part only."""
    units = list_units(options.source, options.read)
    random.Random(options.seed).shuffle(units)
    read = 0
    for number, unit in enumerate(units):
        share = (options.sample_bytes - read) / max(1, min(SAMPLED_UNITS, len(units)) - number)
        enough = read + share
        for document in read_unit(unit, options.read):
            for line in document.splitlines():
                if line := line.strip():
                    read += len(line.encode("utf-8", "replace"))
                    yield line
            if read >= enough:
                break
        if read >= options.sample_bytes:
            return


def train(options: Options) -> Existing:
    """Learn a tokenizer. Raises ValueError if the corpus is too small."""
    if options.model == "wordpiece":
        return Existing(train_wordpiece(options))
    model = train_sentencepiece(options)
    return Existing(as_tokenizer(model), model)


def train_wordpiece(options: Options) -> Tokenizer:
    unknown = SPECIAL_TOKENS["unk"]
    tokenizer = Tokenizer(models.WordPiece(unk_token=unknown, max_input_chars_per_word=LONGEST_WORD))
    as_bert_does(tokenizer, options.lowercase)
    trainer = trainers.WordPieceTrainer(
        vocab_size=options.vocab_size,
        min_frequency=2,
        limit_alphabet=1000,  # as BERT's: rarer characters are [UNK]
        special_tokens=list(SPECIAL_TOKENS.values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_lines(options), trainer)
    if tokenizer.get_vocab_size() <= len(SPECIAL_TOKENS):
        raise ValueError(f"{options.source}: has no text to learn from. Use more text.")
    return tokenizer


def train_sentencepiece(options: Options) -> bytes:
    """Train sentencepiece. Returns its model file's bytes. Raises ValueError if the corpus is too small."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sample_lines(options),
            model_writer=model,
            model_type=options.model,
            vocab_size=options.vocab_size,
            normalization_rule_name="nmt_nfkc_cf" if options.lowercase else "nmt_nfkc",
            character_coverage=0.9995,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=SPECIAL_TOKENS["pad"],
            unk_piece=SPECIAL_TOKENS["unk"],
            bos_piece=SPECIAL_TOKENS["cls"],
            eos_piece=SPECIAL_TOKENS["sep"],
            control_symbols=[SPECIAL_TOKENS["mask"]],
            minloglevel=2,
        )
    except RuntimeError as mistake:
        raise ValueError(
            f"{options.source}: sentencepiece cannot learn {options.vocab_size} pieces from it: "
            f"{' '.join(str(mistake).split())} Use more text or a smaller --vocab-size."
        ) from mistake
    return model.getvalue()


def finish(tokenizer: Tokenizer) -> None:
    """Add what is missing of BERT's special tokens, wrap a text in [CLS] and [SEP], and neither cut nor pad."""
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    cls, sep = (SPECIAL_TOKENS[name] for name in ("cls", "sep"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = False


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the tokenizer_config.json that makes AutoTokenizer load it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TOKENIZER, tokenizer.to_str(pretty=False).encode())
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    write_atomically(folder / TOKENIZER_CONFIG, json.dumps(config, indent=1).encode())


def compare(options: Options, sentencepiece_model: bytes) -> str:
    """Encode lines of the corpus with tokenizer.json and with sentencepiece. Returns sentences about it."""
    tokenizer = read_tokenizer(Path(options.out, TOKENIZER))
    lines = list(itertools.islice(sample_lines(options), COMPARED_LINES))
    found = differences(tokenizer, sentencepiece_model, lines)
    said = f"{len(found)} of {len(lines):,} lines of the corpus differ from sentencepiece's own ids"
    said += f", such as {found[0][:80]!r}" if found else ""
    symbols = differences(tokenizer, sentencepiece_model, own_symbols(sentencepiece_model))
    said += f"; user-defined symbols that do: {' '.join(symbols)}" if symbols else ""
    return said + (". See data_prep/README.md" if found or symbols else "")


def what_is_asked(options: Options) -> str:
    """A hash of the request and of what it is to be made of."""
    made_of: list[object] = [options]
    if options.existing:
        path = Path(options.existing)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        made_of += [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    else:
        made_of += stamps(list_units(options.source, options.read))
    return hashlib.sha256(repr(made_of).encode()).hexdigest()


def main(argv: list[str] | None = None) -> None:
    options = cli.read_flags(Options, "train_tokenizer.py", __doc__ or "", argv)
    folder = Path(options.out)
    request = what_is_asked(options)
    marker = folder / "request"
    if (folder / TOKENIZER).is_file() and marker.is_file() and marker.read_text() == request:
        print(f"{folder / TOKENIZER}: already made of this, reused")
        return
    tokenizer, model = load(Path(options.existing), options.lowercase) if options.existing else train(options)
    marker.unlink(missing_ok=True)  # whatever is there now is not what was asked for
    finish(tokenizer)
    write_tokenizer(tokenizer, folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    print(f"{folder / TOKENIZER}: {tokenizer.get_vocab_size()} pieces ({options.existing or options.model})")
    if model is not None:
        write_atomically(folder / "tokenizer.model", model)
        print(compare(options, model))
    write_atomically(marker, request.encode())


def command(prog: str = "megabert-tokenizer") -> NoReturn:
    cli.run(main, prog)


if __name__ == "__main__":
    command(sys.argv[0])
