"""Train a sentencepiece tokenizer on a corpus, with BERT's special tokens, and write it as transformers reads it.

python data_prep/train_tokenizer.py --source data/quickstart/text --out data/quickstart/tokenizer
"""

import hashlib
import io
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data_prep.sources import ReadOptions, list_units, read_unit, stamps
from megabert import flags
from megabert.data.manifest import TOKENIZER, write_atomically
from megabert.data.sample_format import SPECIAL_TOKENS

META = "\u2581"  # sentencepiece's mark for a space


@dataclass(frozen=True, kw_only=True)
class Options:
    source: str = "docstrings"
    """text: docstrings, a folder of text shards, or .txt and .jsonl files"""
    out: str = "data/quickstart/tokenizer"
    """folder to write tokenizer.json, tokenizer_config.json and tokenizer.model to"""
    vocab_size: int = 8192
    """pieces, special tokens included"""
    model: Literal["unigram", "bpe"] = "unigram"
    """sentencepiece's model"""
    lowercase: bool = True
    """fold case, as bert-base-uncased does"""
    sample_bytes: int = 10_000_000
    """text to learn from, bytes; more takes longer and changes little"""
    text_key: str = "text"
    """the field of a .jsonl line that holds the text"""
    seed: int = 0
    """seed of the sample"""


def sample_lines(options: Options) -> Iterator[str]:
    """Yield lines of whole units in random order, until sample_bytes are read."""
    units = list_units(options.source, ReadOptions(options.text_key))
    random.Random(options.seed).shuffle(units)
    read = 0
    for unit in units:
        for document in read_unit(unit, ReadOptions(options.text_key)):
            for line in document.splitlines():
                if line := line.strip():
                    read += len(line.encode())
                    yield line
        if read >= options.sample_bytes:
            return


def train(options: Options) -> bytes:
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


def as_tokenizer(sentencepiece_model: bytes) -> Tokenizer:
    """Rebuild a sentencepiece model as a fast tokenizer that gives the same ids, and adds [CLS] and [SEP]."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model)  # pyrefly: ignore[missing-attribute]
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=proto.trainer_spec.unk_id, byte_fallback=False))
    else:
        ids = {piece: number for number, (piece, _) in enumerate(scores)}
        tokenizer = Tokenizer(models.BPE(ids, _merges(ids), unk_token=SPECIAL_TOKENS["unk"], fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=META, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=META, prepend_scheme="always")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    cls, sep = (SPECIAL_TOKENS[name] for name in ("cls", "sep"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    return tokenizer


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary: each piece from every pair of pieces it can be made of, best first."""
    merges = []
    for piece, rank in ids.items():
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(rank, ids[a], ids[b], a, b) for a, b in halves if a in ids and b in ids]
    return [(a, b) for *_, a, b in sorted(merges)]


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the tokenizer_config.json that makes AutoTokenizer load it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TOKENIZER, tokenizer.to_str(pretty=False).encode())
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=1).encode())


def main(argv: list[str] | None = None) -> None:
    options = flags.read_flags(Options, "train_tokenizer.py", __doc__ or "", argv)
    folder = Path(options.out)
    request = hashlib.sha256(
        repr((options, stamps(list_units(options.source, ReadOptions(options.text_key))))).encode()
    ).hexdigest()
    marker = folder / "request"
    if (folder / TOKENIZER).is_file() and marker.is_file() and marker.read_text() == request:
        print(f"{folder / TOKENIZER}: already trained on this, reused")
        return
    marker.unlink(missing_ok=True)  # whatever is there now is not what was asked for
    model = train(options)
    tokenizer = as_tokenizer(model)
    write_tokenizer(tokenizer, folder)
    write_atomically(folder / "tokenizer.model", model)
    write_atomically(marker, request.encode())
    print(f"{folder / TOKENIZER}: {tokenizer.get_vocab_size()} pieces ({options.model})")


if __name__ == "__main__":
    flags.run(main, sys.argv[0])
