"""No pickle of a checkpoint is run: not by resuming, on the same or another number of ranks, nor by export."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch.serialization import get_unsafe_globals_in_checkpoint

from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.files import checkpoint_format as layout
from megabert.files.pickles import check_pickle
from megabert.training.distributed.deepspeed_compat import (
    FORCE_WEIGHTS_ONLY,
    loading_only_weights,
    pickle_enums_by_value,
)
from tests.helpers.runs import Corpus, ds_config_in
from tests.helpers.scripts.many_runs import flags_of, run_many


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def with_hash(path: Path) -> None:
    """Enter a file into the manifest of its checkpoint, as a forger would."""
    manifest = path.parent / layout.MANIFEST
    data = path.read_bytes()
    entry = {path.name: [len(data), hashlib.sha256(data).hexdigest()]}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | entry))


def forge(path: Path, evil: Evil, form: str) -> None:
    """Add the object to what the file holds. form: of the file, as torch.save has written it over the years."""
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        content = torch.load(path, weights_only=False)
        torch.save(content | {"evil": evil}, path, _use_new_zipfile_serialization=form == "zip")
    with_hash(path)


class Attribute:
    """Is pickled as a member of an enumeration is by Python 3.11.0 to 3.11.3."""

    def __init__(self, owner: type, name: str):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_a_checkpoint_of_an_early_python_3_11_is_read(tmp_path):
    path = tmp_path / "states.pt"
    torch.save({"zero_stage": Attribute(ZeroStageEnum, "gradients")}, path)
    check_pickle(path)
    with loading_only_weights():
        assert torch.load(path)["zero_stage"] is ZeroStageEnum.gradients
    for owner, name in ((ZeroStageEnum, "mro"), (LossScaler, "backward")):
        torch.save({"evil": Attribute(owner, name)}, path)
        with loading_only_weights(), pytest.raises(ValueError, match=f"asks for the attribute '{name}'"):
            torch.load(path)


def test_our_checkpoints_hold_no_calls(tmp_path):
    pickle_enums_by_value()
    torch.save({"zero_stage": ZeroStageEnum.gradients}, tmp_path / "states.pt")
    assert get_unsafe_globals_in_checkpoint(tmp_path / "states.pt") == ["deepspeed.runtime.zero.config.ZeroStageEnum"]


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The output folder and the ds_config of a finished run of two steps at three stages."""
    folder = tmp_path_factory.mktemp("trained")
    runs = {name: (folder / name, ds_config_in(name, folder, bf16=False)) for name in ("zero0", "zero2", "zero3")}
    done = run_many([flags_of(corpus, out, config, "--run.max_steps=2") for out, config in runs.values()])
    assert done.code == 0, done.output
    return runs


@pytest.mark.parametrize(
    ("stage", "file", "form", "ranks"),
    [
        ("zero0", "mp_rank_00_model_states.pt", "zip", 1),
        ("zero2", "mp_rank_00_model_states.pt", "bare pickle", 1),
        ("zero2", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "legacy", 1),
        ("zero2", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "zip", 2),
        ("zero3", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "zip", 1),
    ],
)
def test_a_forged_file_is_refused_in_one_line(corpus: Corpus, tmp_path, trained, stage, file, form, ranks):
    source, ds_config = trained[stage]
    out, trace = tmp_path / "run", tmp_path / "trace"
    shutil.copytree(source, out)
    path = out / "checkpoints/step-00000002" / file
    forge(path, Evil(trace), form)
    done = run_many([flags_of(corpus, out, ds_config, "--run.max_steps=2")], ranks=ranks)
    assert done.code == 2
    assert not trace.exists()
    [line] = {line for line in done.output.splitlines() if line.startswith("pretrain: ")}
    assert str(path) in line
    assert "posix.mkdir, which no MegaBERT checkpoint does" in line or "not in a format that MegaBERT writes" in line
    assert "Traceback" not in done.output


def test_a_file_that_the_manifest_does_not_list_is_looked_at_too(corpus: Corpus, tmp_path, trained):
    source, ds_config = trained["zero2"]
    out, trace = tmp_path / "run", tmp_path / "trace"
    shutil.copytree(source, out)
    torch.save({"evil": Evil(trace)}, out / "checkpoints/step-00000002/zero_pp_rank_1_mp_rank_00_optim_states.pt")
    done = run_many([flags_of(corpus, out, ds_config, "--run.max_steps=2")])
    assert done.code == 2
    assert "names posix.mkdir" in done.output
    assert not trace.exists()


def test_export_refuses_the_same_files(tmp_path, trained):
    out, trace = tmp_path / "run", tmp_path / "trace"
    shutil.copytree(trained["zero2"][0], out)
    forge(out / "checkpoints/step-00000002/mp_rank_00_model_states.pt", Evil(trace), "zip")
    with pytest.raises(ValueError, match="names posix.mkdir"):
        read_checkpoint(out)
    assert not trace.exists()


def test_our_own_files_name_allowed_classes_only(trained):
    files = [file for out, _ in trained.values() for file in out.glob("checkpoints/*/*.pt")]
    assert len(files) == 5
    for file in files:
        check_pickle(file)


def test_whatever_is_loaded_in_the_block_runs_nothing(tmp_path):
    """Even if a file were changed after it was looked at."""
    torch.save(Evil(tmp_path / "trace"), tmp_path / "file.pt")
    with loading_only_weights():
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "file.pt", weights_only=False)
        assert os.environ[FORCE_WEIGHTS_ONLY] == "1"
    assert FORCE_WEIGHTS_ONLY not in os.environ
    assert not (tmp_path / "trace").exists()
