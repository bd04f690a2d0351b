"""Write tokenizers whose special tokens have the names of RoBERTa's, or names of their own."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ROBERTA = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
OWN = {"unk": "<|unknown|>", "mask": "<|mask|>", "cls": "<|begin|>", "sep": "<|end|>", "pad": "<|fill|>"}
KINDS = {"roberta": ROBERTA, "own": OWN}


def write_named_tokenizer(folder: Path, names: dict[str, str], texts: list[str], vocab_size: int = 800) -> None:
    """Train BPE of bytes whose special tokens are the first ids, in the order of `names`.

    tokenizer_config.json gives the roles, of which those of [CLS] and [SEP] have no token in RoBERTa's way: the
    post-processor alone says what begins and ends a text.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=names["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(names.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines()), trainer)
    cls, sep = names["cls"], names["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B {sep}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    roles = {f"{role}_token": names[role] for role in ("pad", "unk", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)


def write_large_tokenizer(folder: Path, texts: list[str], vocab_size: int) -> None:
    """Write RoBERTa's names and vocab_size pieces, most of which no text has, so that texts have the highest ids."""
    write_named_tokenizer(folder, ROBERTA, texts)
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    vocabulary = raw["model"]["vocab"]
    gap = vocab_size - len(vocabulary)
    special = set(ROBERTA.values())
    moved = {token: number if token in special else number + gap for token, number in vocabulary.items()}
    raw["model"]["vocab"] = moved | {f"\u4e00{number}": number + len(special) for number in range(gap)}
    path.write_text(json.dumps(raw))
