"""Export a checkpoint to a folder that transformers loads, and prove that it does.

BERT becomes transformers' own BertForMaskedLM. Anything else becomes a folder with its modelling code in it (a copy of
megabert/model), which loads with trust_remote_code=True where megabert is not installed. export_check.py then has a fresh process without
megabert load the folder and reproduce the checkpoint's logits; otherwise the folder is removed.
"""

import hashlib
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import BertConfig

from megabert.convert.check import export_check
from megabert.convert.hf.folder import MODEL_CODE, check_shard_size, write_config, write_weights
from megabert.convert.hf.model_card import model_card, read_numbers
from megabert.convert.hf.tokenizer import copy_tokenizer
from megabert.convert.to_onnx import check_installed, write_onnx
from megabert.convert.weight_names import to_published
from megabert.convert.zero import averaged, read_checkpoint
from megabert.files.atomic import replace_folder, staged_folder
from megabert.files.checkpoint_format import MANIFEST, State, find_checkpoint
from megabert.model.configuration_megabert import MegaBertConfig


@dataclass(frozen=True)
class Wish:
    """average: take the mean of this many checkpoints; onnx: write onnx/model.onnx too; max_shard_size: of a weights file."""

    average: int = 1
    onnx: bool = False
    max_shard_size: str = "5GB"

    def __post_init__(self):
        check_shard_size(self.max_shard_size)


def export(checkpoint: Path, out: Path, wish: Wish = Wish()) -> dict[str, Any]:
    """Export a checkpoint; returns what the gate measured. An export of this very checkpoint, every file unchanged, is reused.

    Raises ValueError if there is no whole checkpoint, if `out` holds something else, or if the gate fails, in which case
    nothing is left at `out`.
    """
    checkpoint = checkpoint.resolve()  # its run, whose numbers are read, may be above the folder that we are called in
    name, out = str(out), out.resolve()  # a link to a folder may be there
    fingerprint = export_fingerprint(checkpoint, wish)
    receipt = export_check.read_receipt(out)
    if (
        receipt
        and receipt["checkpoint"] == fingerprint
        and "measured" in receipt
        and not export_check.difference(out, receipt)
    ):
        return receipt["measured"] | {"reused": True}
    check_replaceable(out, receipt)
    if wish.onnx:
        check_installed()
    weights, config, state = read_checkpoint(checkpoint, wish.average)
    with staged_folder(out) as folder:
        parameters = write_folder(folder, weights, config, state, find_checkpoint(checkpoint), wish)
        export_check.write_receipt(folder, fingerprint, config.max_position_embeddings, parameters)
        del weights, parameters  # the gate's process holds them once more
        measured = export_check.check(folder, name)
        replace_folder(folder, out)
    return measured


def check_replaceable(out: Path, receipt: dict[str, Any] | None) -> None:
    """Raises ValueError if there is more at `out` than an export of ours. receipt: the export's, if there is one."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if receipt is None:
        raise ValueError(f"{out}: is not empty and not an export of ours; choose another folder.")
    if added := export_check.added_files(out, receipt):
        raise ValueError(
            f"{out / added[0]}: was added to the export that is there, and would be lost. Choose another folder, or remove it."
        )


def export_fingerprint(checkpoint: Path, wish: Wish) -> str:
    """Name the checkpoints, the code and the wishes that an export is made of."""
    code = [*sorted(MODEL_CODE.glob("*.py")), *sorted(Path(__file__).parent.rglob("*.py"))]
    files = [*(folder / MANIFEST for folder in averaged(checkpoint, wish.average)), *code]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files) + repr(wish).encode()).hexdigest()


def is_native(config: MegaBertConfig) -> bool:
    """Whether transformers' own BERT computes this architecture."""
    return config.position == "learned" and config.ffn == "gelu"


def bert_config(config: MegaBertConfig) -> BertConfig:
    """The same architecture in transformers' words."""
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "type_vocab_size",
        "max_position_embeddings", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout",
        "initializer_range", "pad_token_id",
    )  # fmt: skip
    settings = {name: getattr(config, name) for name in same}
    return BertConfig(hidden_act="gelu", architectures=["BertForMaskedLM"], **settings)


def write_folder(
    out: Path, weights: dict[str, Tensor], config: MegaBertConfig, state: State, checkpoint: Path, wish: Wish
) -> dict[str, Tensor]:
    """Write everything but the receipt. Returns the weights by the names that they have in the folder."""
    copy_tokenizer(checkpoint, out, state.max_seq_len)
    config = deepcopy(config)
    config.padding = "unpadded"  # which changes no output, only what it costs
    model = export_check.build(weights, config)
    export_check.record(model, out, checkpoint)
    if wish.onnx:
        write_onnx(model, out)
    if is_native(config):
        weights = to_published(weights, "bert", copies=False)
        bert_config(config).save_pretrained(out)
    else:
        write_config(out, config)
    write_weights(out, weights, wish.max_shard_size)
    numbers = read_numbers(checkpoint.parents[1], state.step)
    num_parameters = sum(tensor.numel() for tensor in weights.values())
    card = model_card(config, state, numbers, num_parameters, is_native(config), wish.average)
    (out / "README.md").write_text(card)
    return weights
