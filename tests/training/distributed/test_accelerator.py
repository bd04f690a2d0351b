"""Which accelerator and which GPU a rank uses, for made-up machines."""

from types import SimpleNamespace

import pytest
import torch

from megabert.kernels import devices
from megabert.training.distributed.accelerator import choose_accelerator, choose_own_gpu, claim_gpu


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Make up a machine: whether it has an NVIDIA driver, or AMD's; whether torch has GPU code and sees a GPU."""

    def make(driver: bool, cuda_build: bool, sees: bool, amd: bool = False, hip: str | None = None):
        file = tmp_path / "nvidiactl"
        file.touch() if driver else file.unlink(missing_ok=True)
        monkeypatch.setattr(devices, "NVIDIA_FILES", (file,))
        monkeypatch.setattr(torch.version, "cuda", "13.0" if cuda_build else None)
        monkeypatch.setattr(devices, "AMD_FILES", (tmp_path / "kfd",))
        (tmp_path / "kfd").touch() if amd else (tmp_path / "kfd").unlink(missing_ok=True)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: sees)

    return make


@pytest.mark.parametrize(
    ("driver", "cuda_build", "sees", "environ", "chosen", "warned"),
    [
        (True, True, True, {}, "cuda", False),
        # WSL2 without the file, ROCm.
        (False, True, True, {}, "cuda", False),
        (False, False, False, {}, "cpu", False),
        # An old driver, or a job without a GPU on a machine with some.
        (True, True, False, {}, "cpu", True),
        (True, True, False, {"CUDA_VISIBLE_DEVICES": ""}, "cpu", False),
        (True, False, False, {"DS_ACCELERATOR": "cpu"}, "cpu", False),
        (True, True, True, {"DS_ACCELERATOR": "cpu"}, "cpu", False),
    ],
)
def test_torch_is_asked_whether_there_is_a_gpu(machine, caplog, driver, cuda_build, sees, environ, chosen, warned):
    machine(driver, cuda_build, sees)
    choose_accelerator(environ)
    assert environ["DS_ACCELERATOR"] == chosen
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    if warned:
        assert "sees no GPU" in caplog.text
        assert "DS_ACCELERATOR=cpu" in caplog.text


def test_a_cpu_build_of_torch_on_a_machine_with_a_gpu_is_refused_and_the_advice_works(machine):
    machine(driver=True, cuda_build=False, sees=False)
    with pytest.raises(ValueError, match="is a CPU build.* TORCH_BUILD=gpu bash launch/install.sh, or set DS_ACC"):
        choose_accelerator({})
    # After that install.
    machine(driver=True, cuda_build=True, sees=True)
    environ: dict[str, str] = {}
    choose_accelerator(environ)
    assert environ == {"DS_ACCELERATOR": "cuda"}


@pytest.mark.parametrize(
    ("cuda_build", "hip", "sees", "message"),
    [
        (False, None, False, "is not a ROCm build. Install PyTorch's ROCm build"),
        (True, None, False, "is not a ROCm build. Install PyTorch's ROCm build"),
        (False, "6.4", False, "sees no GPU. If rocminfo lists none"),
        (False, "6.4", True, ""),
    ],
)
def test_an_amd_gpu_is_not_left_out_in_silence(machine, caplog, cuda_build, hip, sees, message):
    machine(driver=False, cuda_build=cuda_build, sees=sees, amd=True, hip=hip)
    environ: dict[str, str] = {}
    choose_accelerator(environ)
    assert environ == {"DS_ACCELERATOR": "cuda" if sees else "cpu"}
    assert len(caplog.records) == bool(message)
    assert message in caplog.text
    caplog.clear()
    choose_accelerator({"DS_ACCELERATOR": "cpu"})
    machine(driver=False, cuda_build=False, sees=False)
    choose_accelerator({})
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        # MI50.
        ("gfx906:sramecc+:xnack-", False, False),
        # MI100.
        ("gfx908:sramecc+:xnack-", True, False),
        # MI250X.
        ("gfx90a:sramecc+:xnack-", True, False),
        # In a CPU.
        ("gfx90c", False, False),
        # MI300X.
        ("gfx942:sramecc+:xnack-", True, True),
        # MI355X.
        ("gfx950:sramecc+:xnack-", True, True),
        # RX 6800.
        ("gfx1030", False, False),
        # RX 7900.
        ("gfx1100", True, False),
        # RX 9070.
        ("gfx1201", True, True),
    ],
)
def test_amds_cards_multiply_what_their_names_say(name, bf16, fp8, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    assert (devices.has_fast_bf16(torch.device("cuda")), devices.has_fp8(torch.device("cuda"))) == (bf16, fp8)
    assert devices.has_fp8(torch.device("cpu"))


SRUN = {"SLURM_STEP_ID": "0", "RANK": "5"}


@pytest.mark.parametrize(
    ("environ", "visible", "index"),
    [
        ({"RANK": "5", "LOCAL_RANK": "1"}, 4, "1"),
        (SRUN | {"LOCAL_RANK": "5"}, 8, "5"),
        # --gpus-per-task=1.
        (SRUN | {"LOCAL_RANK": "5"}, 1, "0"),
        # Two GPUs for each task.
        (SRUN | {"LOCAL_RANK": "3"}, 2, "1"),
    ],
)
def test_a_rank_uses_a_gpu_that_it_sees(environ, visible, index):
    environ = dict(environ)
    choose_own_gpu(visible, environ)
    assert environ["LOCAL_RANK"] == index


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(ValueError, match="rank 5 is number 2 of this machine, counted from 0, but only 2 GPUs"):
        choose_own_gpu(2, {"RANK": "5", "LOCAL_RANK": "2"})
    with pytest.raises(ValueError, match="DS_ACCELERATOR is cuda, but torch sees no GPU here"):
        choose_own_gpu(0, {"RANK": "0", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cuda"})


def test_two_ranks_on_one_gpu_are_refused():
    """SLURM with more tasks than GPUs: each rank's number fits, and NCCL would stop with a traceback."""
    store = torch.distributed.HashStore()
    claim_gpu(store, "node0", "GPU-1")
    claim_gpu(store, "node0", "GPU-2")
    claim_gpu(store, "node1", "GPU-1")
    with pytest.raises(ValueError, match="two ranks would use the same GPU GPU-1 of node0.*--gpus-per-task=1"):
        claim_gpu(store, "node0", "GPU-1")
