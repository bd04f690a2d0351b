"""The only conftest.py that these tests load: test_interpreter.py runs them in a process of their own."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
