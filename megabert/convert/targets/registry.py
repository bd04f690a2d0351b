"""Choose the targets that --for names, write each, compare it with the checkpoint, and describe the outcome."""

import difflib
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from megabert.config.settings import check_once
from megabert.convert.check import export_record
from megabert.convert.from_hf import read_model
from megabert.convert.hf.model_card import TARGETS_HEADING
from megabert.convert.targets import encoder, jina, onnx_graphs, sentence_transformers, transformers_js
from megabert.convert.targets.compared_texts import read_expected
from megabert.convert.targets.llama import gguf_proof
from megabert.convert.targets.target import DiffersError, Expected, ExportedFolder, NotOpened, Target
from megabert.data.shards.manifest import TOKENIZER, TOKENIZER_CONFIG
from megabert.files.checkpoint_format import files_of
from megabert.files.json_file import read_json
from megabert.model.configuration_megabert import MegaBertConfig

# The targets in the order in which they are written: each comes after those that it requires.
ALL = (
    sentence_transformers.TARGET,
    onnx_graphs.TARGET,
    onnx_graphs.INT8,
    encoder.TARGET,
    jina.TARGET,
    gguf_proof.TARGET,
    transformers_js.TARGET,
)
TARGETS = {target.name: target for target in ALL}
# The name of the exported folder itself, which is always written.
ALWAYS = "transformers"


class Outcome(TypedDict):
    """What became of one target; exactly one of opened, not_opened and failed is there.

    wrote: the program that wrote it. opened: a Proof's fields. not_opened, failed: why, in words.
    """

    wrote: NotRequired[str]
    opened: NotRequired[dict[str, Any]]
    not_opened: NotRequired[str]
    failed: NotRequired[str]


def parse_names(text: str) -> tuple[str, ...]:
    """Read the list of --for, separated by commas, in the order of writing, with the targets that these require.

    Raises ValueError for an unknown name, and for one that is listed twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    check_once("--for", names)
    wanted = {*names}
    for name in sorted(wanted - TARGETS.keys() - {ALWAYS}):
        known = [ALWAYS, *TARGETS]
        # The names of the layouts, which one target writes.
        close = ["encoder"] if name in ("gte", "modernbert") else difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Known are {', '.join(known)}."
        raise ValueError(f"--for: there is no target {name!r}. {hint}")
    for target in reversed(ALL):
        if target.name in wanted:
            wanted |= set(target.requires)
    return tuple(name for name in TARGETS if name in wanted)


def check_targets(
    names: tuple[str, ...], config: MegaBertConfig, tokenizer: dict[str, Any], max_length: int
) -> list[str]:
    """Return what a user should know of the targets before they are written, one line each.

    Raises ValueError if a target cannot be written for this model, or packages are missing.
    """
    notes = []
    for name in names:
        TARGETS[name].check_packages()
        notes += [f"{name}: {note}" for note in TARGETS[name].check(config, tokenizer, max_length)]
    return notes


def write_targets(folder: Path, names: tuple[str, ...]) -> dict[str, Outcome]:
    """Write each target into a finished transformers folder and prove it; one that differs loses its own files."""
    model = read_model(folder)
    exported = ExportedFolder(
        folder, model.config, model.weights, read_json(folder / TOKENIZER), read_max_length(folder)
    )
    expected = read_expected(folder, exported.max_length)
    outcomes: dict[str, Outcome] = {}
    for name in names:
        target = TARGETS[name]
        if lost := [other for other in target.requires if "failed" in outcomes[other]]:
            outcomes[name] = {"failed": f"needs {lost[0]}, which failed"}
            continue
        before = set(files_of(folder))
        try:
            outcomes[name] = {"wrote": target.write(exported, folder)} | prove(target, folder, expected)
        except DiffersError as error:
            outcomes[name] = {"failed": str(error)}
            remove_files(folder, set(files_of(folder)) - before)
    return outcomes


def prove(target: Target, folder: Path, expected: Expected) -> Outcome:
    """Open what was written and compare it. Raises DiffersError, for files that cannot be read, too."""
    try:
        proof = target.prove(folder, expected)
    except ValueError as error:
        # What reads files names them, and during an export the folder has a temporary name.
        raise DiffersError(str(error).replace(f"{folder}/", "")) from error
    if isinstance(proof, NotOpened):
        return {"not_opened": f"not opened here: needs {proof.needs}"}
    return {"opened": proof._asdict() | {"notes": list(proof.notes)}}


def verify_targets(folder: Path) -> dict[str, Outcome]:
    """Repeat the proof of every target that the folder's export.json lists. Those that failed then stay as they are."""
    recorded = read_outcomes(folder)
    if not recorded:
        return {}
    expected = read_expected(folder, read_max_length(folder))
    outcomes: dict[str, Outcome] = {}
    for name, before in recorded.items():
        if "failed" in before:
            outcomes[name] = before
        elif name not in TARGETS:
            outcomes[name] = {"not_opened": "not opened here: needs the version of MegaBERT that exported it"}
        else:
            try:
                outcomes[name] = {"wrote": before["wrote"]} | prove(TARGETS[name], folder, expected)
            except DiffersError as error:
                outcomes[name] = {"failed": str(error)}
    return outcomes


def read_outcomes(folder: Path) -> dict[str, Outcome]:
    """Read what export.json says of each target; nothing if there is none."""
    return (export_record.read_record(folder) or {}).get("targets", {})


def read_max_length(folder: Path) -> int:
    return int(read_json(folder / TOKENIZER_CONFIG)["model_max_length"])


def describe(name: str, outcome: Outcome) -> str:
    """Describe the outcome in one line."""
    if "failed" in outcome:
        return f"{name}: differs from the checkpoint and has no files: {outcome['failed']}"
    if "not_opened" in outcome:
        return f"{name}: written by {outcome['wrote']}, {outcome['not_opened']}"
    opened = outcome["opened"]
    notes = "".join(f"; {note}" for note in opened["notes"])
    return (
        f"{name}: opened by {opened['program']} {opened['version']}, largest difference {opened['difference']:.1e} "
        f"({opened['measure']}){notes}"
    )


def make_card_section(outcomes: dict[str, Outcome]) -> str:
    """Make the part of the model card that says how to use each target, and what was checked."""
    kept = {name: outcome for name, outcome in outcomes.items() if "failed" not in outcome}
    if not kept:
        return ""
    rows = [_card_row(name, outcome) for name, outcome in kept.items()]
    uses = [f"### {name}\n\n```{TARGETS[name].language}\n{TARGETS[name].use}\n```\n" for name in kept]
    head = "| target | written by | opened by | largest difference |\n|---|---|---|---|"
    return f"\n{TARGETS_HEADING}\n\n" + "\n".join([head, *rows]) + "\n\n" + "\n".join(uses)


def _card_row(name: str, outcome: Outcome) -> str:
    opened = outcome.get("opened")
    if opened is None:
        return f"| {name} | {outcome['wrote']} | {outcome['not_opened']} | |"
    measured = f"{opened['difference']:.1e} ({opened['measure']})"
    return f"| {name} | {outcome['wrote']} | {opened['program']} {opened['version']} | {measured} |"


def remove_files(folder: Path, names: set[str]) -> None:
    """Remove files, and the folders that are empty then."""
    for name in names:
        (folder / name).unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
