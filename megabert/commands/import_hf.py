"""Convert a Hugging Face folder of a BERT, RoBERTa, DistilBERT, ELECTRA, ModernBERT, GTE or MosaicBERT to ours.

{command} bert-base-uncased/ runs/bert-start
{command} bert-base-uncased/ longer --max-length 1024 --tokenizer data/my-tokenizer

Then pretrain with --recipe bert-base --model.init_from runs/bert-start, or fine-tune with --checkpoint runs/bert-start.
"""

from megabert.process.interrupts import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megabert.config import cli
from megabert.config.settings import required, setting

# A model of the hub: OWNER/NAME, or NAME alone.
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Options:
    source: str
    """folder with config.json and model.safetensors or pytorch_model.bin"""
    out: str = required(is_output=True)
    """folder to write"""
    max_length: int | None = setting(None, "[3, 10000000]")
    """maximum length of a text, tokens; additional learned positions repeat the first ones"""
    rope_theta: float | None = setting(None, "(1, 1e12]")
    """theta of RoPE in global layers, to train on longer texts next; local layers keep theirs"""
    tokenizer: str | None = None
    """folder or tokenizer.json with a new vocabulary; tokens that the old one has, too, keep their embeddings"""
    pad_vocab_to_multiple_of: int = setting(64, "[1, 65536]")
    """with --tokenizer: round the vocabulary up to this multiple, as model.pad_vocab_to_multiple_of in the recipe"""
    seed: int = setting(17, "[0, 2^63)")
    """seed of the parameters that are initialized"""


def main(prog: str) -> None:
    options = cli.read_flags(Options, prog, __doc__ or "")
    source = Path(options.source)
    if source.is_file():
        raise ValueError(f"{source}: is a file, expected the folder of a model: with config.json and its weights.")
    if not source.is_dir():
        hub = f" For the model on the Hugging Face hub, download it first: hf download {source} --local-dir FOLDER"
        raise ValueError(f"{source}: no such folder.{hub if HUB_NAME.fullmatch(options.source) else ''}")
    # Imported after the flags are read: torch takes seconds to load.
    from megabert.convert.from_hf import ImportOptions, import_model
    from megabert.convert.hf.tokenizer import has_tokenizer

    import_options = ImportOptions(
        options.max_length, options.rope_theta, options.tokenizer, options.pad_vocab_to_multiple_of, options.seed
    )
    model = import_model(Path(options.source), Path(options.out), import_options)
    config = model.config
    if model.reused:
        print(f"{options.out}: is already the import of this folder, and its files are unchanged")
    num_parameters = sum(tensor.numel() for tensor in model.weights.values())
    print(
        f"{options.out}: {config.num_hidden_layers} layers x {config.hidden_size}, {config.position}, {config.ffn}, "
        f"{config.vocab_size:,} rows of vocabulary, {num_parameters:,} parameters"
    )
    print(f"not in the source folder, initialized: {', '.join(model.initialized) or 'none'}")
    print(f"in the source folder but unused: {', '.join(model.unused) or 'none'}")
    if model.vocabulary:
        print(f"vocabulary: {model.vocabulary}")
    if not has_tokenizer(Path(options.out)):
        advice = (
            f"tokenizer: none that can be read. If {options.source} has one in another format, convert it with "
            f"data_prep/train_tokenizer.py --existing {options.source} --out FOLDER; then give it to the model with "
            f"launch/convert_from_hf.py --tokenizer FOLDER"
        )
        print(cli.name_commands(advice))


def command(prog: str = "megabert-import") -> NoReturn:
    cli.run(lambda: main(prog), prog)


if __name__ == "__main__":
    command()
