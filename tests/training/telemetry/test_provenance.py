"""What run.json records of the machine."""

import platform

import torch

from megabert.training.telemetry import provenance
from megabert.training.telemetry.provenance import git_state, versions


def test_nvidias_libraries_are_recorded_for_every_release_of_cuda(tmp_path, monkeypatch):
    for name in ("nvidia_cudnn_cu13", "nvidia_nccl_cu14", "nvidia_cusparselt_cu13", "nvidia_ncclx"):
        folder = tmp_path / f"{name}-9.1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 9.1.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = versions()
    assert (found["python"], found["torch"]) == (platform.python_version(), torch.__version__)
    recorded = {name: version for name, version in found.items() if name.startswith("nvidia") and version == "9.1.2"}
    assert recorded == {"nvidia-cudnn-cu13": "9.1.2", "nvidia-nccl-cu14": "9.1.2"}


def test_a_changed_file_whose_name_is_not_utf_8_does_not_end_the_run(tmp_path, monkeypatch):
    """git prints it as it is with core.quotepath false."""
    (tmp_path / ".git").mkdir()
    (tmp_path / "git").write_text("#!/bin/sh\nprintf 'M caf\\351\\n'\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "a/b/c/provenance.py"))
    assert git_state() == {"commit": "M caf\ufffd", "changed": True}
