"""The plan of a run of the tiny recipe."""

from megabert.config.ds_config import DsConfig
from megabert.training.plan import RunPlan, make_plan
from tests.helpers.recipes import read_recipe
from tests.helpers.runs import TINY, last_of_each

ZERO2 = {"zero_optimization": {"stage": 2}}


def plan(*flags: str, ds_config: dict | None = None, world_size: int = 1) -> RunPlan:
    recipe = read_recipe(*last_of_each([*TINY, "--run.max_steps=10", *flags]))
    return make_plan(recipe, DsConfig("ds.json", ZERO2 if ds_config is None else ds_config), 0, world_size)
