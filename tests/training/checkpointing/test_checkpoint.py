"""Checkpoints without training: which runs may resume from them, their format, and their integrity check."""

import dataclasses
import json

import pytest

from megabert.config.data_section import DataConfig, DataPhase
from megabert.config.recipe import MaskingConfig, OptimizerConfig, Recipe, RunConfig
from megabert.files import checkpoint_format as layout
from megabert.files import hashing
from megabert.files.checkpoint_format import State
from megabert.training.checkpointing import find
from megabert.training.checkpointing.writer import set_aside_after
from megabert.training.identity import RunIdentity, check_branch, check_same_run, fixed_settings
from megabert.training.run_schedule import ENDLESS
from megabert.training.updates.guard import Guard
from tests.training.helpers.checkpoints import RECIPE, STATE


def check(recipe: Recipe = RECIPE, state: State = STATE, corpus: str = STATE.corpus, **changes):
    """Resume a run of this recipe from this state; changes: what differs from the run that wrote STATE."""
    current = dataclasses.replace(
        RunIdentity.of_checkpoint(STATE), settings=fixed_settings(recipe.to_dict()), **changes
    )
    check_same_run(layout.Path("step-00000004"), state, current, corpus)


def test_settings_without_an_effect_on_training_may_change():
    check()
    check(dataclasses.replace(RECIPE, run=RunConfig(max_steps=10, log_every_steps=3, output_dir="elsewhere")))


def test_another_recipe_is_refused_with_every_setting_that_differs():
    other = dataclasses.replace(
        RECIPE, optimizer=dataclasses.replace(RECIPE.optimizer, lr=0.5), run=RunConfig(max_steps=10, seed=3)
    )
    with pytest.raises(ValueError, match=r"optimizer\.lr was 0\.0005 and is 0\.5; run\.seed was 17 and is 3"):
        check(other)


def test_a_checkpoint_from_before_a_setting_has_its_default():
    old = RECIPE.to_dict()
    for name in ("data.documents", "masking.schedule", "optimizer.decay", "run.fp8", "model.norm_position"):
        section, setting = name.split(".")
        del old[section][setting]
    del old["probe"]
    check(state=dataclasses.replace(STATE, recipe=old))
    for changes in ({"run": RunConfig(max_steps=10, fp8="torchao")}, {"data": DataConfig(documents="truncate")}):
        with pytest.raises(ValueError, match=r"(run.fp8 was 'none'|data.documents was 'split') and is 't"):
            check(dataclasses.replace(RECIPE, **changes), dataclasses.replace(STATE, recipe=old))


def with_steps(steps: int, **optimizer) -> Recipe:
    return dataclasses.replace(RECIPE, run=RunConfig(max_steps=steps), optimizer=OptimizerConfig(**optimizer))


@pytest.mark.parametrize(
    ("step", "optimizer", "allowed"),
    [
        (30, {"schedule": "wsd"}, True),
        # The decay would begin here.
        (90, {"schedule": "wsd"}, True),
        (91, {"schedule": "wsd"}, False),
        # In the warm-up of the longer run.
        (10, {"schedule": "wsd"}, False),
        (99, {"schedule": "constant"}, True),
        (30, {"schedule": "cosine"}, False),
    ],
)
def test_a_run_on_a_plateau_of_its_learning_rate_may_become_longer(step, optimizer, allowed):
    old, new = with_steps(100, **optimizer), with_steps(200, **optimizer)
    state = dataclasses.replace(STATE, step=step, total_steps=100, recipe=old.to_dict())
    if allowed:
        check(new, state, total_steps=200)
    else:
        with pytest.raises(ValueError, match=r"run.max_steps was 100 and is 200.* --run.branch_from"):
            check(new, state, total_steps=200)
    with pytest.raises(ValueError, match=r"run.max_steps was 200 and is 100"):
        check(old, dataclasses.replace(state, total_steps=200, recipe=new.to_dict()), total_steps=100)


def test_a_run_whose_data_depend_on_its_length_may_not_become_longer():
    phases = [DataPhase(until=0.5), DataPhase(until=1.0, max_seq_len=64)]
    for change in ({"data": DataConfig(phases=phases)}, {"masking": MaskingConfig(schedule="linear")}):
        old, new = (dataclasses.replace(with_steps(n, schedule="wsd"), **change) for n in (100, 200))
        state = dataclasses.replace(STATE, step=30, total_steps=100, recipe=old.to_dict())
        with pytest.raises(ValueError, match=r"run.max_steps was 100 and is 200"):
            check(new, state, total_steps=200)


def test_a_branch_of_other_hours_is_refused_where_data_change_with_the_time():
    """Masking may change with the time, because it needs nothing of the bins before."""

    def hours(number: float, **changes) -> RunIdentity:
        recipe = dataclasses.replace(RECIPE, run=RunConfig(max_hours=number), **changes)
        return RunIdentity.of_checkpoint(dataclasses.replace(STATE, total_steps=ENDLESS, recipe=recipe.to_dict()))

    def branch(change: dict, new: float) -> None:
        recipe = dataclasses.replace(RECIPE, run=RunConfig(max_hours=2), **change)
        state = dataclasses.replace(STATE, total_steps=ENDLESS, recipe=recipe.to_dict())
        check_branch(layout.Path("step-00000004"), state, hours(new, **change), STATE.corpus)

    phases = {"data": DataConfig(phases=[DataPhase(until=0.5), DataPhase(until=1.0, max_seq_len=64)])}
    branch(phases, 2)
    branch({"masking": MaskingConfig(schedule="linear")}, 3)
    with pytest.raises(ValueError, match="a branch is as long as the run itself: 2 hours, not 3 hours"):
        branch(phases, 3)


@pytest.mark.parametrize("trunk", [{"max_steps": 10}, {"max_hours": 2}])
def test_a_branch_without_time_for_a_step_is_refused(trunk):
    """It would end at once, with exit code 0 and without a checkpoint."""
    old = dataclasses.replace(RECIPE, run=RunConfig(**trunk))
    state = dataclasses.replace(STATE, recipe=old.to_dict(), wall_seconds=7000.0, max_step_seconds=250.0)

    def branch(hours: float) -> None:
        recipe = dataclasses.replace(RECIPE, run=RunConfig(max_hours=hours))
        current = RunIdentity.of_checkpoint(dataclasses.replace(state, total_steps=ENDLESS, recipe=recipe.to_dict()))
        check_branch(layout.Path("step-00000004"), state, current, STATE.corpus)

    branch(2.1)
    for hours in (1, 2):
        with pytest.raises(ValueError, match=rf"used 1.94 hours already, and this run has {hours}. Set run.max_hours"):
            branch(hours)


def test_shards_of_a_phase_may_move_but_not_change_places():
    def recipe(*trains: str | None) -> Recipe:
        phases = [DataPhase(until=(n + 1) / len(trains), train=train) for n, train in enumerate(trains)]
        return dataclasses.replace(RECIPE, data=DataConfig(train="web", phases=phases))

    state = dataclasses.replace(STATE, recipe=recipe(None, "good", None).to_dict())
    check(recipe(None, "elsewhere/good", None), state)
    with pytest.raises(ValueError, match="data.phases was"):
        check(recipe(None, "good", "good"), state)


def test_another_corpus_or_stage_is_refused():
    with pytest.raises(ValueError, match="trained on corpus cccccccccccc, but data.train is dddddddddddd"):
        check(corpus="d" * 64)
    with pytest.raises(
        ValueError, match="written at ZeRO stage 2, this is stage 3, .* with a fresh optimizer: .* model.init_from"
    ):
        check(zero_stage=3)
    with pytest.raises(ValueError, match="written at ZeRO stage 2, this is stage 0"):
        check(zero_stage=0)


def test_stage_2_resumes_at_stage_1_and_on_any_number_of_ranks():
    check(zero_stage=1)
    check(world_size=4)


def test_another_implementation_of_the_optimizer_is_refused():
    with pytest.raises(ValueError, match="written with the optimizer of PyTorch, whose state the optimizer of apex"):
        check(optimizer_source="apex")


def test_another_batch_or_length_is_refused():
    with pytest.raises(ValueError, match="a step was 4 micro-batches and the run 10 steps; now they are 8 and 5"):
        check(batches_per_step=8, total_steps=5)


def test_a_run_whose_steps_are_counted_anew_continues_as_a_branch():
    """As the message says, also with a batch warm-up, which such runs have."""
    data = DataConfig(batch_warmup=0.5, batch_warmup_from=RECIPE.data.bin_tokens, global_batch_tokens=1 << 20)
    by_tokens = dataclasses.replace(RECIPE, run=RunConfig(max_tokens=10**9), data=data)
    state = dataclasses.replace(STATE, recipe=by_tokens.to_dict())
    with pytest.raises(ValueError, match="the run had 10 steps and has 12 now. Start a branch .* --run.max_steps 10"):
        check(by_tokens, state, total_steps=12)
    by_steps = dataclasses.replace(by_tokens, run=RunConfig(max_steps=10))
    branch = RunIdentity.of_checkpoint(dataclasses.replace(STATE, recipe=by_steps.to_dict()))
    check_branch(layout.Path("step-00000004"), state, branch, STATE.corpus)


def test_checkpoints_of_later_steps_are_set_aside(tmp_path):
    for step in (3, 9, 12):
        (tmp_path / layout.tag_of(step)).mkdir()
    set_aside_after(tmp_path, 5)
    assert layout.list_tags(tmp_path) == [layout.tag_of(3)]
    [aside] = tmp_path.glob("set-aside-*")
    assert sorted(path.name for path in aside.iterdir()) == [layout.tag_of(9), layout.tag_of(12)]


def test_stage_0_resumes_on_any_number_of_ranks():
    check(state=dataclasses.replace(STATE, zero_stage=0), zero_stage=0, world_size=8)


BF16 = {"enabled": True, "dtype": "bfloat16"}


def test_another_precision_is_refused():
    off = {"torch_autocast": {"enabled": False}, "steps_per_print": 1}
    check(state=dataclasses.replace(STATE, ds_config=off))
    check(state=dataclasses.replace(STATE, ds_config={"torch_autocast": BF16}), numerics={"torch_autocast": BF16})
    with pytest.raises(ValueError, match=r"torch_autocast was off and is {'enabled': True.*set true or false"):
        check(numerics={"torch_autocast": BF16})
    state = dataclasses.replace(STATE, ds_config={"communication_data_type": "bf16"})
    with pytest.raises(ValueError, match="communication_data_type was 'bf16' and is off"):
        check(state=state)


def test_muon_above_stage_0_resumes_on_as_many_ranks_only():
    recipe = Recipe(run=RunConfig(max_steps=10), optimizer=OptimizerConfig(name="muon", max_grad_norm=0.0))
    state = dataclasses.replace(STATE, recipe=recipe.to_dict())
    check(recipe, state)
    with pytest.raises(ValueError, match="written by 2 ranks, now there are 4: above ZeRO 0 the state of Muon"):
        check(recipe, state, world_size=4)


def test_muon_of_an_earlier_version_is_refused():
    recipe = Recipe(run=RunConfig(max_steps=10), optimizer=OptimizerConfig(name="muon", max_grad_norm=0.0))
    state = dataclasses.replace(STATE, recipe=recipe.to_dict(), format_version=6)
    message = "whose Muon took other steps. Finish the run with the version that began it, or"
    with pytest.raises(ValueError, match=message):
        check(recipe, state)
    with pytest.raises(ValueError, match=message):
        check_branch(layout.Path("trunk"), state, RunIdentity.of_checkpoint(state), state.corpus)
    check(state=dataclasses.replace(STATE, format_version=6))


@pytest.fixture
def folder(tmp_path):
    """A complete checkpoint of three files."""
    folder = tmp_path / "checkpoints" / layout.tag_of(4)
    folder.mkdir(parents=True)
    (folder / layout.STATE).write_text(json.dumps(vars(STATE)))
    (folder / layout.STREAMS).write_text("{}")
    (folder / "weights.pt").write_bytes(b"weights")
    hashes = {name: hashing.hash_and_sync(folder / name) for name in layout.files_of(folder)}
    (folder / layout.MANIFEST).write_text(json.dumps(hashes))
    return folder


def test_a_whole_checkpoint_is_found_and_read(folder):
    assert layout.check_files(folder) is None
    for path in (folder, folder.parent, folder.parent.parent):
        assert layout.find_checkpoint(path) == folder
    assert layout.read_state(folder) == STATE


def test_the_newest_by_number_is_found(folder):
    newer = folder.parent / layout.tag_of(100_000_000)
    folder.rename(newer)
    (folder.parent / layout.tag_of(7)).mkdir()
    (folder.parent / ".tmp-step-00000099").mkdir()
    assert layout.list_tags(folder.parent) == [newer.name, layout.tag_of(7)]


def test_damage_is_named(folder):
    (folder / "weights.pt").write_bytes(b"weightz")
    assert "weights.pt is damaged" in str(layout.check_files(folder))
    (folder / "weights.pt").write_bytes(b"short")
    assert "weights.pt has 5 bytes, expected 7" in str(layout.check_files(folder))
    (folder / "weights.pt").unlink()
    assert "weights.pt is missing" in str(layout.check_files(folder))
    (folder / layout.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"MANIFEST\.json: damaged"):
        layout.check_files(folder)
    (folder / layout.MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"has no MANIFEST\.json, so it is not a complete checkpoint"):
        layout.check_files(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"state.json": 3}', '{"state.json": [1, "x"]}'])
def test_a_manifest_that_lists_no_whole_checkpoint_is_damage(folder, text):
    (folder / layout.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"MANIFEST.json: damaged: it (does not list|holds a list)"):
        layout.read_manifest(folder)


def write_state(folder: layout.Path, **changes) -> None:
    path = folder / layout.STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_damaged_state_is_named_and_does_not_hide_other_checkpoints(folder):
    write_state(folder, novelty=1)
    with pytest.raises(ValueError, match=r"state.json: damaged: .*novelty"):
        layout.read_state(folder)
    for text in ("{", "[]", "{}"):
        (folder / layout.STATE).write_text(text)
        with pytest.raises(ValueError, match=r"state.json: damaged"):
            layout.read_state(folder)
    (folder.parent / layout.tag_of(99)).touch()
    assert layout.list_tags(folder.parent) == [folder.name]
    assert layout.heldout_losses(folder.parent) == {folder.name: None}


# A state.json of format version 1, which had no format_version; the newest keys of that version are optional.
VERSION_1 = {
    "step": 4, "next_index": 8, "tokens": 1000, "seconds": 1.0, "world_size": 2, "num_streams": 24, "step_batches": 4,
    "total_steps": 10, "corpus": "c" * 64, "recipe": RECIPE.to_dict(),
    "ds_config": {"zero_optimization": {"stage": 2}}, "model": {}, "adamw": "PyTorch",
    "guard": {"norms": [], "skipped": 0, "in_a_row": 0}, "left_behind": [[4, 6]],
}  # fmt: skip


def test_a_state_of_version_1_is_read(folder):
    (folder / layout.STATE).write_text(json.dumps(VERSION_1 | {"heldout_loss": 2.5, "used": 60.0, "slowest": 2.0}))
    assert layout.read_state(folder) == dataclasses.replace(
        STATE, rolled_back_bins=[(4, 6)], heldout_loss=2.5, format_version=1
    )
    (folder / layout.STATE).write_text(json.dumps(VERSION_1))
    state = layout.read_state(folder)
    assert (state.zero_stage, state.wall_seconds, state.max_step_seconds, state.heldout_loss) == (2, 0.0, 0.0, None)
    check(state=state)


def test_a_state_of_version_2_is_read_and_does_not_say_how_many_documents_a_bin_has(folder):
    raw = dataclasses.asdict(STATE)
    del raw["max_documents"]
    raw["step_batches"] = raw.pop("batches_per_step")
    (folder / layout.STATE).write_text(json.dumps(raw | {"format_version": 2}))
    assert layout.read_state(folder) == dataclasses.replace(STATE, format_version=2)
    write_state(folder, max_documents={32: 19}, time_table=[0, 4, 8])
    state = layout.read_state(folder)
    assert (state.max_documents, state.time_table) == ({32: 19}, [0, 4, 8])


@pytest.mark.parametrize("version", [layout.FORMAT_VERSION + 1, 0, "2", None])
def test_a_state_of_an_unknown_version_is_refused(folder, version):
    write_state(folder, format_version=version)
    with pytest.raises(
        ValueError, match=f"reads versions 1 to {layout.FORMAT_VERSION}. Use the MegaBERT that wrote this checkpoint"
    ):
        layout.read_state(folder)


def test_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint here; expected a run's output folder, or one of its"):
        layout.find_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"none: no such folder, .* one of its checkpoints/step-... folders, or x\.$"):
        layout.find_checkpoint(tmp_path / "none", or_else="x")


@pytest.mark.parametrize("setting", ["resume", "branch_from"])
def test_the_folder_of_a_model_is_sent_to_init_from(tmp_path, setting):
    (tmp_path / "config.json").write_text("{}")
    settings = RunConfig(**{"output_dir": str(tmp_path / "out"), setting: str(tmp_path)})
    with pytest.raises(ValueError, match="is the folder of a model and no checkpoint. --model.init_from starts a run"):
        find.saved_state(settings)
    with pytest.raises(ValueError, match="--model.init_from starts a run with its weights"):
        find.find(str(tmp_path), tmp_path / "out", lambda path: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "four"}, "step: Input should be a valid integer"),
        ({"recipe": {"data": 3}}, "recipe.data: Input should be a valid dictionary"),
        ({"recipe": {}}, "recipe: has no data.max_seq_len"),
        ({"rolled_back_bins": [[1]]}, r"rolled_back_bins.0.1: Field required"),
        ({"ds_config": []}, "ds_config: Input should be a valid dictionary"),
        ({"surprise": 1}, "surprise: Unexpected keyword argument"),
    ],
)
def test_a_state_of_wrong_types_is_refused_in_one_line(folder, changes, message):
    write_state(folder, **changes)
    with pytest.raises(ValueError, match=f"state.json: damaged: {message}") as error:
        layout.read_state(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("raw", [{}, {"norms": 1, "skipped": 0, "in_a_row": 0}, {"norms": [], "skipped": "x"}])
def test_a_damaged_history_of_norms_is_named(raw):
    with pytest.raises(ValueError, match=r"state.json is damaged: guard: \w+Error"):
        Guard(0.0).restore(raw)
