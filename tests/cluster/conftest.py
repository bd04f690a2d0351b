from collections.abc import Iterator

import pytest

from tests.helpers.processes import kill_started


@pytest.fixture(autouse=True)
def no_process_survives_its_test() -> Iterator[None]:
    yield
    kill_started()
