"""DeepSpeed's files of any stage and world size give the weights bit for bit, and nothing in them is executed."""

import contextlib
import io
import json
import pickle

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.convert.weight_names import TIED_DECODER
from megabert.files import checkpoint_format as layout
from megabert.files import hashing
from tests.convert.helpers.checkpoints import write_checkpoint, write_state
from tests.convert.helpers.folders import MakesFolder
from tests.convert.helpers.small_model import small_model


@pytest.mark.parametrize(
    ("stage", "world_size", "half"),
    [
        (0, 1, False),
        (1, 2, False),
        (1, 2, True),
        (2, 1, True),
        (2, 3, True),
        (3, 1, False),
        (3, 2, True),
        (3, 7, False),
    ],
)
def test_every_stage_and_world_size_gives_the_same_bits(corpus, tmp_path, stage, world_size, half):
    model = small_model()
    folder = write_checkpoint(tmp_path, model, corpus.tokenizer, stage=stage, world_size=world_size, half=half)
    weights, config, state = read_checkpoint(tmp_path)
    assert config.to_dict() == model.config.to_dict()
    assert state.zero_stage == stage
    assert weights.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter), name
    if stage:
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name) or {}
        assert theirs.keys() - {TIED_DECODER} == weights.keys()
        assert all(torch.equal(theirs[name], weights[name]) for name in weights)


def test_a_missing_rank_is_an_error(corpus, tmp_path):
    folder = write_checkpoint(tmp_path, small_model(), corpus.tokenizer, stage=3, world_size=3)
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ValueError, match=r"rank_1_mp_rank_00_optim_states.pt is missing"):
        read_checkpoint(tmp_path)
    rewrite(folder, 3)
    with pytest.raises(ValueError, match=r"optimizer states of ranks \[0, 2\]: some are missing"):
        read_checkpoint(tmp_path)


def test_a_missing_last_rank_is_an_error(corpus, tmp_path):
    folder = write_checkpoint(tmp_path, small_model(), corpus.tokenizer, stage=3, world_size=3)
    (folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    rewrite(folder, 3)
    with pytest.raises(ValueError, match="has the optimizer states of 2 ranks, but 3 ranks wrote it"):
        read_checkpoint(tmp_path)


def test_another_models_partitions_are_an_error(corpus, tmp_path):
    for stage, half in ((3, False), (2, True)):
        folder = write_checkpoint(
            tmp_path / f"{stage}", small_model(), corpus.tokenizer, stage=stage, world_size=1, half=half
        )
        other = write_checkpoint(
            tmp_path / f"other-{stage}", small_model(num_hidden_layers=1), corpus.tokenizer, stage=stage, half=half
        )
        name = f"{'bf16_' if half else ''}zero_pp_rank_0_mp_rank_00_optim_states.pt"
        (folder / name).write_bytes((other / name).read_bytes())
        rewrite(folder, stage)
        with pytest.raises(
            ValueError, match="its parameters have .* elements in a rank's file or a parameter group, but .* are stored"
        ):
            read_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("mp_rank_00_model_states.pt", "module"),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "optimizer_state_dict"),
    ],
)
def test_another_file_of_deepspeed_in_the_place_of_one_is_an_error(corpus, tmp_path, name, key):
    folder = write_checkpoint(tmp_path, small_model(), corpus.tokenizer, half=True)
    for found in ({"other": 1}, {key: [1]}, [1]):
        torch.save(found, folder / name)
        rewrite(folder, 2)
        with pytest.raises(ValueError, match=f"{name}: damaged: it has no '{key}'. Use another checkpoint"):
            read_checkpoint(tmp_path)


def rewrite(folder, stage: int) -> None:
    """Write state and manifest for the files in the folder as it is now."""
    (folder / layout.MANIFEST).unlink()
    (folder / layout.STATE).unlink()
    write_state(folder, small_model(), 2, stage, 3)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_pickle_in_a_checkpoint_is_never_executed(corpus, tmp_path, name):
    """The manifest matches, because an attacker can write that, too."""
    folder = write_checkpoint(tmp_path / "run", small_model(), corpus.tokenizer, half=True)
    witness = tmp_path / "witness"
    loaded = torch.load(folder / name, weights_only=True)
    torch.save(loaded | {"lr_scheduler": MakesFolder(witness)}, folder / name)
    rewrite(folder, 2)
    with pytest.raises(ValueError, match=f"{name}: was not read, because it names posix.mkdir, which no"):
        read_checkpoint(tmp_path / "run")
    assert not witness.exists()
    pickle.loads(pickle.dumps(MakesFolder(witness)))
    assert witness.exists(), "the pickle would create the folder"


def test_the_average_is_the_mean_of_the_last_checkpoints(corpus, tmp_path):
    models = [small_model(seed) for seed in range(4)]
    for step, model in enumerate(models, start=1):
        write_checkpoint(tmp_path, model, corpus.tokenizer, step=step, stage=3 if step % 2 else 2, world_size=2)
    weights, _, state = read_checkpoint(tmp_path, average=3)
    assert state.step == 4
    for name, tensor in weights.items():
        mean = torch.stack([model.get_parameter(name).detach() for model in models[1:]]).double().mean(dim=0)
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-7)
    older = read_checkpoint(tmp_path / "checkpoints" / layout.tag_of(2), average=2)[0]
    torch.testing.assert_close(older["decoder.bias"], (models[0].decoder.bias + models[1].decoder.bias).detach() / 2)
    with pytest.raises(ValueError, match="has 4 checkpoints up to step-00000004, cannot average 5"):
        read_checkpoint(tmp_path, average=5)
    with pytest.raises(ValueError, match="cannot average 0 checkpoints"):
        read_checkpoint(tmp_path, average=0)
    write_checkpoint(tmp_path, small_model(num_hidden_layers=1), corpus.tokenizer, step=5)
    with pytest.raises(ValueError, match="cannot be averaged with .*: its model.num_hidden_layers is 2, not 1"):
        read_checkpoint(tmp_path, average=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "1" * 64}, "its corpus is '0000"),
        ({"recipe": {"optimizer": {"lr": 7.0}}}, "its recipe.optimizer.lr is "),
        ({"recipe": {"masking": {"mlm_probability": 0.9}}}, "its recipe.masking.mlm_probability is "),
        ({"recipe": {"run": {"seed": 3}}}, "its seed is 17, not 3"),
        ({"tokenizer.json": " "}, "its tokenizer is '"),
        ({"recipe": {"data": {"train": "/moved"}, "run": {"output_dir": "/moved", "log_every_steps": 3}}}, None),
    ],
)
def test_only_checkpoints_of_one_run_are_averaged(corpus, tmp_path, changes, message):
    for step in (1, 2):
        folder = write_checkpoint(tmp_path, small_model(step), corpus.tokenizer, step=step)
    if "tokenizer.json" in changes:
        with open(folder / "tokenizer.json", "a") as file:
            file.write(changes["tokenizer.json"])
    raw = json.loads((folder / layout.STATE).read_text())
    for part, settings in changes.get("recipe", {}).items():
        raw["recipe"][part] |= settings
    raw["corpus"] = changes.get("corpus", raw["corpus"])
    (folder / layout.STATE).write_text(json.dumps(raw))
    (folder / layout.MANIFEST).unlink()
    files = {
        name: ((folder / name).stat().st_size, hashing.file_sha256(folder / name)) for name in layout.files_of(folder)
    }
    (folder / layout.MANIFEST).write_text(json.dumps(files))
    if message is None:
        read_checkpoint(tmp_path, average=2)
    else:
        with pytest.raises(ValueError, match=f"cannot be averaged with .*: {message}"):
            read_checkpoint(tmp_path, average=2)
