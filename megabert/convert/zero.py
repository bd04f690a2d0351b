"""Read the weights out of one of our training checkpoints, whatever ZeRO stage and number of ranks wrote it.

Needs neither a GPU nor DeepSpeed. Files are mapped, not read: only the pages of the weights are ever touched, never the
optimizer's moments. Nothing in them is executed: torch's weights-only unpickler, and DeepSpeed's own classes, which its files
name, are replaced by empty ones.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megabert.config.recipe import may_change_at_resume
from megabert.convert.hf.reading import UNREADABLE
from megabert.data.shards.manifest import TOKENIZER
from megabert.files import checkpoint_format as layout
from megabert.files.checkpoint_format import State
from megabert.model.configuration_megabert import MegaBertConfig

TIED = "decoder.weight"  # the word embeddings again
# What of a recipe makes two trainings different.
DECISIVE = ("model", "data", "masking", "optimizer")
OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


class _Nothing:
    """Stands for a class of DeepSpeed's whose state nobody here looks at."""

    def __init__(self, *_: Any):
        pass


def read_checkpoint(path: Path, average: int = 1) -> tuple[dict[str, Tensor], MegaBertConfig, State]:
    """Read one checkpoint's fp32 weights by parameter name, its architecture and its counters.

    path: a checkpoint, or a run's folder for its newest. average: how many checkpoints, that one and those before it, to take
    the mean of. The weights may be views of the file: not to be written to. Raises ValueError if one is damaged or not there.
    """
    folder, *others = averaged(path, average)
    state = layout.read_state(folder)
    for other in others:
        _check_same_run(folder, other)
    weights = _read_whole(folder)
    if average > 1:
        weights = {name: tensor.clone() for name, tensor in weights.items()}
        for other in others:
            for name, tensor in _read_whole(other).items():
                weights[name] += tensor
        for tensor in weights.values():
            tensor.div_(average)
    return weights, MegaBertConfig(**state.model), state


def averaged(path: Path, count: int) -> list[Path]:
    """A checkpoint, or a run's newest, and the count - 1 before it. Raises ValueError if there are not so many."""
    folder = layout.find_checkpoint(path)
    if count < 1:
        raise ValueError(f"cannot average {count} checkpoints, expected at least 1.")
    if count == 1:
        return [folder]
    up_to = layout.step_of(folder.name)
    found = [folder.parent / tag for tag in layout.list_tags(folder.parent) if layout.step_of(tag) <= up_to]
    if len(found) < count:
        raise ValueError(
            f"{folder.parent}: has {len(found)} checkpoints up to {folder.name}, cannot average {count}. "
            "Training keeps as many as run.keep_checkpoints says."
        )
    return found[:count]


def _check_same_run(folder: Path, other: Path) -> None:
    """Raises ValueError if the weights of two checkpoints are not of one run: their mean would be nobody's."""
    first, second = _course(folder), _course(other)
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) != second.get(name):
            raise ValueError(
                f"{other}: cannot be averaged with {folder}: its {name} is {second.get(name)!r}, not {first.get(name)!r}."
            )


def _course(folder: Path) -> dict[str, Any]:
    """What one run's checkpoints have in common, by name."""
    state = layout.read_state(folder)
    course = {"corpus": state.corpus, "tokenizer": layout.read_manifest(folder).get(TOKENIZER, (0, "none"))[1]}
    course["seed"] = state.recipe.get("run", {}).get("seed")
    course |= {f"model.{name}": value for name, value in state.model.items()}
    for part in DECISIVE:
        for name, value in state.recipe.get(part, {}).items():
            if not may_change_at_resume(f"{part}.{name}"):
                course[f"recipe.{part}.{name}"] = value
    return course


def _read_whole(folder: Path) -> dict[str, Tensor]:
    if problem := layout.check_files(folder):
        raise ValueError(f"{folder}: not exported: {problem}.")
    weights = read_weights(folder, layout.read_state(folder).zero_stage)
    weights.pop(TIED, None)
    return weights


def read_weights(folder: Path, zero_stage: int) -> dict[str, Tensor]:
    """The fp32 weights in DeepSpeed's files. Raises ValueError if they do not hold them."""
    first = "mp_rank_00_model_states.pt"
    model_states = load_inert(folder / (f"zero_pp_rank_0_{first}" if zero_stage == 3 else first))
    module = model_states["module"]
    if zero_stage < 3 and all(tensor.dtype == torch.float32 for tensor in module.values()):
        return {name: tensor.contiguous() for name, tensor in module.items()}  # every rank holds all of them
    ranks = _rank_files(folder)
    if not ranks:  # stage 0 in half precision: these are all there are
        return {name: tensor.float() for name, tensor in module.items()}
    parts = [load_inert(file)["optimizer_state_dict"] for file in ranks]
    counted = parts[0]["partition_count"]
    if len(parts) != (counted := max(counted) if isinstance(counted, list) else counted):
        raise ValueError(f"{folder}: has the optimizer states of {len(parts)} ranks, but {counted} wrote it.")
    shapes: list[dict[str, torch.Size]] = model_states["param_shapes"]
    if zero_stage == 3:
        return dict(_gather_stage_3(shapes, [part["fp32_flat_groups"] for part in parts], folder))
    groups = [part["single_partition_of_fp32_groups"] for part in parts]
    return dict(_gather_stage_2(shapes, groups, parts[0].get("param_alignment_paddings"), folder))


def _rank_files(folder: Path) -> list[Path]:
    """Each rank's optimizer file, in the order of the ranks. Raises ValueError if one is missing."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := OPTIMIZER.fullmatch(path.name))}
    if sorted(found) != list(range(len(found))):
        raise ValueError(f"{folder}: has the optimizer states of ranks {sorted(found)}: some are missing.")
    return [found[rank] for rank in sorted(found)]


def _gather_stage_3(
    shapes: list[dict[str, torch.Size]], groups: list[list[Tensor]], folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter is cut into one piece per rank, the last one padded; a rank's pieces lie end to end.

    groups: of each rank, its 1-D tensors, which are one sequence.
    """
    pieces = [_Sequence(parts) for parts in groups]
    sizes = {name: -(-shape.numel() // len(pieces)) for name, shape in _all(shapes)}
    _check_used(sum(sizes.values()), pieces[0].size, 0, folder)
    offset = 0
    for name, shape in _all(shapes):
        size = sizes[name]
        yield name, torch.cat([part for rank in pieces for part in rank.cut(offset, size)])[: shape.numel()].view(shape)
        offset += size


def _gather_stage_2(
    shapes: list[dict[str, torch.Size]], groups: list[list[Tensor]], paddings: list | None, folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter group is one vector, its parameters end to end, cut into one partition per rank.

    paddings: of each group, the filler after each parameter, where DeepSpeed aligns them.
    """
    for index, group in enumerate(shapes):
        vector = _Sequence([rank[index] for rank in groups])
        filler = sum(paddings[index]) if paddings else 0
        _check_used(sum(shape.numel() for shape in group.values()) + filler, vector.size, 2 * len(groups), folder)
        offset = 0
        for number, (name, shape) in enumerate(group.items()):
            parts = vector.cut(offset, shape.numel())
            yield name, (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)
            offset += shape.numel() + (paddings[index][number] if paddings else 0)


def _all(shapes: list[dict[str, torch.Size]]) -> Iterator[tuple[str, torch.Size]]:
    for group in shapes:
        yield from group.items()


def _check_used(used: int, there: int, padding: int, folder: Path) -> None:
    if not used <= there <= used + padding:
        raise ValueError(f"{folder}: its parameters need {used} numbers of each rank or group, and it has {there}.")


class _Sequence:
    """1-D tensors end to end, cut without copying."""

    def __init__(self, parts: list[Tensor]):
        self.parts = [part.detach() for part in parts]
        self.size = sum(len(part) for part in parts)

    def cut(self, offset: int, size: int) -> list[Tensor]:
        """The pieces that make [offset, offset + size)."""
        found, begin = [], 0
        for part in self.parts:
            low, high = max(offset - begin, 0), min(offset + size - begin, len(part))
            if low < high:
                found.append(part[low:high])
            begin += len(part)
        return found


def load_inert(path: Path) -> dict[str, Any]:
    """Load a .pt file of DeepSpeed's, mapped. Raises ValueError if it names anything but torch's and DeepSpeed's data."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        named = get_unsafe_globals_in_checkpoint(path)
    except UNREADABLE as mistake:
        raise ValueError(f"{path}: damaged: {mistake}") from mistake
    if foreign := [name for name in named if not name.startswith("deepspeed.")]:
        raise ValueError(f"{path}: asks for {', '.join(sorted(foreign))}, which no checkpoint of ours does; not read.")
    with safe_globals([(_Nothing, name) for name in named]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except UNREADABLE as mistake:
            raise ValueError(f"{path}: damaged: {mistake}") from mistake
