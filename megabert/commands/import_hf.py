"""Turn a Hugging Face folder (BERT, the published MosaicBERT, or ours) into one to pretrain or fine-tune with.

{command} bert-base-uncased/ runs/bert-start
{command} bert-base-uncased/ longer --max-length 1024 --tokenizer data/my-tokenizer

Then pretrain with --recipe bert-base --model.init_from runs/bert-start, or fine-tune with --checkpoint runs/bert-start.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megabert.config import cli


@dataclass(frozen=True)
class Options:
    source: str
    """folder with config.json and model.safetensors or pytorch_model.bin"""
    out: str
    """folder to write"""
    max_length: int | None = None
    """longest input of the new model, tokens; additional learned positions repeat the first ones"""
    tokenizer: str | None = None
    """folder or tokenizer.json: give the model this vocabulary, and keep the embeddings of pieces that both have"""
    pad_vocab_to_multiple_of: int = 64
    """with --tokenizer: round the embedding rows up to a multiple, as the recipe's model.pad_vocab_to_multiple_of"""
    seed: int = 17
    """seed for parameters that are missing in the source"""


def main(prog: str) -> None:
    options = cli.read_flags(Options, prog, __doc__ or "")
    # Imported after the flags are read: torch takes seconds to load.
    from megabert.convert.from_hf import Change, convert

    change = Change(options.max_length, options.tokenizer, options.pad_vocab_to_multiple_of, options.seed)
    model = convert(Path(options.source), Path(options.out), change)
    config = model.config
    num_parameters = sum(tensor.numel() for tensor in model.weights.values())
    print(
        f"{options.out}: {config.num_hidden_layers} layers x {config.hidden_size}, {config.position}, {config.ffn}, "
        f"{config.vocab_size:,} rows of vocabulary, {num_parameters:,} parameters"
    )
    print(f"initialized, for the folder lacks them: {', '.join(model.initialized) or 'none'}")
    print(f"left out, for this model has no place for them: {', '.join(model.left_out) or 'none'}")
    if model.vocabulary:
        print(f"vocabulary: {model.vocabulary}")


def command(prog: str = "megabert-import") -> NoReturn:
    cli.run(lambda: main(prog), prog)


if __name__ == "__main__":
    command()
