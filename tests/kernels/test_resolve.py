"""Every branch of the choice of implementations, for made-up machines."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from megabert.kernels import cpu
from megabert.kernels import resolve as resolving
from megabert.kernels.resolve import (
    Machine,
    choose_adamw,
    cpu_ops,
    inspect_machine,
    resolve,
    why_not_flash,
    why_not_triton,
)
from megabert.model.attention import PLANNERS
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.ops import TORCH_OPS, Ops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
A100 = Machine(device_type="cuda", capability=(8, 0), installed={"flash_attn": "2.8.3", "triton": "3.7.1"})
LAPTOP = Machine(device_type="cpu", installed={})
CONFIG = MegaBertConfig()


def without(machine, *modules):
    return dataclasses.replace(machine, installed={k: v for k, v in machine.installed.items() if k not in modules})


def having(machine, **versions):
    return dataclasses.replace(machine, installed=dict(machine.installed) | versions)


@pytest.fixture
def stand_in(monkeypatch):
    """Replace Triton's kernels by names, so that the test runs without Triton."""
    ops = Ops(*(f"Triton {name}" for name in Ops._fields))
    monkeypatch.setattr(resolving, "triton_ops", lambda: ops)
    return ops


def resolve_and_log(caplog, name, machine, config=CONFIG, bf16=True):
    caplog.clear()
    caplog.set_level("INFO")
    ops = resolve(name, CUDA, config, bf16, machine)
    assert len(caplog.messages) == 1, "one line per run"
    return ops, caplog.messages[0]


def test_with_everything_installed(stand_in, caplog):
    for name in ("auto", "fused"):
        ops, line = resolve_and_log(caplog, name, A100)
        assert ops == stand_in._replace(attention=PLANNERS["flash_attention_2"])
        assert line == (
            "ops: attention from flash-attn; layer_norm, geglu, add_layer_norm, embed_layer_norm, "
            f"masked_cross_entropy from Triton (run.ops {name})"
        )


def test_without_flash_attn_attention_is_from_triton(stand_in, caplog):
    for name in ("auto", "fused"):
        ops, line = resolve_and_log(caplog, name, without(A100, "flash_attn"))
        assert ops == stand_in
        assert line == (
            "ops: all from Triton (flash-attn is not installed (pip install flash-attn --no-build-isolation))"
        )


def test_without_triton_the_other_operations_are_from_pytorch(caplog):
    ops, line = resolve_and_log(caplog, "auto", without(A100, "triton"))
    assert ops == TORCH_OPS._replace(attention=PLANNERS["flash_attention_2"])
    assert line.startswith("ops: attention from flash-attn; layer_norm, geglu,")
    assert "from PyTorch (Triton is not installed (pip install -e '.[kernels]'))" in line


def test_with_nothing_installed_all_operations_are_from_pytorch(caplog):
    ops, line = resolve_and_log(caplog, "auto", without(A100, "triton", "flash_attn"))
    assert ops == TORCH_OPS._replace(attention=PLANNERS["sdpa"])
    assert line.startswith("ops: all from PyTorch (flash-attn is not installed")
    assert line.count("Triton is not installed") == 1


def test_torch_is_plain_pytorch_on_every_machine(caplog):
    for machine in (A100, LAPTOP):
        ops, line = resolve_and_log(caplog, "torch", machine)
        assert ops == TORCH_OPS._replace(attention=PLANNERS["sdpa"])
        assert line == "ops: all from PyTorch (run.ops torch)"


def test_a_cpu_takes_cpu_ops_and_logs_their_description(monkeypatch, caplog):
    chosen = TORCH_OPS._replace(geglu=abs)
    monkeypatch.setattr(resolving, "cpu_ops", lambda config, bf16: (chosen, "the choice (reason)"))
    ops, line = resolve_and_log(caplog, "auto", LAPTOP)
    assert ops == chosen
    assert line == "ops: the choice (reason)"


def test_the_description_says_that_attention_computes_padding():
    assert "attention over padded rows;" in cpu_ops(MegaBertConfig(padding="padded"), bf16=True)[1]


def test_a_cpu_takes_plain_pytorch_without_a_compiler_or_where_compiling_gains_nothing(monkeypatch):
    plain = TORCH_OPS._replace(attention=PLANNERS["sdpa"])
    without, with_dropout = (MegaBertConfig(hidden_dropout_prob=p) for p in (0.0, 0.1))
    chosen, description = cpu_ops(without, bf16=False)
    assert chosen == plain
    assert description.endswith("(in fp32 without dropout fusing them gains nothing)")
    for config, bf16 in ((without, True), (with_dropout, False)):
        assert cpu_ops(config, bf16)[0].geglu is cpu.geglu

    def none():
        raise cpu.exc.InvalidCxxCompiler

    monkeypatch.setattr(cpu.cpp_builder, "get_cpp_compiler", none)
    chosen, description = cpu_ops(with_dropout, bf16=True)
    assert chosen == plain
    assert description.endswith("(torch.compile finds no C++ compiler (install g++, or set CXX))")


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (LAPTOP, "run.ops is fused, but flash-attn needs a CUDA device, this is cpu; Triton needs a CUDA device"),
        (without(A100, "triton"), "run.ops is fused, but Triton is not installed .*use run.ops auto"),
        (without(A100, "triton", "flash_attn"), "flash-attn is not installed .*; Triton is not installed"),
        (dataclasses.replace(A100, capability=(7, 5)), "flash-attn needs compute capability 8.0, this is 7.5; Triton"),
    ],
)
def test_fused_fails_if_an_operation_cannot_be_fused(machine, message):
    with pytest.raises(ValueError, match=message):
        resolve("fused", CUDA, CONFIG, True, machine)


@pytest.mark.parametrize(
    ("machine", "config", "bf16", "reason"),
    [
        (A100, CONFIG, True, None),
        (LAPTOP, CONFIG, True, "flash-attn needs a CUDA device, this is cpu"),
        (without(A100, "flash_attn"), CONFIG, True, "flash-attn is not installed"),
        (having(A100, flash_attn="2.3.6"), CONFIG, True, "flash-attn 2.3.6 is older than 2.4, the first with ALiBi"),
        (A100, MegaBertConfig(padding="padded"), True, "model.padding padded computes the padding"),
        (A100, CONFIG, False, "flash-attn computes in bf16, and torch_autocast is off"),
        (dataclasses.replace(A100, capability=(7, 0)), CONFIG, True, "flash-attn needs compute capability 8.0"),
    ],
)
def test_reasons_against_flash_attn(machine, config, bf16, reason):
    got = why_not_flash(CUDA, config, bf16, machine)
    assert got == reason or (reason and got.startswith(reason))


@pytest.mark.parametrize(
    ("operation", "machine", "config", "bf16", "reason"),
    [
        ("attention", A100, CONFIG, True, None),
        ("attention", A100, MegaBertConfig(padding="padded"), True, None),
        ("geglu", A100, CONFIG, False, None),
        ("geglu", LAPTOP, CONFIG, True, "Triton needs a CUDA device, this is cpu"),
        ("geglu", without(A100, "triton"), CONFIG, True, "Triton is not installed"),
        ("geglu", having(A100, triton="3.4.0"), CONFIG, True, "Triton 3.4.0 is older than 3.7"),
        ("geglu", dataclasses.replace(A100, capability=(7, 0)), CONFIG, True, "Triton needs compute capability 8.0"),
        ("layer_norm", A100, MegaBertConfig(hidden_size=12_288), True, "Triton's LayerNorm takes rows of up to 8192"),
        ("geglu", A100, MegaBertConfig(hidden_size=12_288), True, None),
        (
            "attention",
            A100,
            MegaBertConfig(hidden_size=576),
            True,
            "Triton's attention takes head sizes 16, 32, 64, 128",
        ),
        ("attention", A100, CONFIG, False, "Triton's attention computes in bf16, and torch_autocast is off"),
    ],
)
def test_reasons_against_triton(operation, machine, config, bf16, reason):
    got = why_not_triton(operation, config, bf16, machine)
    assert got == reason or (reason and got.startswith(reason))


def test_a_cpu_has_no_capability_and_no_modules():
    assert inspect_machine(CPU) == LAPTOP


def test_installed_modules_are_is_installed_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(resolving, "_is_installed", lambda module: module in ("flash_attn", "amp_C"))
    monkeypatch.setattr(resolving.metadata, "version", lambda name: {"flash-attn": "2.8.3"}[name])
    assert inspect_machine(CUDA) == Machine(
        device_type="cuda", capability=(9, 0), installed={"flash_attn": "2.8.3", "amp_C": ""}
    )


def test_only_modules_that_can_be_imported_are_installed():
    assert resolving._is_installed("torch.nn")
    assert not resolving._is_installed("amp_C_that_nobody_built")
    assert not resolving._is_installed("no_such_package.module")


class Adam(torch.optim.AdamW):
    """Takes the arguments of apex's and DeepSpeed's FusedAdam."""

    def __init__(self, params, adam_w_mode, **settings):
        assert adam_w_mode
        super().__init__(params, **settings)


@pytest.mark.parametrize(
    ("machine", "offloaded", "description", "kind"),
    [
        (LAPTOP, False, "PyTorch (the others need a CUDA device, this is cpu)", torch.optim.AdamW),
        (having(A100, amp_C=""), True, "PyTorch (the others need their state on the GPU", torch.optim.AdamW),
        (having(A100, amp_C=""), False, "apex (run.ops auto)", Adam),
        (
            having(A100, **{"deepspeed.ops.adam.fused_adam_op": ""}),
            False,
            "DeepSpeed (apex is not built: bash launch/install_gpu.sh)",
            Adam,
        ),
        (A100, False, "PyTorch (apex is not built: bash launch/install_gpu.sh; Deep", torch.optim.AdamW),
    ],
)
def test_the_optimizer_and_its_reason(machine, offloaded, description, kind, monkeypatch):
    import types

    import deepspeed.ops.adam

    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.SimpleNamespace(FusedAdam=Adam))
    monkeypatch.setattr(deepspeed.ops.adam, "FusedAdam", Adam)
    chosen = choose_adamw("auto", CUDA, offloaded, machine)
    assert f"{chosen.source} ({chosen.reason})".startswith(description)
    assert choose_adamw("torch", CUDA, offloaded, machine).source == "PyTorch"
    optimizer = chosen.make(
        [torch.nn.Parameter(torch.zeros(2))], lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01
    )
    assert type(optimizer) is kind
    assert optimizer.defaults["eps"] == 1e-6


def test_megabert_works_where_triton_is_not_installed():
    """No Triton kernel is imported before it is chosen, either."""
    program = (
        "import sys; sys.modules['triton'] = None;"  # makes its import raise ImportError
        "import torch, megabert.training.engine;"
        "from megabert.kernels.resolve import resolve; from megabert.model.modeling_megabert import MegaBertConfig;"
        "resolve('auto', torch.device('cpu'), MegaBertConfig(), True);"
        "print([name for name in sys.modules if name.startswith('megabert.kernels.')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == [
        "['megabert.kernels.cpu', 'megabert.kernels.cpu_rotate', 'megabert.kernels.resolve']"
    ], done.stderr
