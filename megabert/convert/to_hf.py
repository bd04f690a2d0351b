"""Export a training checkpoint to a Hugging Face folder, and check that the folder gives the checkpoint's logits."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megabert.convert.check import export_check, export_record
from megabert.convert.check.export_record import Measurements
from megabert.convert.deepspeed_checkpoint import TrainedModel, config_of, find_checkpoints, read_checkpoints
from megabert.convert.gte_files import to_gte_file
from megabert.convert.hf.config import set_max_length, write_native_config
from megabert.convert.hf.heads import head_of
from megabert.convert.hf.model_card import make_model_card, read_metrics_at
from megabert.convert.hf.native import native_class, native_kind
from megabert.convert.hf.reader import read_json
from megabert.convert.hf.tokenizer import copy_tokenizer
from megabert.convert.hf.writer import MAX_SHARD_SIZE, MODEL_CODE, check_shard_size, write_config, write_weights
from megabert.convert.targets import compared_texts, registry
from megabert.convert.weight_names import from_megabert
from megabert.data.shards.manifest import TOKENIZER
from megabert.files.atomic import replace_folder, staged_folder
from megabert.files.checkpoint_format import MANIFEST, read_state
from megabert.files.hashing import file_sha256, texts_sha256
from megabert.model.configuration_megabert import MegaBertConfig

ROBERTA_BIAS, ROBERTA_BIAS_OF_DECODER = "lm_head.bias", "lm_head.decoder.bias"


@dataclass(frozen=True)
class ExportOptions:
    """average: number of checkpoints whose mean is exported; targets: names of other formats, see targets/registry.py.

    max_shard_size: of a weights file, such as 5GB. max_length: of a text, in tokens; None for set_max_length()'s.
    """

    average: int = 1
    targets: tuple[str, ...] = ()
    max_shard_size: str = MAX_SHARD_SIZE
    max_length: int | None = None

    def __post_init__(self):
        check_shard_size(self.max_shard_size)


def export_checkpoint(checkpoint: Path, out: Path, options: ExportOptions = ExportOptions()) -> Measurements:
    """Export a checkpoint, or reuse an unchanged export of the same checkpoint. Returns what the export check measured.

    A model with the architecture of one of transformers' own classes, see native_kind(), becomes that. Any other is a
    folder with a copy of megabert/model, which loads with trust_remote_code=True where megabert is not installed.

    checkpoint: its folder, or a run's folder for its newest. Raises ValueError if there is no complete checkpoint, if
    `out` contains anything but an export, or if the check fails, in which case `out` stays as it was.
    """
    # Paths are resolved, because the run's files are found from the checkpoint's parents, and `out` may be a link.
    checkpoints = find_checkpoints(checkpoint.resolve(), options.average)
    name, out = str(out), out.resolve()
    fingerprint = fingerprint_export([folder / MANIFEST for folder in checkpoints], options)
    if (measured := read_finished(out, fingerprint)) is not None:
        return measured
    check_limits(checkpoints[0], options)
    model = read_checkpoints(checkpoints)
    max_length = set_max_length(model.config, model.state.max_seq_len, options.max_length)
    with staged_folder(out) as folder:
        parameters = write_folder(folder, model, checkpoints[0], options, max_length)
        export_record.write_export_record(folder, fingerprint, model.config.max_position_embeddings, parameters)
        # The check's process loads the weights again, so they are freed here.
        del model, parameters
        measured = export_check.check_new_export(folder, name)
        if options.targets:
            add_targets(folder, options.targets)
        replace_folder(folder, out, lambda: check_replaceable(out, export_record.read_record(out)))
    return measured


def read_finished(out: Path, fingerprint: str) -> Measurements | None:
    """Return what the check of an unchanged export with this fingerprint measured, or None if it must be written.

    Raises ValueError if `out` contains more than an export.
    """
    record = export_record.read_record(out)
    if record and record["checkpoint"] == fingerprint and "measured" in record and is_complete(record):
        if not export_record.find_change(out, record):
            return record["measured"] | {"reused": True}
    check_replaceable(out, record)
    return None


def is_complete(record: dict[str, Any]) -> bool:
    """Return whether every target of an earlier export was proven; one that was not may succeed now."""
    return all("opened" in outcome for outcome in record.get("targets", {}).values())


def explain_targets(checkpoint: Path, options: ExportOptions) -> list[str]:
    """Return what a user should know of the wanted targets before they are written, one line each.

    checkpoint: as in export_checkpoint(). Raises ValueError if a target cannot be written for this model.
    """
    return check_limits(find_checkpoints(checkpoint.resolve(), options.average)[0], options)


def check_limits(checkpoint: Path, options: ExportOptions) -> list[str]:
    """Do what explain_targets() does, for a checkpoint's folder."""
    if not options.targets:
        return []
    state = read_state(checkpoint)
    config = config_of(state.model, checkpoint)
    max_length = set_max_length(config, state.max_seq_len, options.max_length)
    return registry.check_targets(options.targets, config, read_json(checkpoint / TOKENIZER), max_length)


def add_targets(folder: Path, names: tuple[str, ...]) -> None:
    """Write the targets into a checked export, and what became of each into export.json and the model card."""
    outcomes = registry.write_targets(folder, names)
    export_record.add_targets(folder, outcomes)
    with open(folder / "README.md", "a", encoding="utf-8") as card:
        card.write(registry.make_card_section(outcomes))


def check_replaceable(out: Path, record: dict[str, Any] | None) -> None:
    """Raise ValueError if `out` contains more than an export. record: that of the export, if there is one."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if record is None:
        raise ValueError(f"{out}: is neither empty nor an export; choose another folder.")
    if added := export_record.find_added_files(out, record):
        raise ValueError(
            f"{out / added[0]}: was added to the export there and would be lost. Choose another folder, or remove it."
        )


def fingerprint_export(files: list[Path], options: ExportOptions) -> str:
    """Hash everything that determines an export: the source's files, the code and the options."""
    code = [*sorted(MODEL_CODE.glob("*.py")), *sorted(Path(__file__).parent.rglob("*.py"))]
    return texts_sha256([*map(file_sha256, [*files, *code]), repr(options)])


def write_folder(
    out: Path, model: TrainedModel, checkpoint: Path, options: ExportOptions, max_length: int
) -> dict[str, Tensor]:
    """Write everything except export.json. Returns the weights by their names in the folder.

    max_length: at which the tokenizer truncates, in tokens.
    """
    config = deepcopy(model.config)
    # The kind of padding changes only the speed, not the output.
    config.padding = "unpadded"
    copy_tokenizer(checkpoint, out, max_length)
    module = export_check.build_model(model.weights, config)
    export_check.write_expected_outputs(module, out, checkpoint)
    if options.targets:
        compared_texts.write_expected(module.bert, out, max_length)
    weights = write_model(out, model.weights, config, options.max_shard_size)
    metrics = read_metrics_at(checkpoint.parents[1], model.state.step)
    num_parameters = sum(tensor.numel() for tensor in weights.values())
    make_model_card(config, model.state, metrics, num_parameters, options.average, max_length).save(out / "README.md")
    return weights


def write_model(
    out: Path, weights: dict[str, Tensor], config: MegaBertConfig, max_shard_size: str
) -> dict[str, Tensor]:
    """Write config, code and weights, as transformers' own model where one computes the same.

    The folder must have its tokenizer. Returns the weights by the names that they have in the loaded model.
    """
    kind = None if native_class(config) is None else native_kind(config)
    if kind is None:
        write_config(out, config)
        write_weights(out, weights, max_shard_size)
        return weights
    named = from_megabert(weights, kind, duplicates=False, head=head_of(config))
    write_native_config(out, config, kind)
    in_file = to_gte_file(named) if kind == "gte" else named
    if kind == "roberta" and ROBERTA_BIAS in named:
        # transformers 4.50 reads the bias by this name. If the file lacks it, that version silently takes zeros.
        in_file = named | {ROBERTA_BIAS_OF_DECODER: named[ROBERTA_BIAS].clone()}
    write_weights(out, in_file, max_shard_size)
    return named
