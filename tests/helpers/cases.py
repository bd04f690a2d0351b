"""Parameters for tests that run a few cases at every push and all cases in the nightly run."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def cases(per_push: Iterable[Sequence[Any]], nightly: Iterable[Sequence[Any]]) -> list:
    """Return the parameters of parametrize(): per_push as they are, nightly with the mark of that name.

    nightly is the full product, which contains per_push: `pytest -m nightly` alone runs every case.
    """
    marked = [pytest.param(*case, marks=pytest.mark.nightly) for case in nightly]
    return [*(pytest.param(*case) for case in per_push), *marked]
