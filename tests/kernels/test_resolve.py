"""Every branch of the choice of implementations, for made-up machines."""

import contextlib
import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from megabert.kernels import cpu, devices
from megabert.kernels import resolve as resolving
from megabert.kernels.cpu import compiled
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
from megabert.model.ops import TORCH_OPS, Ops, alibi_slopes
from megabert.model.padding import Sequences
from tests.helpers.runs import REPOSITORY

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


def test_triton_of_the_oldest_torch_that_we_take_is_used(stand_in, caplog):
    """torch 2.11 has Triton 3.6; nightly builds of torch name their Triton otherwise."""
    for version in ("3.6.0", "3.6.0+git9844da95", "3.8.0a0"):
        assert resolve_and_log(caplog, "auto", having(without(A100, "flash_attn"), triton=version))[0] == stand_in


def test_a_triton_that_cannot_launch_is_not_used_and_the_reason_is_logged(caplog):
    broken = dataclasses.replace(without(A100, "flash_attn"), try_triton=lambda: "Triton cannot launch a kernel: why")
    ops, line = resolve_and_log(caplog, "auto", broken)
    assert ops == TORCH_OPS._replace(attention=PLANNERS["sdpa"])
    assert line.count("Triton cannot launch a kernel: why") == 1
    with pytest.raises(ValueError, match="run.ops is fused, but .*Triton cannot launch a kernel: why"):
        resolve("fused", CUDA, CONFIG, True, broken)


def test_pytorchs_attention_on_a_gpu_is_a_warning_of_the_first_rank(monkeypatch, caplog):
    poor = without(A100, "flash_attn", "triton")
    slow = "SLOW: PyTorch's attention makes one call per document length in each layer"
    _, line = resolve_and_log(caplog, "auto", poor)
    assert line.endswith(f". {slow}")
    assert caplog.records[0].levelname == "WARNING"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    resolve_and_log(caplog, "auto", poor)
    assert caplog.records[0].levelname == "INFO"
    assert slow not in resolve_and_log(caplog, "torch", poor)[1]
    assert slow not in resolve_and_log(caplog, "auto", LAPTOP)[1]


def test_old_cards_train_in_fp32_with_plain_pytorch_and_say_so(caplog):
    v100 = dataclasses.replace(A100, capability=(7, 0))
    ops, line = resolve_and_log(caplog, "auto", v100, bf16=False)
    assert ops == TORCH_OPS._replace(attention=PLANNERS["sdpa"])
    assert "Triton needs compute capability 8.0, this is 7.0" in line
    assert "torch_autocast is off" not in line, "switching it on would not help"
    line = resolve_and_log(caplog, "auto", v100, bf16=True)[1]
    assert line.endswith("SLOW: this GPU emulates bf16; set torch_autocast.enabled to auto in the ds_config")


def test_amds_cards_take_plain_pytorch(caplog):
    amd = dataclasses.replace(A100, capability=(9, 4), is_amd=True)
    ops, line = resolve_and_log(caplog, "auto", amd)
    assert ops == TORCH_OPS._replace(attention=PLANNERS["sdpa"])
    assert "Triton is used on NVIDIA's GPUs only, this is AMD's" in line


def test_without_triton_the_other_operations_are_from_pytorch(caplog):
    ops, line = resolve_and_log(caplog, "auto", without(A100, "triton"))
    assert ops == TORCH_OPS._replace(attention=PLANNERS["flash_attention_2"])
    assert line.startswith("ops: attention from flash-attn; layer_norm, geglu,")
    assert "from PyTorch (Triton is not installed (pip install 'megabert[kernels]'))" in line


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
        raise compiled.exc.InvalidCxxCompiler

    monkeypatch.setattr(compiled.cpp_builder, "get_cpp_compiler", none)
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
        (having(A100, flash_attn="unknown"), CONFIG, True, "flash-attn unknown is older than 2.4"),
        (having(A100, flash_attn="2.3.6"), CONFIG, True, "flash-attn 2.3.6 is older than 2.4, the first with ALiBi"),
        (A100, MegaBertConfig(padding="padded"), True, "model.padding padded computes the padding"),
        (A100, CONFIG, False, "flash-attn computes in bf16, and torch_autocast is off"),
        (dataclasses.replace(A100, capability=(7, 0)), CONFIG, True, "flash-attn needs compute capability 8.0"),
    ],
)
def test_reasons_against_flash_attn(machine, config, bf16, reason):
    got = why_not_flash(CUDA, config, bf16, machine)
    assert got == reason or (got and reason and got.startswith(reason))


@pytest.mark.parametrize(
    ("operation", "machine", "config", "bf16", "reason"),
    [
        ("attention", A100, CONFIG, True, None),
        ("attention", A100, MegaBertConfig(padding="padded"), True, None),
        ("geglu", A100, CONFIG, False, None),
        ("geglu", LAPTOP, CONFIG, True, "Triton needs a CUDA device, this is cpu"),
        ("geglu", without(A100, "triton"), CONFIG, True, "Triton is not installed"),
        ("geglu", having(A100, triton="3.4.0"), CONFIG, True, "Triton 3.4.0 is older than 3.6"),
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
    assert got == reason or (got and reason and got.startswith(reason))


def test_a_cpu_has_no_capability_and_no_modules():
    assert inspect_machine(CPU) == LAPTOP


def test_installed_modules_are_is_installed_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(resolving, "_is_installed", lambda module: module in ("flash_attn", "amp_C"))
    monkeypatch.setattr(resolving.metadata, "version", lambda name: {"flash-attn": "2.8.3"}[name])
    assert inspect_machine(CUDA) == Machine(
        device_type="cuda", capability=(9, 0), installed={"flash_attn": "2.8.3", "amp_C": ""}
    )


def test_what_flash_attn_4_leaves_behind_is_not_flash_attn(monkeypatch, tmp_path):
    """Installed alone it makes a folder flash_attn without code of its own, and no distribution of that name."""
    (tmp_path / "flash_attn/cute").mkdir(parents=True)
    (tmp_path / "flash_attn/cute/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert inspect_machine(CUDA).lacks("flash_attn")
    # As some of its releases do.
    (tmp_path / "flash_attn/__init__.py").touch()
    assert inspect_machine(CUDA).lacks("flash_attn")


def test_a_module_is_found_by_any_of_its_distributions(monkeypatch):
    monkeypatch.setattr(resolving.metadata, "version", {"pytorch-triton": "3.6.0+git1"}.__getitem__)
    monkeypatch.setattr(resolving.metadata, "PackageNotFoundError", KeyError)
    assert resolving._version_of("triton") == "3.6.0+git1"
    assert resolving._version_of("flash_attn") is None


def test_the_extra_has_a_triton_that_is_not_too_old():
    [pin] = [line for line in (REPOSITORY / "constraints.txt").read_text().split() if line.startswith("triton==")]
    assert Version(pin.removeprefix("triton==")) >= Version(resolving.TRITON_OLDEST)


def test_only_modules_that_can_be_imported_are_installed():
    assert resolving._is_installed("torch.nn")
    assert not resolving._is_installed("amp_C_that_nobody_built")
    assert not resolving._is_installed("no_such_package.module")


DEEPSPEED_ADAM = {"deepspeed.ops.adam.fused_adam_op": ""}
NO_APEX = "apex counts steps per group, which ZeRO 3 takes in parts"


class Adam(torch.optim.AdamW):
    """Takes the arguments of apex's and DeepSpeed's FusedAdam."""

    def __init__(self, params, adam_w_mode, **settings):
        assert adam_w_mode
        super().__init__(params, **settings)


@pytest.mark.parametrize(
    ("machine", "offloaded", "stage", "description", "kind"),
    [
        (LAPTOP, False, 1, "PyTorch (the others need a CUDA device, this is cpu)", torch.optim.AdamW),
        (having(A100, amp_C=""), True, 1, "PyTorch (the others need their state on the GPU", torch.optim.AdamW),
        *((having(A100, amp_C=""), False, stage, "apex (run.ops auto)", Adam) for stage in (0, 1, 2)),
        (having(A100, amp_C=""), False, 3, f"PyTorch (DeepSpeed's is not built, and {NO_APEX})", torch.optim.AdamW),
        (having(A100, amp_C="", **DEEPSPEED_ADAM), False, 3, f"DeepSpeed ({NO_APEX})", Adam),
        (
            having(A100, **DEEPSPEED_ADAM),
            False,
            1,
            "DeepSpeed (apex is not built: bash launch/install_gpu.sh)",
            Adam,
        ),
        (
            A100,
            False,
            1,
            "PyTorch (DeepSpeed's is not built, and apex is not built: bash launch/install_gpu.sh)",
            torch.optim.AdamW,
        ),
    ],
)
def test_the_optimizer_and_its_reason(machine, offloaded, stage, description, kind, monkeypatch):
    import types

    import deepspeed.ops.adam

    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.SimpleNamespace(FusedAdam=Adam))
    monkeypatch.setattr(deepspeed.ops.adam, "FusedAdam", Adam)
    chosen = choose_adamw("auto", CUDA, offloaded, stage, machine)
    assert f"{chosen.source} ({chosen.reason})".startswith(description)
    assert choose_adamw("torch", CUDA, offloaded, stage, machine).source == "PyTorch"
    optimizer = chosen.make(
        [torch.nn.Parameter(torch.zeros(2))], lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01
    )
    assert type(optimizer) is kind
    assert optimizer.defaults["eps"] == 1e-6


def test_megabert_works_where_triton_is_not_installed():
    """No Triton kernel is imported before it is chosen, either."""
    program = (
        # Makes its import raise ImportError.
        "import sys; sys.modules['triton'] = None;"
        "import torch, megabert.training.engine;"
        "from megabert.kernels.resolve import resolve; from megabert.model.modeling_megabert import MegaBertConfig;"
        "resolve('auto', torch.device('cpu'), MegaBertConfig(), True);"
        "print(sorted(name for name in sys.modules if name.startswith('megabert.kernels.')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    names = ("cpu", "cpu.compiled", "cpu.cross_entropy", "cpu.rotate", "devices", "fp8", "resolve")
    loaded = [f"megabert.kernels.{name}" for name in names]
    assert done.stdout.splitlines()[-1:] == [str(loaded)], done.stderr


@pytest.mark.triton
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, None),
        (RuntimeError("Failed to find C compiler. Please"), "there is no C compiler (install gcc, or set CC)"),
        (subprocess.CalledProcessError(1, ["/usr/bin/gcc"]), "{header} is missing (install Python's development"),
        (PermissionError(13, "Permission denied", "/x"), "[Errno 13] Permission denied: '/x' (set TRITON_CACHE_DIR"),
        (AssertionError("libcuda.so cannot found!\nmore"), "libcuda.so cannot found!"),
        (RuntimeError("a trivial kernel gives 3.0"), "a trivial kernel gives 3.0"),
    ],
)
def test_why_no_launch_names_what_is_missing(monkeypatch, tmp_path, error, reason):
    def launch(device):
        if error:
            raise error

    compiler = tmp_path / "gcc"
    compiler.touch(0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path) if "C compiler" not in str(error) else "/nowhere")
    monkeypatch.setattr(devices.sysconfig, "get_paths", lambda: {"include": "/no/include"})
    monkeypatch.setattr(devices, "launch", launch)
    devices.why_no_launch.cache_clear()
    got = devices.why_no_launch(CUDA)
    devices.why_no_launch.cache_clear()
    if reason is None:
        assert got is None
    else:
        assert got is not None
        assert got.startswith(f"Triton cannot launch a kernel: {reason.format(header='/no/include/Python.h')}")


@pytest.mark.triton
def test_a_kernel_is_tried_on_the_gpu_that_will_run_it(monkeypatch):
    """Triton launches on the current device, which is the first unless a process has set another one."""
    from megabert.kernels import geglu

    current = [torch.device("cuda:0")]

    @contextlib.contextmanager
    def device(given):
        current.append(given)
        yield
        current.pop()

    ones, launched_on = torch.ones, []

    def launch(x, dropout_p):
        launched_on.append(current[-1])
        return torch.nn.functional.gelu(x[:, :16])

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: ones(*shape))
    monkeypatch.setattr(geglu, "geglu", launch)
    devices.launch(torch.device("cuda:1"))
    assert launched_on == [torch.device("cuda:1")]


@pytest.mark.triton
def test_a_broken_triton_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.runtime.errors", None)
    devices.why_no_launch.cache_clear()
    assert (devices.why_no_launch(CUDA) or "").startswith("Triton cannot be imported: ")
    devices.why_no_launch.cache_clear()


def test_flash_attn_gets_the_slopes_and_the_window(monkeypatch):
    calls = []

    def stub(qkv, cu_seqlens, max_seqlen, **options):
        calls.append((options["window_size"], options["alibi_slopes"], options["dropout_p"], max_seqlen))
        return qkv[:, 0]

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_qkvpacked_func=stub))
    sequences, slopes = Sequences(torch.tensor([0, 3, 5], dtype=torch.int32), 3), alibi_slopes(4)
    for chosen, reach in ((slopes, None), (None, 64), (None, None)):
        PLANNERS["flash_attention_2"](sequences, chosen, 64, reach)(torch.zeros(5, 3, 4, 64), 0.1)
    # (left, right) are the tokens seen on each side; -1 is no limit.
    assert calls == [((-1, -1), slopes, 0.1, 3), ((64, 64), None, 0.1, 3), ((-1, -1), None, 0.1, 3)]
