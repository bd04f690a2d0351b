"""A checkpoint is complete or absent, whatever fails while it is written; which are kept, and which is resumed from."""

import errno
import functools
import json
import logging
import os
import shutil
import threading
from pathlib import Path

import deepspeed
import pytest
import torch

from megabert.config.cli import exit_code
from megabert.data.shards.source import open_source
from megabert.data.stream import Position
from megabert.files import checkpoint_format as layout
from megabert.files import hashing
from megabert.files.checkpoint_format import State
from megabert.files.disk import DiskError
from megabert.training.checkpointing import find, resume, universal, writer
from megabert.training.checkpointing.writer import CheckpointWriter, Retention, check_disk_space
from megabert.training.distributed.process import init_distributed
from megabert.training.telemetry.reporter import read_metrics
from tests.helpers.runs import Corpus, ds_config_in
from tests.helpers.scripts.many_runs import flags_of, run_many
from tests.training.helpers.checkpoints import STATE


def tags(*steps: int) -> list[str]:
    return [layout.tag_of(step) for step in steps]


def test_the_newest_are_kept():
    losses = dict.fromkeys(tags(10, 20, 30))
    assert Retention(last=2).to_delete(losses) == tags(10)
    assert Retention(last=9).to_delete(losses) == []


def test_every_nth_is_kept():
    assert Retention(last=1, every_steps=20).to_delete(dict.fromkeys(tags(10, 20, 30, 40, 50))) == tags(30, 10)


def test_the_best_is_kept_even_if_not_all_were_measured():
    losses = dict(zip(tags(10, 20, 30, 40), (3.0, 2.0, None, 2.5), strict=True))
    assert Retention(last=1, best=True).to_delete(losses) == tags(30, 10)
    assert Retention(last=1, best=True).to_delete(dict.fromkeys(tags(10, 20))) == tags(10)


def test_the_checkpoint_that_a_rollback_needs_is_kept():
    assert Retention(last=1).to_delete(dict.fromkeys(tags(1, 2, 3, 4)), last_good_step=2) == tags(3, 1)
    assert Retention(last=1).to_delete(dict.fromkeys(tags(3, 4)), last_good_step=2) == tags(3)
    assert Retention(last=2).to_delete(dict.fromkeys(tags(1, 2, 3)), last_good_step=3) == tags(1)


@pytest.fixture(scope="module", autouse=True)
def single_rank():
    """This process is the only rank."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        init_distributed()
        yield
        deepspeed.comm.destroy_process_group()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)


class Engine:
    """The part of DeepSpeed's engine that saving uses."""

    checkpoint_engine = None

    def __init__(self) -> None:
        self.weight = torch.zeros(1000)

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert self.checkpoint_engine is not None
        assert not save_latest
        state = {"module": {"weight": self.weight, "tied": self.weight}, "more": [(self.weight,), "text"]}
        self.checkpoint_engine.save(state, f"{folder}/{tag}/mp_rank_00_model_states.pt")


class Written:
    """A CheckpointWriter, with an engine and a corpus."""

    def __init__(self, folder: Path, corpus: Corpus, overlap: bool = True, last: int = 2):
        self.lines: list[str] = []
        self.writer = CheckpointWriter(folder, Retention(last), overlap, self.lines.append, rank=0)
        self.engine, self.source, self.folder = Engine(), open_source(str(corpus.tokens)), folder

    def save(self, step: int) -> None:
        state = State(**vars(STATE) | {"step": step})
        self.writer.save(self.engine, state, {0: Position()}, self.source)  # type: ignore[arg-type]

    def present(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture(params=[True, False], ids=["async", "sync"])
def written(request, tmp_path, corpus) -> Written:
    return Written(tmp_path / "checkpoints", corpus, overlap=request.param)


def test_the_ranks_that_save_connect_when_the_run_starts(tmp_path, corpus, monkeypatch):
    """Gloo connects them at its first collective; on GPUs, which train over NCCL, the next would be the first save."""
    groups: list[object] = []
    monkeypatch.setattr(writer, "gather_dicts", lambda part, group=None: groups.append(group) or {})
    assert groups == [Written(tmp_path, corpus).writer.group]


def test_a_checkpoint_is_complete_and_old_ones_are_deleted(written, tmp_path):
    written.folder.mkdir()
    (written.folder / ".tmp-left-over").touch()
    (written.folder / ".tmp-link").symlink_to(tmp_path)
    for step in (1, 2, 3):
        written.engine.weight.fill_(step)
        written.save(step)
    written.writer.wait()
    assert written.present() == ["latest", *tags(2, 3)]
    newest = written.folder / tags(3)[0]
    assert (written.folder / "latest").read_text() == newest.name
    assert layout.check_files(newest) is None
    assert set(layout.read_manifest(newest)) >= {"state.json", "streams.json", "tokenizer.json"}
    state = torch.load(newest / "mp_rank_00_model_states.pt")
    assert state["module"]["weight"][0] == 3
    assert state["module"]["weight"].data_ptr() == state["module"]["tied"].data_ptr()
    assert written.lines[-1] == f"step 3: saved {newest}"


def test_training_continues_while_a_copy_of_the_state_is_written(tmp_path, corpus, monkeypatch):
    written = Written(tmp_path, corpus)
    free, save = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *arguments: free.wait(10) and save(*arguments))
    written.engine.weight.fill_(1)
    written.save(1)
    written.engine.weight.fill_(2)
    assert layout.list_tags(tmp_path) == []
    free.set()
    written.writer.wait()
    assert torch.load(tmp_path / tags(1)[0] / "mp_rank_00_model_states.pt")["module"]["weight"].eq(1).all()


def failing(kind: str, patch: pytest.MonkeyPatch) -> str:
    """Make a part of saving fail. Returns a pattern of the error message."""

    def fail(error: BaseException):
        def raise_it(*_, **__):
            raise error

        return raise_it

    full, read_only = (OSError(code, os.strerror(code), "/mnt/x") for code in (errno.ENOSPC, errno.EROFS))
    if kind == "known to be too small":
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 50, 50))
        return "No space left on device: .*It needs 0 MB; 0 MB are free"
    if kind == "full in a weights file":
        patch.setattr(torch, "save", fail(RuntimeError("PytorchStreamWriter failed writing file")))
        return "PytorchStreamWriter failed writing file: '.*mp_rank_00_model_states.pt'"
    if kind == "full in a small file":
        patch.setattr(Path, "write_bytes", fail(full))
        return "No space left on device: '/mnt/x'"
    if kind == "read-only":
        patch.setattr(Path, "mkdir", fail(read_only))
        return "Read-only file system: '/mnt/x'"
    if kind == "read-only at the end":
        patch.setattr(os, "rename", fail(read_only))
        return "Read-only file system: '/mnt/x'"
    patch.setattr(writer, "_host_copy", lambda item, _: item)
    patch.setattr(torch, "save", fail(TypeError("cannot pickle")))
    return "the last checkpoint was not finished"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "kind",
    [
        "known to be too small",
        "full in a weights file",
        "full in a small file",
        "read-only",
        "read-only at the end",
        "bug",
    ],
)
def test_a_failure_is_reported_and_earlier_checkpoints_remain(tmp_path, corpus, monkeypatch, kind):
    written = Written(tmp_path, corpus, last=1)
    written.save(1)
    written.writer.wait()
    with monkeypatch.context() as patch:
        message = failing(kind, patch)
        written.save(2)
        with pytest.raises(DiskError, match=message):
            written.writer.wait()
    if kind != "bug":
        assert written.present() == ["latest", *tags(1)]
        assert written.writer.problem is not None
        assert f"checkpoint {tags(2)[0]} could not be written" in written.writer.problem
    assert layout.check_files(tmp_path / tags(1)[0]) is None
    with pytest.raises(DiskError, match=message):
        # A run must not continue without its checkpoints.
        written.save(3)


def test_one_rank_with_a_full_disk_ends_all_with_the_same_message(corpus, tmp_path):
    """Rank 1 may write files of 100 kB only, and its part of the optimizer state is larger."""
    config = ds_config_in("zero2", tmp_path, bf16=False)
    flags = flags_of(corpus, tmp_path / "run", config, "--run.max_steps=9", "--run.save_every_steps=2")
    done = run_many([flags], ranks=2, max_file_bytes={1: 100_000})
    assert done.code == 74, done.output
    errors = [line for line in done.output.splitlines() if line.startswith("pretrain: checkpoint step-00000002")]
    assert len(errors) == 2, done.output
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt" in errors[0]
    assert "Earlier checkpoints are intact" in errors[0]
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run: checkpoints cannot be written here: .*Not a directory"):
        check_disk_space(tmp_path / "file/run", 1000, 2, Retention(2), rank=0)


def test_a_disk_that_fails_before_the_first_step_is_no_error_of_the_user(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(writer.tempfile, "TemporaryFile", fail)
    with pytest.raises(DiskError, match="checkpoints cannot be written here: .*Input/output error") as error:
        check_disk_space(tmp_path, 1000, 2, Retention(2), rank=0)
    assert exit_code(error.value) == 74


def test_checkpoints_that_will_not_fit_cause_a_warning(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 50, 4_000_000))
    # 3 x 1.2 MB.
    check_disk_space(tmp_path, 100_000, 0, Retention(2), rank=0)
    assert not caplog.text
    # 3 x 1.6 MB.
    check_disk_space(tmp_path, 100_000, 2, Retention(2), rank=0)
    assert "3 more checkpoints of 2 MB will not fit, 4 MB are free" in caplog.text


def resumed_from(setting: str, folder: Path) -> Path | None:
    return find.find(setting, folder, functools.partial(resume.check_together, rank=0, world_size=1))


def test_resuming_uses_the_newest_complete_checkpoint_or_the_named_one(tmp_path, corpus, caplog):
    assert resumed_from("auto", tmp_path) is None
    written = Written(tmp_path, corpus, overlap=False)
    for step in (1, 2):
        written.save(step)
    old, new = (tmp_path / tag for tag in tags(1, 2))
    assert resumed_from("auto", tmp_path) == new
    assert resumed_from("none", tmp_path) is None
    assert resumed_from(str(old), tmp_path) == old
    data = bytearray((new / "mp_rank_00_model_states.pt").read_bytes())
    # It would load without an error.
    data[1500] ^= 1
    (new / "mp_rank_00_model_states.pt").write_bytes(data)
    assert resumed_from("auto", tmp_path) == old
    assert f"checkpoint {new.name} is damaged and not used: {new}/mp_rank_00_model_states.pt" in caplog.text
    with pytest.raises(ValueError, match=f"{new}: cannot resume from it: .* is damaged"):
        resumed_from(str(new), tmp_path)
    (old / layout.STATE).write_text("{}")
    with pytest.raises(ValueError, match="all 2 checkpoints are damaged"):
        resumed_from("auto", tmp_path)


def test_a_checkpoint_that_cannot_be_read_for_now_is_not_passed_over_as_damaged(tmp_path, corpus, monkeypatch, caplog):
    written = Written(tmp_path, corpus, overlap=False)
    for step in (1, 2):
        written.save(step)
    old, new = (tmp_path / tag for tag in tags(1, 2))

    def failing_hash(path: Path) -> str:
        if path.parent == new:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return hashing.file_sha256(path)

    monkeypatch.setattr(layout, "file_sha256", failing_hash)
    with pytest.raises(DiskError, match="does not mean that it is damaged: .*--run.resume FOLDER"):
        resumed_from("auto", tmp_path)
    assert not caplog.text
    # The advice.
    assert resumed_from(str(old), tmp_path) == old


def test_a_failed_conversion_names_the_checkpoint(tmp_path, corpus):
    written = Written(tmp_path, corpus, overlap=False)
    written.save(1)
    with (
        pytest.raises(DiskError, match="step-00000001: cannot be converted for this number of ranks"),
        universal.converted(tmp_path / tags(1)[0], rank=0, world_size=1),
    ):
        pass
    assert written.present() == ["latest", *tags(1)]


def test_a_run_keeps_the_best_and_every_nth(corpus, tmp_path):
    config = ds_config_in("zero2", tmp_path, bf16=False)
    settings = ["--run.max_steps=4", "--run.save_every_steps=1", "--run.keep_checkpoints=1", "--run.async_save=false"]
    # The learning rate is so high that the first step is the best.
    more = ["--run.keep_every_steps=3", "--run.keep_best", "--optimizer.lr=0.5", "--optimizer.schedule=constant"]
    done = run_many([flags_of(corpus, tmp_path / "run", config, *settings, *more)])
    assert done.code == 0, done.output
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    losses = {record["step"]: record["heldout_loss"] for record in records if "heldout_loss" in record}
    best = min(losses, key=lambda step: losses[step])
    assert sorted(losses) == [1, 2, 3, 4]
    assert best not in (3, 4)
    kept = tmp_path / "run/checkpoints"
    assert layout.list_tags(kept) == tags(*sorted({best, 3, 4}, reverse=True))
    assert json.loads((kept / tags(best)[0] / layout.STATE).read_text())["heldout_loss"] == losses[best]
