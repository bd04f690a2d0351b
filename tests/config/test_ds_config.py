"""A ds_config is read strictly, and the recipe's values are filled in."""

import json
from pathlib import Path
from typing import Any

import pytest

from megabert.config.ds_config import KNOWN_KEYS, DsConfig, ResolvedDsConfig, read_ds_config

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"


def resolve(raw: dict[str, Any], fast_bf16: bool = True) -> ResolvedDsConfig:
    """Fill in the values of a recipe for 4 ranks."""
    return DsConfig("ds.json", raw).resolve(accumulation=2, max_grad_norm=1.0, world_size=4, fast_bf16=fast_bf16)


def test_the_ds_configs_differ_only_in_zero_optimization():
    rest = {}
    for path in FOLDER.glob("*.json"):
        raw = read_ds_config(path).settings
        zero = raw.pop("zero_optimization")
        assert path.stem.startswith(f"zero{zero['stage']}")
        rest[path.stem] = raw
    assert set(rest) >= {"zero0", "zero1", "zero2", "zero3", "zero2_offload"}
    assert len({json.dumps(raw, sort_keys=True) for raw in rest.values()}) == 1


def test_deepspeed_reads_every_known_key():
    """If DeepSpeed drops or renames a key, its sources no longer contain it."""
    import deepspeed

    root = Path(deepspeed.__file__).parent
    folders = [
        root / name
        for name in ("runtime", "datastates", "monitor", "profiling", "comm", "module_inject", "utils", "moe")
    ]
    text = "".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    missing = {key for key in KNOWN_KEYS if f'"{key}"' not in text and f"'{key}'" not in text}
    assert not missing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"zero_optimisation": {"stage": 2}}',
            "no top-level key 'zero_optimisation'. Did you mean zero_optimization?",
        ),
        ('{"steps_per_print": 1, "steps_per_print": 2}', "the key 'steps_per_print' appears twice"),
        ("{", "not valid JSON"),
        ('{"zero_optimization": {"stage": 7}}', "zero_optimization.stage is 7, expected 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": "two"}}', "zero_optimization.stage is 'two', expected"),
        ('{"zero_optimization": true}', "zero_optimization is true, expected an object"),
        ('{"zero_optimization": {"stage": true}}', "zero_optimization.stage is True, expected"),
        ('{"zero_optimization": {"stage": 2.0}}', "zero_optimization.stage is 2.0, expected"),
        ('{"zero_optimization": {"stage": [2]}}', r"zero_optimization.stage is \[2\], expected"),
        ('{"zero_optimization": null}', "zero_optimization is null, expected an object"),
        ('{"zero_optimization": {"offload_optimizer": "cpu"}}', "offload_optimizer is 'cpu', expected an object"),
        ('{"zero_optimization": {"mics_shard_size": 2}}', "mics_shard_size is not supported"),
        ('{"zero_optimization": {"zero_quantized_weights": true}}', "zero_quantized_weights is not supported"),
        ("[]", r"holds \[\], expected an object"),
        ('{"torch_autocast": true}', "torch_autocast is true, expected an object"),
        ('{"torch_autocast": {"enabled": 1}}', "torch_autocast.enabled is 1, expected true, false or"),
        ('{"torch_autocast": {"lower_precision_safe_modules": 3}}', "is 3, expected a list of names"),
        ('{"steps_per_print": "often"}', "steps_per_print is 'often', expected a number of steps"),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', "does nothing below stage 3"),
        ('{"fp16": true}', "fp16 is true, expected an object"),
        ('{"bf16": "auto"}', 'bf16 is "auto", expected an object'),
        ('{"activation_checkpointing": {"cpu_checkpointing": true}}', "Set model.gradient_checkpointing in the recipe"),
        ('{"data_efficiency": {"enabled": true}}', "data_efficiency is not supported: the recipe's data section"),
        ('{"tensor_parallel": {"autotp_size": 2}}', "trains data-parallel"),
        ('{"checkpoint": {"load_universal": true}}', "MegaBERT sets checkpoint.load_universal itself"),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            'offload_param.device is \'nvme\', expected "cpu" or "none"',
        ),
    ],
)
def test_a_wrong_ds_config_is_refused(tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_ds_config(path)


def test_sections_that_are_off_are_not_refused(tmp_path):
    path = tmp_path / "ds.json"
    raw = {
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "data_efficiency": {"enabled": False, "seed": 1234},
        "zero_optimization": {
            "stage": 2,
            "mics_shard_size": -1,
            "zero_quantized_weights": False,
            "offload_param": None,
        },
    }
    path.write_text(json.dumps(raw))
    assert read_ds_config(path) == DsConfig(str(path), raw)


def test_the_numerics_contain_only_what_is_on():
    assert resolve({"torch_autocast": {"dtype": "bfloat16"}, "prescale_gradients": False}).numerics == {}
    raw = {
        "torch_autocast": {"enabled": "auto"},
        "data_types": {"grad_accum_dtype": "bf16"},
        "bf16": {"enabled": False},
    }
    assert resolve(raw).numerics == {
        "torch_autocast": {"enabled": True},
        "data_types": {"grad_accum_dtype": "bf16"},
    }


@pytest.mark.parametrize("raw", [{"prescale_gradients": True}, {"gradient_predivide_factor": 2.0}])
def test_the_numerics_contain_how_gradients_are_scaled(raw):
    assert resolve(raw).numerics == raw
    assert resolve({"gradient_predivide_factor": 1.0}).numerics == {}


def test_a_missing_ds_config_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such ds_config"):
        read_ds_config(tmp_path / "none.json")


def test_the_recipes_values_are_filled_in():
    filled = resolve({"train_batch_size": "auto", "zero_optimization": {"stage": 2}}).settings
    assert filled["train_batch_size"] == 8
    assert filled["gradient_accumulation_steps"] == 2
    assert filled["gradient_clipping"] == 1.0
    assert filled["train_micro_batch_size_per_gpu"] == 1
    assert filled["torch_autocast"] == {"enabled": False}


def test_at_stage_0_the_guard_clips():
    """DeepSpeed's own clipping does not report the norm."""
    assert resolve({}).settings["gradient_clipping"] == 0.0


@pytest.mark.parametrize("fast_bf16", [True, False])
def test_autocast_auto_depends_on_the_device(fast_bf16):
    raw = {"torch_autocast": {"enabled": "auto", "dtype": "bfloat16"}}
    resolved = resolve(raw, fast_bf16)
    assert resolved.bf16 is fast_bf16
    assert resolved.settings["torch_autocast"] == {"enabled": fast_bf16, "dtype": "bfloat16"}
    assert raw["torch_autocast"]["enabled"] == "auto"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            "compute_grad_norm false hides the gradient's norm",
        ),
        ({"train_batch_size": 7}, r"sets train_batch_size to 7, but the recipe makes it 8 \(data.global_batch_tokens"),
        ({"gradient_clipping": 0.5}, r"to 0.5, but the recipe makes it 1.0 \(optimizer.max_grad_norm\)"),
        ({"optimizer": {"type": "Adam"}}, "sets 'optimizer', which MegaBERT takes from the recipe's optimizer section"),
        ({"scheduler": {"type": "WarmupLR"}}, "sets 'scheduler'"),
        ({"bf16": {"enabled": True}}, "bf16.enabled at ZeRO stage 0 takes a wrong first Adam step"),
        ({"fp16": {"enabled": True}}, "fp16 is not supported"),
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
            "torch_autocast.dtype is 'float16', expected bfloat16",
        ),
    ],
)
def test_a_ds_config_that_contradicts_the_recipe_is_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        resolve(raw)


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({}, (0, False, True)),
        ({"stage": 3, "reduce_scatter": False}, (3, False, False)),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, (2, True, True)),
        ({"stage": 2, "offload_optimizer": {"device": "none"}}, (2, False, True)),
        ({"stage": 2, "offload_optimizer": None}, (2, False, True)),
    ],
)
def test_the_resolved_ds_config_answers_by_property(zero, expected):
    resolved = ResolvedDsConfig({"zero_optimization": zero})
    assert (resolved.zero_stage, resolved.offloads_optimizer, resolved.reduce_scatter) == expected
    assert resolved.bf16 is False
