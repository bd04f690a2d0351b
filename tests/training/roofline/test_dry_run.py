"""pretrain.py --dry-run: what it says about a run, and refusals whose advice works."""

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from megabert.config.ds_config import read_ds_config
from megabert.config.recipe import Recipe
from megabert.config.recipe_parser import ds_config_path, load_recipe, recipe_names
from megabert.data.ranks import choose_streams, worker_count
from megabert.data.shards.tokenizer import read_tokenizer
from megabert.files import checkpoint_format as layout
from megabert.files import hashing
from megabert.files.checkpoint_format import State
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.training.checkpointing.initial_folder import LATER_SETTINGS
from megabert.training.corpora import open_corpora
from megabert.training.micro_batch.memory import Memory, num_weights
from megabert.training.roofline.dry_run import Checks, Finding, dry_run
from megabert.training.run_schedule import make_run_schedule, shared_batches
from tests.helpers.runs import REPOSITORY, TINY, Corpus, last_of_each


@functools.cache
def tiny_recipe() -> Recipe:
    settings = dict(flag.removeprefix("--").split("=") for flag in TINY)
    return load_recipe("quickstart", **settings | {"run.max_steps": 8})


class Attempt(NamedTuple):
    """Flags of a run, the names of ds_config and number of ranks apart."""

    flags: tuple[str, ...]
    ranks: int = 2
    ds_config: str = "zero1"

    def recipe(self) -> Recipe:
        """The tiny recipe with these flags, without the parser, which takes longer than a dry run."""
        changes: dict[str, dict[str, Any]] = {}
        for flag in self.flags:
            name, _, value = flag.removeprefix("--").partition("=")
            section, _, setting = name.partition(".")
            changes.setdefault(section, {})[setting] = yaml.safe_load(value)
        base = tiny_recipe()
        sections = {name: dataclasses.replace(getattr(base, name), **changed) for name, changed in changes.items()}
        return dataclasses.replace(base, **sections)

    def findings(self) -> list[Finding]:
        return list(dry_run(self.recipe(), read_ds_config(ds_config_path(self.ds_config)), self.ranks))

    def refusals(self) -> list[Finding]:
        return [finding for finding in self.findings() if finding.code]

    def without(self, name: str) -> "Attempt":
        return self._replace(flags=tuple(flag for flag in self.flags if not flag.startswith(f"--{name}=")))

    def plus(self, *flags: str) -> "Attempt":
        return self._replace(flags=tuple(last_of_each([*self.flags, *flags])))


def follow(attempt: Attempt, message: str, folder: Path) -> list[Attempt]:
    """Return the attempts that a message advises, one for each way that it names."""
    found = []
    setting = r"(?:model|data|optimizer|run)\.\w+ (?:to )?\w+"
    for together in re.findall(rf"[Ss]et ({setting}(?:(?:, | and ){setting})*)", message):
        ways = re.findall(r"((?:model|data|optimizer|run)\.\w+) (?:to )?(\w+)", together)
        found.append(attempt.plus(*(f"--{name}={value}" for name, value in ways)))
    for name, value in re.findall(r"((?:data)\.\w+) is \d+, expected at least (\d+)", message):
        found.append(attempt.plus(f"--{name}={value}"))
    for ranks in re.findall(r"[Uu]se ([\d, or]+) ranks?", message):
        found += [attempt._replace(ranks=int(number)) for number in re.findall(r"\d+", ranks)]
    for number in re.findall(r"Add (\d+) to data.ranks", message):
        found.append(attempt.plus(f"--data.ranks=[48,64,{number}]"))
    for name in re.findall(r"ds_configs/(\w+).json", message):
        found.append(attempt._replace(ds_config=name))
    if name := re.search(r"optimizer.name (\w+)\.$", message):
        found.append(attempt.plus(f"--optimizer.name={name[1]}"))
    if branch := re.search(r"--run.branch_from (\S+) --run.output_dir FOLDER", message):
        found.append(attempt.plus(f"--run.branch_from={branch[1]}", f"--run.output_dir={folder / 'branch'}"))
    for value in re.findall(r"--run.resume (none|auto)", message):
        found.append(attempt.plus(f"--run.resume={value}"))
    return found


@pytest.mark.parametrize("ranks", [8, 48, 1024])
@pytest.mark.parametrize("name", recipe_names())
def test_the_printed_counts_are_those_of_the_run(name, ranks, tmp_path):
    """Of micro-batches, tokens, streams, workers, and the ranks that can resume; or of the refusal."""
    recipe = load_recipe(name, run={"output_dir": str(tmp_path)})
    checks = Checks(recipe, read_ds_config(ds_config_path("zero1")), ranks)
    try:
        lines = [*checks.batches(), *checks.streams()]
    except ValueError as error:
        if recipe.data.micro_batch_tokens != "auto":
            with pytest.raises(ValueError, match=re.escape(str(error))):
                make_run_schedule(recipe, ranks)
        return
    data = checks.recipe.data
    schedule = make_run_schedule(checks.recipe, ranks)
    sizes = schedule.stages.batches_per_step
    if recipe.data.micro_batch_tokens == "auto":
        assert int_in(lines.pop(0), r"auto: ([\d,]+) ") == data.bin_tokens
    step, run, streams, resume = lines
    assert int_in(step, r"of ([\d,]+) tokens") == data.bin_tokens
    for index, unit in enumerate((1, ranks)):
        shown = re.findall(r"([\d,]+)(?: to ([\d,]+))?(?: micro-batches| on each)", step)[index]
        assert [int(text.replace(",", "")) for text in shown if text] == [
            s // unit for s in sorted({sizes[0], sizes[-1]})
        ]
    assert int_in(step, r"of (\d+) ranks") == ranks
    assert int_in(run, r"run: ([\d,]+) steps") == schedule.total_steps
    count = choose_streams(data.ranks, data.num_workers, ranks, None, shared_batches(data, schedule))
    assert int_in(streams, r"^([\d,]+) data streams") == count
    assert int_in(streams, r"([\d,]+) a rank") == count // ranks
    assert int_in(streams, r"read by (\d+) loader") == worker_count(data.num_workers, count // ranks)
    shown = [int(number) for number in re.findall(r"\d+", resume)]
    shares = [count, *shared_batches(data, schedule)]
    assert shown == [n for n in range(1, count + 1) if not any(share % n for share in shares)]


def test_a_length_in_tokens_is_not_taken_for_one_in_hours():
    recipe = Attempt(("--run.max_steps=null", "--run.max_tokens=1000000000000000000")).recipe()
    *_, run = Checks(recipe, read_ds_config(ds_config_path("zero1")), 1).batches()
    assert run.endswith(" steps, 1e+06 T tokens")


def int_in(line: str, pattern: str) -> int:
    found = re.search(pattern, line)
    assert found is not None, line
    return int(found[1].replace(",", ""))


@pytest.fixture
def start(corpus: Corpus, tmp_path: Path) -> Attempt:
    return Attempt((f"--data.train={corpus.tokens}", f"--run.output_dir={tmp_path / 'run'}"))


@pytest.fixture
def resumable(start: Attempt, corpus: Corpus, tmp_path: Path) -> Attempt:
    """The attempt, with a checkpoint of step 4 of its run, written by 4 ranks, without weights in it."""
    write_checkpoint(start, tmp_path / "run/checkpoints/step-00000004")
    return start


def write_checkpoint(attempt: Attempt, folder: Path) -> None:
    recipe = attempt.recipe()
    numbers = dict.fromkeys(["tokens", "seconds", "wall_seconds", "max_step_seconds"], 0)
    state = State(
        step=4, next_index=8, world_size=4, num_streams=192, batches_per_step=2, total_steps=8, zero_stage=1, model={},
        corpus=open_corpora(recipe.data)[0].fingerprint, recipe=recipe.to_dict(), optimizer_source="apex", guard={},
        ds_config={"zero_optimization": {"stage": 1}}, rolled_back_bins=[], max_documents={32: 20}, **numbers,
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / layout.STATE).write_text(json.dumps(dataclasses.asdict(state)))
    (folder / layout.STREAMS).write_text(json.dumps({"format": 5, "streams": {}}))
    (folder / "a.pt").write_bytes(b"weights")
    files = {name: (folder / name).stat().st_size for name in layout.files_of(folder)}
    hashes = {name: [size, hashing.file_sha256(folder / name)] for name, size in files.items()}
    (folder / layout.MANIFEST).write_text(json.dumps(hashes))


REFUSALS = {
    "batches, ranks": (["--data.global_batch_tokens=1024"], {"ranks": 3}, "4 micro-batches of 256 tokens, which 3"),
    "batches, many ranks": (["--data.global_batch_tokens=8192"], {"ranks": 64}, "32 micro-batches .* which 64 ranks"),
    "batches, auto": (
        ["--data.micro_batch_tokens=auto", "--data.global_batch_tokens=1024"],
        {"ranks": 3},
        "auto: no number of tokens",
    ),
    "batch warm-up": (
        ["--data.global_batch_tokens=2048", "--data.batch_warmup=0.5", "--data.batch_warmup_from=512"],
        {"ranks": 8},
        "data.batch_warmup_from gives steps of",
    ),
    "streams": (
        ["--data.global_batch_tokens=14336", "--data.ranks=[48,64]"], {"ranks": 56}, "which 56 ranks cannot share",
    ),
    "places": (["--data.max_documents=3"], {}, "data.max_documents is 3, expected at least 10"),
    "Muon": (["--optimizer.name=muon"], {}, "ZeRO clips the orthogonalized updates"),
    "compile": (["--run.compile=true"], {"ds_config": "zero3"}, "run.compile true at ZeRO 3"),
    "CUDA graphs": (
        ["--run.cuda_graphs=true", "--run.ops=auto"], {"ds_config": "zero2"}, "ZeRO 2 reduces gradients within every",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_every_advice_of_a_refusal_works(name, start: Attempt, tmp_path):
    flags, changes, message = REFUSALS[name]
    attempt = start.plus(*flags)._replace(**changes)
    check_advice(attempt, message, tmp_path)


def check_advice(attempt: Attempt, message: str, folder: Path, ways: int = 1) -> None:
    """Check that a run is refused with this message alone, and that what it advises is refused in no part."""
    (refusal,) = attempt.refusals()
    assert refusal.code == 2
    assert re.search(message, refusal.text), refusal.text
    advised = follow(attempt, refusal.text, folder)
    assert len(advised) >= ways, refusal.text
    for other in advised:
        assert not other.refusals(), (refusal.text, other, other.refusals())


def test_a_run_is_described(start: Attempt):
    lines = [str(finding) for finding in start.plus("--data.max_documents=64").findings()]
    text = "\n".join(lines)
    for expected in (
        "batches     a step: 2 micro-batches of 256 tokens, 1 on each of 2 ranks",
        "batches     the run: 8 steps, 4,096 tokens",
        "settings    ZeRO 1, bf16 where the GPUs multiply it natively, adamw",
        "tokenizer: 800 ids, fingerprint",
        "the run starts at step 0",
        "streams     192 data streams, 96 a rank, read by 0 loader workers",
        "this run can resume on 1, 2 ranks",
        "1 MB a checkpoint, 3 more at most",
        "fits GPUs of 16 GB (v100, t4) and more",
    ):
        assert expected in text
    assert re.search(r"24 shards, \S+ documents, .* tokens; read 0\.\d+ times", text)
    assert lines[-1] == "result      can start on 2 ranks"


def test_memory_is_that_of_the_ds_config(start: Attempt, tmp_path):
    def memory(**changes: Any) -> Memory:
        settings = json.loads(ds_config_path("zero2").read_text())
        for name, section in changes.items():
            settings[name] |= section
        path = tmp_path / "ds_config.json"
        path.write_text(json.dumps(settings))
        return Checks(start.recipe(), read_ds_config(path), 2)._memory_of(1 << 16)

    bf16, fp32 = memory(), memory(torch_autocast={"enabled": False})
    assert fp32.kept > bf16.kept
    assert memory(torch_autocast={"enabled": False}, zero_optimization={"stage": 1}).kept == fp32.kept
    offloaded = memory(zero_optimization={"offload_optimizer": {"device": "cpu"}})
    weights = num_weights(start.recipe().model, 30_528)
    assert bf16.states - offloaded.states == 12 * weights / 2


def test_a_listed_number_of_ranks_that_the_run_cannot_have_is_named(start: Attempt):
    attempt = start.plus("--data.global_batch_tokens=1024", "--data.ranks=[2,3]")
    text = "\n".join(map(str, attempt.findings()))
    assert "NOT on 3 ranks of data.ranks, which cannot share a step evenly" in text
    multiple = re.search(r"data.global_batch_tokens to a multiple of ([\d,]+)", text)
    assert multiple is not None
    text = "\n".join(map(str, attempt.plus(f"--data.global_batch_tokens={multiple[1].replace(',', '')}").findings()))
    assert "this run can resume on 1, 2, 3, 6 ranks" in text
    assert "NOT" not in text


def test_a_checkpoint_is_compared_with_the_run(resumable: Attempt, tmp_path):
    text = "\n".join(map(str, resumable.findings()))
    assert "step-00000004: step 4, hashes not compared" in text
    assert "written by 4 ranks: it is converted first" in text
    check_advice(resumable.plus("--optimizer.lr=0.1"), "optimizer.lr was .* and is 0.1", tmp_path, ways=2)
    check_advice(resumable.plus("--run.max_steps=9"), "run.max_steps was 8 and is 9", tmp_path, ways=2)
    check_advice(resumable.plus("--run.seed=3"), "run.seed was 17 and is 3", tmp_path)
    (refusal,) = resumable._replace(ds_config="zero3").refusals()
    assert "Use stage 1" in refusal.text
    checkpoint = tmp_path / "run/checkpoints/step-00000004"
    (checkpoint / "a.pt").write_bytes(b"cut")
    check_advice(resumable, "all 1 checkpoints are damaged", tmp_path)
    shutil.copytree(checkpoint, tmp_path / "run/checkpoints/step-00000003")
    (tmp_path / "run/checkpoints/step-00000003/a.pt").write_bytes(b"weights")
    check_advice(resumable.plus(f"--run.resume={checkpoint}"), "a.pt has 3 bytes, expected 7", tmp_path)


def test_a_checkpoint_of_another_tokenizer_is_refused_though_the_ids_are_the_same(resumable, corpus, tmp_path):
    """As after an addition of tokens that the corpus does not have."""
    tokenizer = read_tokenizer(corpus.tokenizer / "tokenizer.json")
    file = tmp_path / "run/checkpoints/step-00000004/tokenizer.json"
    tokenizer.save(str(file))
    assert resumable.refusals() == []
    tokenizer.add_tokens(["qqzzqq"])
    tokenizer.save(str(file))
    (refusal,) = resumable.refusals()
    assert "its tokenizer has 'qqzzqq' as id 800, the shards' has it as id None. Write the shards" in refusal.text


def test_the_streams_of_an_earlier_version_are_refused(resumable: Attempt, tmp_path):
    checkpoint = tmp_path / "run/checkpoints/step-00000004"
    (checkpoint / layout.STREAMS).write_text('{"streams": {}}')
    manifest = json.loads((checkpoint / layout.MANIFEST).read_text())
    manifest[layout.STREAMS][0] = 15
    (checkpoint / layout.MANIFEST).write_text(json.dumps(manifest))
    check_advice(resumable, "written by an earlier version", tmp_path)


def test_initial_weights_are_of_this_architecture_and_vocabulary(start: Attempt, corpus: Corpus, tmp_path):
    folder = tmp_path / "initial"
    folder.mkdir()
    attempt = start.plus(f"--model.init_from={folder}")
    (refusal,) = attempt.refusals()
    assert "is not a MegaBERT folder. It has no config.json" in refusal.text
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (refusal,) = attempt.refusals()
    assert "is not a MegaBERT folder. Convert it with launch/convert_from_hf.py" in refusal.text
    config = {"model_type": "megabert", "num_hidden_layers": 2, "hidden_size": 64, "layer_norm_eps": 1e-12}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(corpus.tokens / "tokenizer.json", folder)
    check_advice(attempt, "hidden_size is 64 in its config.json, 32 in this recipe", tmp_path)
    (folder / "config.json").write_text('{"model_type": "megabert"}')
    check_advice(
        attempt.plus("--model.embedding_neighbors=2"),
        "embedding_neighbors is 0 in its config.json, 2 in this recipe",
        tmp_path,
    )


@pytest.mark.parametrize("name", LATER_SETTINGS)
def test_what_an_older_folder_lacks_is_read_as_the_model_reads_it(name):
    assert LATER_SETTINGS[name] == getattr(MegaBertConfig(), name)


def test_no_room_and_no_right_to_write_are_refused(start: Attempt, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (refusal,) = start.plus(f"--run.output_dir={tmp_path / 'file/run'}").refusals()
    assert "file: checkpoints cannot be written here. Choose another run.output_dir" in refusal.text
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**5))
    (refusal,) = start.refusals()
    assert "a checkpoint needs 1 MB, 0 MB are free. Free some space" in refusal.text


def test_a_store_that_is_away_is_told_apart(start: Attempt):
    attempt = start.plus("--data.train=http://127.0.0.1:9/tokens", "--data.store_patience_s=1")
    (refusal,) = attempt.refusals()
    assert refusal.code == 75
    assert "A dry run waits no longer, a run for data.store_patience_s." in refusal.text


def test_a_missing_corpus_leaves_the_other_parts(start: Attempt):
    findings = start.plus("--data.train=nowhere").findings()
    assert {finding.part for finding in findings if not finding.code} >= {"batches", "streams", "disk", "memory"}
    (refusal,) = (finding for finding in findings if finding.code)
    assert "nowhere/manifest.json: no such file. Write shards there with data_prep/write_shards.py" in refusal.text


def test_the_command_imports_no_torch(corpus: Corpus, tmp_path):
    flags = [*TINY, f"--data.train={corpus.tokens}", "--run.max_steps=8", "--dry-run=2"]
    code = "import sys\nfrom megabert.commands import pretrain\ncode = pretrain.main('pretrain.py')\n"
    code += "assert 'torch' not in sys.modules\nsys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, f"--run.output_dir={tmp_path / 'run'}"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("result      can start on 2 ranks\n")
    assert not (tmp_path / "run").exists()
    done = subprocess.run(
        [sys.executable, "launch/pretrain.py", "--dry-run=0"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "launch/pretrain.py: --dry-run is 0, expected a number of ranks from 1 on.\n"
