"""Tokens/s of training for accept.py, beside the prediction; the host's and the GPU's time of a micro-batch.

python -m tests.gpu.speeds STAGE OUT real|random [FLAG ...] measures one case.
"""

import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import profile

from megabert.config.recipe_parser import load_recipe
from megabert.data.batch import PackedBatch
from megabert.training import loop
from megabert.training.distributed.device import peak_memory_bytes
from megabert.training.engine import build_model
from megabert.training.roofline.estimate import Prediction, predict_recipe
from megabert.training.run import Run
from megabert.training.telemetry.cards import Card, find_card
from megabert.training.telemetry.flops import step_flops
from megabert.training.updates.optimizers import parameter_groups
from tests.gpu.parts import Outcome, Setup
from tests.gpu.steps import (
    WARM_UP_STEPS,
    activities,
    at_each_micro_batch,
    device_work,
    gaps_after,
    open_run,
    step,
)

STEPS = 3
# Of the predicted tokens/s, in the fastest case: the prediction is within 20 % of most published runs.
LEAST_OF_PREDICTION = 0.8
BASE = "mosaicbert-base"


class Case(NamedTuple):
    """length: data.max_seq_len. ids: real, or random ones of the whole vocabulary."""

    recipe: str
    tokens: int
    stage: int = 1
    length: int = 128
    ids: str = "real"

    @property
    def micro_batches(self) -> int:
        """Of a step, which is the same where the micro-batch is at most half of it."""
        return max(2, 117_760 // self.tokens)

    @property
    def name(self) -> str:
        return f"{self.recipe}, {self.tokens} tokens of {self.length}, {self.ids} ids, ZeRO {self.stage}"

    @property
    def is_predicted(self) -> bool:
        """Whether the corpus hardly matters; padding and long documents depend on its lengths."""
        return self.recipe == BASE and self.length == 128 and self.ids == "real"

    def predict(self, card: Card) -> Prediction:
        total = self.micro_batches * self.tokens
        data = {"micro_batch_tokens": self.tokens, "global_batch_tokens": total, "max_seq_len": self.length}
        return predict_recipe(load_recipe(self.recipe, data=data), card, 1, self.stage)


CASES = [
    *(Case(BASE, tokens) for tokens in (14_720, 29_440, 58_880, 117_760)),
    *(Case(BASE, tokens, 2) for tokens in (14_720, 58_880)),
    Case(BASE, 16_384, length=1024),
    Case(BASE, 14_720, ids="random"),
    Case("bert-base", 14_720),
]


def speeds(setup: Setup) -> Outcome:
    """Tokens/s by micro-batch, ZeRO stage, length and ids, each beside plain PyTorch and the prediction."""
    card = None if setup.dry else find_card(torch.cuda.get_device_name())
    rows: dict[str, dict[str, float]] = {}
    best: dict[str, float] = {}
    for number, case in enumerate(CASES[-2:] if setup.dry else CASES):
        prediction = case.predict(card) if card else None
        if prediction and card and not prediction.memory.fits(card.memory):
            rows[case.name] = {"predicted_gb": prediction.memory.total / 1e9}
            continue
        rows[case.name] = row = measure(setup, case, setup.out / str(number))
        if prediction:
            row["of_prediction"] = row["tokens_per_s"] / prediction.tokens_per_s
        if row["tokens_per_s"] > best.get("tokens_per_s", 0.0) and (setup.dry or case.is_predicted):
            best = row
    figure = f"at best {best['tokens_per_s']:,.0f} tokens/s, GPU idle {best['idle_percent']:.0f} %"
    if card is None:
        return Outcome(True, f"{figure}, no prediction for this device", dict(rows))
    passed = best["of_prediction"] >= LEAST_OF_PREDICTION
    return Outcome(passed, f"{figure}, {100 * best['of_prediction']:.0f} % of the prediction", dict(rows))


def measure(setup: Setup, case: Case, folder: Path) -> dict[str, float]:
    """Measure a case in a process of its own, which frees its memory."""
    more = ["--model.pad_vocab_to_multiple_of=30528", f"--data.max_seq_len={case.length}", "--run.eval_tokens=65536"]
    size = setup.batch(case.tokens, case.micro_batches)
    flags = setup.flags(case.recipe, "--run.max_steps=100", *size, *([] if setup.dry else more))
    setup.run([sys.executable, "-m", "tests.gpu.speeds", str(case.stage), str(folder), case.ids, *flags])
    return json.loads((folder / "speed.json").read_text())


def speed_of(run: Run) -> dict[str, float]:
    """Time STEPS steps, then look at one more in the profiler. host_ms, gpu_ms: of a micro-batch."""
    begun: list[float] = []
    run.meter.reset()
    with at_each_micro_batch(lambda: begun.append(time.perf_counter())):
        # A step ends with a wait for the device.
        for _ in range(STEPS):
            step(run)
        seconds, meter = run.meter.seconds(), run.meter
    micro_batches = len(begun) // STEPS
    needed = step_flops(run.model_config, meter.tokens, meter.num_targets, meter.squared_lengths)
    found = {
        "tokens_per_s": meter.tokens / seconds,
        # Of the first micro-batch: later ones may wait for room among the launches.
        "host_ms": 1000 * (begun[-micro_batches + 1] - begun[-micro_batches]),
        "memory_gb": peak_memory_bytes(run.engine.device) / 1e9,
    }
    if run.peak_flops is not None:
        found["mfu"] = needed / seconds / run.peak_flops
    with profile(activities=activities(run)) as profiler:
        step(run)
    work = device_work(profiler, run)
    busy_s = (max(one.end for one in work) - work[0].start - sum(gap for gap, _ in gaps_after(work))) / 1e6
    found["gpu_ms"] = 1000 * busy_s / micro_batches
    found["idle_percent"] = 100 * max(0.0, 1 - busy_s * STEPS / seconds)
    return found


def bare_tokens_per_s(run: Run) -> float:
    """Return the tokens/s of a plain PyTorch loop with the same model, optimizer and batches, without DeepSpeed."""
    plan, device, config = run.plan, run.engine.device, run.plan.recipe.optimizer
    # It reserves the memory of a micro-batch's activations, and this loop needs as much.
    run.graph = None
    model = build_model(plan.recipe, run.feed.corpus.tokenizer, device, plan.ds_config.bf16).to(device).train()
    groups = parameter_groups(model, config)
    optimizer = plan.optimizer.make(groups, lr=1e-5, betas=config.betas, eps=config.eps, weight_decay=0.0)
    batches = [batch for batch, _, _ in loop.next_batches(run) or []]
    masked, began = sum(batch.num_masked for batch in batches), 0.0
    for number in range(WARM_UP_STEPS + STEPS):
        if number == WARM_UP_STEPS:
            began = time.perf_counter()
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=plan.ds_config.bf16):
                output = model(**batch.model_inputs(device))
            (output.loss_sum / masked).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # The host waits for the device.
        output.loss_sum.item()
    return STEPS * sum(batch.num_tokens for batch in batches) / (time.perf_counter() - began)


def draw_ids(vocab_size: int) -> None:
    """Let every batch have random ids of the whole vocabulary, of which a small corpus has few."""
    inputs = PackedBatch.model_inputs

    def random_inputs(batch: PackedBatch, device: torch.device) -> dict[str, torch.Tensor | int]:
        batch.input_ids.random_(vocab_size)
        return inputs(batch, device)

    PackedBatch.model_inputs = random_inputs  # type: ignore[method-assign]


def main() -> None:
    stage, out, ids, *flags = sys.argv[1:]
    folder = Path(out)
    run = open_run(stage, [*flags, f"--run.output_dir={folder / 'run'}"])
    if ids == "random":
        draw_ids(run.model_config.vocab_size)
    for _ in range(WARM_UP_STEPS):
        step(run)
    found = speed_of(run)
    found["bare_tokens_per_s"] = bare_tokens_per_s(run)
    (folder / "speed.json").write_text(json.dumps(found, indent=1))
    loop.shutdown(run.feed)


if __name__ == "__main__":
    main()
