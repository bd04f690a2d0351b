"""Convert a Hugging Face folder of a BERT or a MosaicBERT to a MegaBERT folder, to pretrain or fine-tune from.

python launch/convert_from_hf.py bert-base-uncased/ runs/bert-start
deepspeed launch/pretrain.py --ds_config ds_configs/zero2.json --recipe bert-base --model.init_from runs/bert-start ...
python launch/convert_from_hf.py bert-base-uncased/ longer --max-length 1024 --tokenizer data/my-tokenizer
"""

from dataclasses import dataclass
from pathlib import Path

from megabert.config import cli


@dataclass(frozen=True)
class Options:
    source: str
    """folder with config.json and model.safetensors or pytorch_model.bin"""
    out: str
    """folder to write"""
    max_length: int | None = None
    """maximum length of a text, tokens; additional learned positions repeat the first ones"""
    tokenizer: str | None = None
    """folder or tokenizer.json with a new vocabulary; tokens that the old one has, too, keep their embeddings"""
    pad_vocab_to_multiple_of: int = 64
    """with --tokenizer: round the vocabulary up to this multiple, as model.pad_vocab_to_multiple_of in the recipe"""
    seed: int = 17
    """seed of the parameters that are initialized"""


def main() -> None:
    options = cli.read_flags(Options, "launch/convert_from_hf.py", __doc__ or "")
    # Imported only now, because torch takes seconds to load and wrong flags should fail at once.
    from megabert.convert.from_hf import ImportOptions, import_model

    model = import_model(
        Path(options.source),
        Path(options.out),
        ImportOptions(options.max_length, options.tokenizer, options.pad_vocab_to_multiple_of, options.seed),
    )
    config = model.config
    num_parameters = sum(tensor.numel() for tensor in model.weights.values())
    print(
        f"{options.out}: {config.num_hidden_layers} layers x {config.hidden_size}, {config.position}, {config.ffn}, "
        f"{config.vocab_size:,} rows of vocabulary, {num_parameters:,} parameters"
    )
    print(f"not in the source folder, initialized: {', '.join(model.initialized) or 'none'}")
    print(f"in the source folder but unused: {', '.join(model.unused) or 'none'}")
    if model.vocabulary:
        print(f"vocabulary: {model.vocabulary}")


if __name__ == "__main__":
    cli.run(main, "launch/convert_from_hf.py")
