"""A ds_config is read strictly, and the recipe's values are filled in."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from megabert.config.ds_config import NOT_SUPPORTED, DsConfig, ResolvedDsConfig, read_ds_config
from megabert.config.ds_schema import DsSettings, ZeroOptimization

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"


def resolve(raw: dict[str, Any], fast_bf16: bool = True) -> ResolvedDsConfig:
    """Fill in the values of a recipe for 4 ranks."""
    return DsConfig("ds.json", raw).resolve(accumulation=2, max_grad_norm=1.0, world_size=4, fast_bf16=fast_bf16)


def test_the_ds_configs_differ_only_in_zero_optimization():
    rest = {}
    for path in FOLDER.glob("*.json"):
        ds_config = read_ds_config(path)
        assert path.stem.startswith(f"zero{ds_config.values.zero_optimization.stage}")
        rest[path.stem] = {key: value for key, value in ds_config.settings.items() if key != "zero_optimization"}
    assert set(rest) >= {"zero0", "zero1", "zero2", "zero3", "zero2_offload"}
    assert len({json.dumps(raw, sort_keys=True) for raw in rest.values()}) == 1


@pytest.mark.parametrize(
    ("given", "enabled"), [({}, False), ({"timers": {}}, False), ({"timers": {"throughput": {"enabled": True}}}, True)]
)
def test_deepspeeds_timer_which_waits_for_the_device_is_off_unless_it_is_asked_for(given, enabled):
    assert resolve(given).settings["timers"] == {"throughput": {"enabled": enabled}}
    for path in FOLDER.glob("*.json"):
        assert read_ds_config(path).settings["timers"] == {"throughput": {"enabled": False}}


def keys(kind: type, above: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting of a ds_config that is supported."""
    for name, type_ in get_type_hints(kind).items():
        yield f"{above}{name}"
        for part in (type_, *get_args(type_)):
            if dataclasses.is_dataclass(part):
                yield from keys(part, f"{above}{name}.")


def test_deepspeed_reads_every_key_that_is_supported_or_refused_by_name():
    """If DeepSpeed drops or renames a key, its sources no longer contain it."""
    import deepspeed

    root = Path(deepspeed.__file__).parent
    folders = [
        root / name
        for name in ("runtime", "datastates", "monitor", "profiling", "comm", "module_inject", "utils", "moe")
    ]
    text = "".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    names = {name.rpartition(".")[2] for name in (*keys(DsSettings), *NOT_SUPPORTED)}
    assert not {name for name in names if not re.search(rf"\b{name}\b", text)}


def test_the_schema_takes_the_defaults_and_types_of_deepspeed():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = {field.alias or name: field.default for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for field in dataclasses.fields(ZeroOptimization):
        default = theirs.pop(field.name)
        if field.name != "stage3_model_persistence_threshold":
            assert field.default == default, field.name
    assert {f"zero_optimization.{name}" for name in theirs} <= NOT_SUPPORTED.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"zero_optimisation": {"stage": 2}}',
            "unknown key zero_optimisation. Did you mean zero_optimization?",
        ),
        ('{"steps_per_print": 1, "steps_per_print": 2}', "the key 'steps_per_print' appears twice"),
        ("{", "not valid JSON"),
        ('{"zero_optimization": {"stage": 7}}', "zero_optimization.stage is 7, expected at most 3"),
        ('{"zero_optimization": {"stage": "two"}}', "zero_optimization.stage is 'two', expected"),
        ('{"zero_optimization": true}', "zero_optimization is True, expected keys and values"),
        ('{"zero_optimization": {"stage": true}}', "zero_optimization.stage is True, expected"),
        ('{"zero_optimization": {"stage": 2.0}}', "zero_optimization.stage is 2.0, expected"),
        ('{"zero_optimization": {"stage": [2]}}', r"zero_optimization.stage is \[2\], expected"),
        ('{"zero_optimization": null}', "zero_optimization is None, expected keys and values"),
        ('{"zero_optimization": {"offload_optimizer": "cpu"}}', "offload_optimizer is 'cpu', expected keys and values"),
        ('{"zero_optimization": {"mics_shard_size": 2}}', "mics_shard_size is not supported"),
        ('{"zero_optimization": {"zero_quantized_weights": true}}', "zero_quantized_weights is not supported"),
        (
            '{"optimizer": {"type": "Adam"}}',
            "sets 'optimizer', which MegaBERT takes from the recipe's optimizer section",
        ),
        ('{"scheduler": {"type": "WarmupLR"}}', "sets 'scheduler'"),
        ('{"zero_optimization": {"cpu_offload": true}}', "set zero_optimization.offload_optimizer"),
        ('{"zero_optimization": {"reduce_bucket_size": 0}}', "reduce_bucket_size is 0, expected at least 1"),
        ('{"zero_optimization": {"reduce_bucket_size": "auto"}}', "reduce_bucket_size is 'auto', expected an integer"),
        ('{"zero_optimization": {"reduce_bucket_size": 5.5e-1}}', "reduce_bucket_size is 0.55, expected an integer"),
        ('{"zero_optimization": {"overlap_comm": "yes"}}', "overlap_comm is 'yes', expected true or false"),
        ('{"zero_optimization": {"offload_optimizer": {"device": "cpu", "nvme_path": "/x"}}}', "it is for NVMe"),
        ('{"zero_optimization": {"leaf_module": {"classes": ["os.system"]}}}', "leaf_module is not supported"),
        ('{"torch_autocast": {"lower_precision_safe_modules": ["os.system"]}}', "0 is 'os.system', expected a name"),
        ('{"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.modules.x.Y"]}}', "expected a name such as"),
        ('{"disable_allgather": true}', "disable_allgather is not supported: DeepSpeed does not use it"),
        ('{"disable_allgather": "x"}', "disable_allgather is not supported"),
        ('{"dataloader_drop_last": true}', "has its own loader"),
        ('{"compile": {"deepcompile": true}}', "Set run.compile in the recipe"),
        ('{"gradient_allreduce_op": "sum"}', "gradient_allreduce_op is not supported"),
        ('{"dump_state": "x"}', "dump_state is 'x', expected true or false"),
        ('{"aio": {"block_size": -1}}', "aio is not supported: it is for NVMe"),
        ('{"timers": 5}', "timers is 5, expected keys and values"),
        ('{"timers": {"throughput": 5}}', "timers.throughput is 5, expected keys and values"),
        ('{"communication_data_type": 5}', "communication_data_type is 5, expected fp32, bf16 or fp16"),
        ('{"flops_profiler": {"profile_step": -1}}', "flops_profiler.profile_step is -1, expected at least 1"),
        ('{"flops_profiler": {"profile_stp": 1}}', "Did you mean flops_profiler.profile_step?"),
        ('{"csv_monitor": {"output_path": 3}}', "csv_monitor.output_path is 3, expected a string"),
        ('{"gradient_clipping": NaN}', "not valid JSON: NaN is not a number of JSON"),
        ('{"train_batch_size": -8}', "train_batch_size is -8, expected at least 1 or auto"),
        ('{"train_batch_size": 1' + "0" * 400 + "}", "train_batch_size is 1000"),
        ("[" * 100_000, "not valid JSON"),
        ("\x00", "not valid JSON"),
        ("[]", r"holds \[\], expected an object"),
        ('{"torch_autocast": true}', "torch_autocast is True, expected keys and values"),
        ('{"torch_autocast": {"enabled": 1}}', "torch_autocast.enabled is 1, expected true or false or auto"),
        ('{"torch_autocast": {"lower_precision_safe_modules": 3}}', "is 3, expected a list"),
        ('{"steps_per_print": "often"}', "steps_per_print is 'often', expected an integer"),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', "does nothing below stage 3"),
        ('{"fp16": true}', "fp16 is True, expected keys and values"),
        ('{"bf16": "auto"}', "bf16 is 'auto', expected keys and values"),
        ('{"activation_checkpointing": {"cpu_checkpointing": true}}', "Set model.gradient_checkpointing in the recipe"),
        ('{"data_efficiency": {"enabled": true}}', "data_efficiency is not supported: the recipe's data section"),
        ('{"tensor_parallel": {"autotp_size": 2}}', "trains data-parallel"),
        (
            '{"checkpoint": {"load_universal": true}}',
            "checkpoint is not supported: MegaBERT writes its own checkpoints",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            "offload_param.device is 'nvme', expected cpu or none",
        ),
    ],
)
def test_a_wrong_ds_config_is_refused(tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_ds_config(path)


@pytest.mark.parametrize(
    ("value", "fault"),
    [("[" * 300 + "]" * 300, "is nested too deep"), ('"\\ud800"', "holds half of a surrogate pair, such as")],
)
def test_json_that_python_reads_and_pydantic_does_not_is_refused_in_one_line(tmp_path, value, fault):
    path = tmp_path / "ds.json"
    path.write_text(f'{{"log_level": {value}}}')
    with pytest.raises(ValueError, match=f"^{path}: {fault}"):
        read_ds_config(path)


def test_sections_that_are_off_are_not_refused(tmp_path):
    path = tmp_path / "ds.json"
    raw = {
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "data_efficiency": {"enabled": False, "seed": 1234},
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 5e8,
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
