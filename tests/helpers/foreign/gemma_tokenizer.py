"""Write a tokenizer with the parts of Gemma's, as mmBERT has it, trained on some texts."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# Of a small ModernBERT for such a tokenizer.
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
# Added tokens of Gemma's that are ordinary text, two of them with the names of RoBERTa's special tokens.
PLAIN = ["<2mass>", "[@BOS@]", "<s>", "</s>"]
ROLES = {
    "bos": "<bos>",
    "eos": "<eos>",
    "cls": "<bos>",
    "sep": "<eos>",
    "pad": "<pad>",
    "unk": "<unk>",
    "mask": "<mask>",
}


def write_gemma_tokenizer(folder: Path, texts: list[str]) -> None:
    """Train BPE with a row for every byte; spaces are U+2581, and its special tokens are the first ids."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    spaces = decoders.Replace("\u2581", " ")
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
    pieces = [*SPECIAL, *PLAIN, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines()), trainer)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in SPECIAL + PLAIN]
    for token in raw["added_tokens"]:
        token["special"] = token["content"] in SPECIAL[:-1]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    names = {f"{role}_token": token for role, token in ROLES.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
