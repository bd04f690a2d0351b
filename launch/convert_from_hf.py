"""Turn a Hugging Face folder (BERT, the published MosaicBERT, or ours) into one to pretrain or fine-tune with.

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
    """longest text that the model shall take, tokens; further learned positions repeat the first"""
    tokenizer: str | None = None
    """folder or tokenizer.json: give the model this vocabulary, keeping the pieces that both have"""
    pad_vocab_to_multiple_of: int = 64
    """with --tokenizer: round the rows up to a multiple, as the recipe's model.pad_vocab_to_multiple_of will"""
    seed: int = 17
    """seed of the parameters that the folder lacks"""


def main() -> None:
    options = cli.read_flags(Options, "launch/convert_from_hf.py", __doc__ or "")
    from megabert.convert.from_hf import Change, convert  # after the flags: torch takes seconds to load

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


if __name__ == "__main__":
    cli.run(main, "launch/convert_from_hf.py")
