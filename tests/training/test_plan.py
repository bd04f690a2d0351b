"""The plan resolves all settings of a run once, and refuses those that do not fit together."""

import dataclasses

import pytest
import torch

from megabert.training.unsupported import why_not_compile
from tests.training.helpers.plans import plan


def test_the_plan_resolves_stage_batches_and_optimizer():
    resolved = plan(world_size=2)
    assert (resolved.ds_config.zero_stage, resolved.ds_config.bf16) == (2, False)
    assert (resolved.schedule.batches_per_step, resolved.schedule.total_steps) == (2, 10)
    assert resolved.ds_config.settings["gradient_accumulation_steps"] == 1
    assert (resolved.optimizer.source, resolved.device) == ("PyTorch", torch.device("cpu"))
    assert resolved.budget_s is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.rank = 1  # pyrefly: ignore[read-only]


def test_the_identity_has_only_settings_that_may_not_change():
    identity = plan().identity
    assert identity.settings["model.hidden_size"] == 32
    assert "run.output_dir" not in identity.settings
    assert identity == plan("--run.output_dir=elsewhere", "--run.log_every_steps=7").identity
    assert identity != plan("--optimizer.lr=1").identity


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        (["--data.global_batch_tokens=768"], {"world_size": 2}, "which 2 ranks cannot share evenly"),
        (["--optimizer.name=muon"], {}, "with Muon ZeRO clips the orthogonalized updates"),
        (["--run.compile"], {}, "run.compile true on a CPU"),
        (["--run.fp8=torchao"], {}, "run.fp8 is torchao, but .*. Change that, or set run.fp8 to none"),
        ([], {"ds_config": {"gradient_clipping": 5.0}}, "sets gradient_clipping to 5.0, but the recipe makes it 1.0"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_before_anything_is_opened(flags, options, message):
    with pytest.raises(ValueError, match=message):
        plan(*flags, **options)


def test_the_whole_model_is_compiled_on_a_gpu_below_stage_3_only():
    assert "run.ops auto already compiles each operation" in str(why_not_compile("cpu", 0))
    assert "Use ds_configs/zero2.json" in str(why_not_compile("cuda", 3))
    for stage in range(3):
        assert why_not_compile("cuda", stage) is None
