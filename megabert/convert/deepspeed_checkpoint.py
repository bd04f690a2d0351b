"""Read the weights of a training checkpoint, of any ZeRO stage and number of ranks, without DeepSpeed or a GPU."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.serialization import safe_globals

from megabert.config.recipe import may_change_at_resume
from megabert.convert.weight_names import TIED_DECODER
from megabert.data.shards.manifest import TOKENIZER
from megabert.files import checkpoint_format
from megabert.files.checkpoint_format import State
from megabert.files.pickles import DEEPSPEED_CLASSES, GETATTR, UNPICKLING_ERRORS, check_pickle
from megabert.model.configuration_megabert import MegaBertConfig

# Averaged checkpoints must agree in these sections of the recipe, except for settings that may change at a resume.
IDENTITY_SECTIONS = ("model", "data", "masking", "optimizer")
OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


class TrainedModel(NamedTuple):
    """weights: in fp32 by parameter name; they may be views of a mapped file, which must not be written to."""

    weights: dict[str, Tensor]
    config: MegaBertConfig
    state: State


def read_checkpoint(path: Path, average: int = 1) -> TrainedModel:
    """Read a checkpoint, or the mean of the weights of several.

    path: a checkpoint, or the folder of a run for its newest; average: the number of checkpoints, the last of which is
    that one. Raises ValueError if one is missing or damaged, or if they are not of the same run.
    """
    return read_checkpoints(find_checkpoints(path, average))


def read_checkpoints(folders: list[Path]) -> TrainedModel:
    """Read the mean of checkpoints' weights, and the architecture and state of the newest. folders: newest first."""
    states = [checkpoint_format.read_state(folder) for folder in folders]
    newest, *others = zip(folders, states, strict=True)
    for other in others:
        _check_same_run(newest, other)
    weights = _read_verified_weights(folders[0], states[0].zero_stage)
    if others:
        weights = {name: tensor.clone() for name, tensor in weights.items()}
        for folder, state in others:
            for name, tensor in _read_verified_weights(folder, state.zero_stage).items():
                weights[name] += tensor
        for tensor in weights.values():
            tensor.div_(len(folders))
    return TrainedModel(weights, config_of(states[0].model, folders[0]), states[0])


def config_of(model: Mapping[str, Any], folder: Path) -> MegaBertConfig:
    """Return the architecture of a checkpoint. model: that of its state. Raises ValueError, naming its state.json."""
    try:
        return MegaBertConfig(**model)
    except ValueError as error:
        raise ValueError(f"{folder / checkpoint_format.STATE}: {error}") from error


def find_checkpoints(path: Path, count: int = 1) -> list[Path]:
    """Find a checkpoint, or a run's newest, and the count - 1 before it, newest first.

    Raises ValueError if there are not that many; the commands that call this read a MegaBERT folder, too.
    """
    newest = checkpoint_format.find_checkpoint(path, or_else="a MegaBERT folder, with config.json and weights")
    if count < 1:
        raise ValueError(f"cannot average {count} checkpoints, expected at least 1.")
    if count == 1:
        return [newest]
    last_step = checkpoint_format.step_of(newest.name)
    tags = [tag for tag in checkpoint_format.list_tags(newest.parent) if checkpoint_format.step_of(tag) <= last_step]
    if len(tags) < count:
        raise ValueError(
            f"{newest.parent}: has {len(tags)} checkpoints up to {newest.name}, cannot average {count}. "
            "run.keep_checkpoints sets how many training keeps."
        )
    return [newest.parent / tag for tag in tags[:count]]


def _check_same_run(newest: tuple[Path, State], other: tuple[Path, State]) -> None:
    """Raise ValueError unless two checkpoints are of the same run, as only then the mean of weights makes sense."""
    expected, found = _run_identity(*newest), _run_identity(*other)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{other[0]}: cannot be averaged with {newest[0]}: "
                f"its {name} is {found.get(name)!r}, not {expected.get(name)!r}."
            )


def _run_identity(folder: Path, state: State) -> dict[str, Any]:
    """Collect what all checkpoints of one run have in common, by name."""
    manifest = checkpoint_format.read_manifest(folder)
    identity: dict[str, Any] = {"corpus": state.corpus, "tokenizer": manifest.get(TOKENIZER, (0, "none"))[1]}
    identity["seed"] = state.recipe.get("run", {}).get("seed")
    identity |= {f"model.{name}": value for name, value in state.model.items()}
    for section in IDENTITY_SECTIONS:
        for name, value in state.recipe.get(section, {}).items():
            if not may_change_at_resume(f"{section}.{name}"):
                identity[f"recipe.{section}.{name}"] = value
    return identity


def _read_verified_weights(folder: Path, zero_stage: int) -> dict[str, Tensor]:
    if problem := checkpoint_format.check_files(folder):
        raise ValueError(f"{folder}: cannot be read: {problem}.")
    weights = read_zero_weights(folder, zero_stage)
    weights.pop(TIED_DECODER, None)
    return weights


def read_zero_weights(folder: Path, zero_stage: int) -> dict[str, Tensor]:
    """Read the fp32 weights from DeepSpeed's files. Raises ValueError if the files do not contain all of them."""
    name = "mp_rank_00_model_states.pt"
    model_states = _load(folder / (f"zero_pp_rank_0_{name}" if zero_stage == 3 else name), "module")
    module = model_states["module"]
    if zero_stage < 3 and all(tensor.dtype == torch.float32 for tensor in module.values()):
        # Every rank has all weights, so one rank's file is enough.
        return {name: tensor.contiguous() for name, tensor in module.items()}
    files = _find_rank_files(folder)
    # ZeRO 0 in half precision keeps no fp32 copies of the weights.
    if not files:
        return {name: tensor.float() for name, tensor in module.items()}
    ranks = [_load(file, "optimizer_state_dict")["optimizer_state_dict"] for file in files]
    world_size = ranks[0]["partition_count"]
    if len(ranks) != (world_size := max(world_size) if isinstance(world_size, list) else world_size):
        raise ValueError(f"{folder}: has the optimizer states of {len(ranks)} ranks, but {world_size} ranks wrote it.")
    shapes: list[dict[str, torch.Size]] = model_states["param_shapes"]
    if zero_stage == 3:
        return dict(_gather_stage_3(shapes, [rank["fp32_flat_groups"] for rank in ranks], folder))
    groups = [rank["single_partition_of_fp32_groups"] for rank in ranks]
    return dict(_gather_stage_2(shapes, groups, ranks[0].get("param_alignment_paddings"), folder))


def _load(path: Path, key: str) -> dict[str, Any]:
    """Load a file of DeepSpeed. Raises ValueError if it has no dict under this key, as another file of DeepSpeed's."""
    value = load_without_executing(path)
    if not isinstance(value, dict) or not isinstance(value.get(key), dict):
        raise ValueError(f"{path}: damaged: it has no {key!r}. Use another checkpoint.")
    return value


def _find_rank_files(folder: Path) -> list[Path]:
    """List each rank's optimizer file by rank. Raises ValueError if one is missing."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := OPTIMIZER_FILE.fullmatch(path.name))}
    if sorted(found) != list(range(len(found))):
        raise ValueError(f"{folder}: has the optimizer states of ranks {sorted(found)}: some are missing.")
    return [found[rank] for rank in sorted(found)]


def _gather_stage_3(
    shapes: list[dict[str, torch.Size]], groups: list[list[Tensor]], folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """Assemble parameters that are each cut into one piece per rank, the last one padded.

    groups: the 1-D tensors of each rank, which contain its pieces end to end.
    """
    parameters = [(name, shape) for group in shapes for name, shape in group.items()]
    ranks = [_Concatenated(parts) for parts in groups]
    sizes = {name: -(-shape.numel() // len(ranks)) for name, shape in parameters}
    _check_numel(sum(sizes.values()), ranks[0].numel, 0, folder)
    offset = 0
    for name, shape in parameters:
        pieces = [piece for rank in ranks for piece in rank.slice(offset, sizes[name])]
        yield name, torch.cat(pieces)[: shape.numel()].view(shape)
        offset += sizes[name]


def _gather_stage_2(
    shapes: list[dict[str, torch.Size]], groups: list[list[Tensor]], paddings: list | None, folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """Assemble the parameters of groups that are vectors of their parameters, cut into one partition per rank.

    groups: each rank's partition of each group. paddings: for each group, the padding after each parameter, where
    DeepSpeed aligns parameters.
    """
    for index, group in enumerate(shapes):
        vector = _Concatenated([rank[index] for rank in groups])
        padding = sum(paddings[index]) if paddings else 0
        numel = sum(shape.numel() for shape in group.values()) + padding
        _check_numel(numel, vector.numel, 2 * len(groups), folder)
        offset = 0
        for number, (name, shape) in enumerate(group.items()):
            parts = vector.slice(offset, shape.numel())
            yield name, (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)
            offset += shape.numel() + (paddings[index][number] if paddings else 0)


def _check_numel(needed: int, stored: int, max_padding: int, folder: Path) -> None:
    if not needed <= stored <= needed + max_padding:
        raise ValueError(
            f"{folder}: its parameters have {needed} elements in a rank's file or a parameter group, "
            f"but {stored} are stored."
        )


class _Concatenated:
    """1-D tensors as if they were concatenated, without copying them."""

    def __init__(self, parts: list[Tensor]):
        self.parts = [part.detach() for part in parts]
        self.numel = sum(len(part) for part in parts)

    def slice(self, offset: int, size: int) -> list[Tensor]:
        """Return the views that together are [offset, offset + size)."""
        views, begin = [], 0
        for part in self.parts:
            low, high = max(offset - begin, 0), min(offset + size - begin, len(part))
            if low < high:
                views.append(part[low:high])
            begin += len(part)
        return views


class _DeepSpeedStub:
    """Takes the place of DeepSpeed's classes, whose state is not needed."""

    def __init__(self, *_: object):
        pass


def load_without_executing(path: Path) -> dict[str, Any]:
    """Load a .pt file by DeepSpeed with torch's weights-only unpickler and stand-ins for DeepSpeed's classes.

    The file is memory-mapped, so that pages with optimizer moments, which nothing uses, are never read. Raises
    ValueError if the file names other classes.
    """
    check_pickle(path)
    with safe_globals([(_DeepSpeedStub, name) for name in (*DEEPSPEED_CLASSES, GETATTR)]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except UNPICKLING_ERRORS as error:
            raise ValueError(f"{path}: damaged: {error}") from error
