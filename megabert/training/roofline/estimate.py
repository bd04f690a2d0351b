"""Predict a run on GPUs: memory, tokens/s, MFU, hours and dollars, and what bounds them."""

from dataclasses import dataclass

from megabert.config.ds_config import read_ds_config
from megabert.config.ds_schema import ZeroOptimization
from megabert.config.recipe import ModelConfig, Recipe, RunConfig
from megabert.config.recipe_parser import ds_config_path
from megabert.training.micro_batch.batch import Batch, batch_of_web_pages
from megabert.training.micro_batch.memory import BF16, Execution, Memory, memory_of_rank, num_weights
from megabert.training.micro_batch.sizes import largest_micro_batch
from megabert.training.roofline.work import BANDWIDTH, GAPS, HOST_PER_LAYER, needed_flops, operations
from megabert.training.run_schedule import make_run_schedule
from megabert.training.telemetry.cards import Card
from megabert.training.unsupported import choose_cuda_graphs, refusal_of_fp8

# GPUs of one machine, whose links are the cards' own. Between machines each GPU has a port of 400 Gb/s.
MACHINE = 8
PORT = 50e9
# The share of a link that an all-reduce of tens of megabytes reaches.
LINK_SHARE = 0.7
# BERT's, rounded up; a run's own tokenizer decides.
VOCAB_SIZE = 30_528


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One step: seconds by part, over all its micro-batches. tokens: real ones of all ranks."""

    tokens: float
    flops: float
    seconds: dict[str, float]
    memory: Memory
    card: Card
    gpus: int
    accumulation: int

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_s(self) -> float:
        """Real tokens per second and GPU."""
        return self.tokens / self.step_s / self.gpus

    @property
    def mfu(self) -> float:
        return self.flops / (self.step_s * self.gpus * (self.card.bf16 or self.card.fp32))

    @property
    def bounds(self) -> list[str]:
        """The three parts that take longest."""
        return sorted(self.seconds, key=lambda part: -self.seconds[part])[:3]


def predict(
    model: ModelConfig, batch: Batch, card: Card, execution: Execution = BF16, *, gpus: int, accumulation: int,
    zero_stage: int, vocab_size: int = VOCAB_SIZE,
) -> Prediction:  # fmt: skip
    """Predict a step of `accumulation` micro-batches on each of `gpus` ranks.

    execution: its bf16 is the card's. With FP8, run.compile is assumed; a CUDA graph takes Python's time away; of plain
    PyTorch only the memory is predicted.
    """
    execution = execution._replace(bf16=card.bf16 is not None)
    work = operations(model, vocab_size, batch, execution)
    seconds = {operation.name: operation.seconds(card, execution.bf16) * accumulation for operation in work}
    # Forward is a third of the work of a layer, and is done again.
    for name in ("layers' products", "casts to FP8", "attention"):
        seconds[name] *= 1 + model.recomputed_layers / model.num_hidden_layers / 3
    busy = sum(seconds.values())
    seconds["gaps and waits"] = busy * GAPS
    host = 0.0 if execution.graphs else accumulation * HOST_PER_LAYER * model.num_hidden_layers
    seconds["Python"] = max(0.0, host - busy)
    weights = num_weights(model, vocab_size)
    seconds["communication"] = communication_s(weights, card, gpus, zero_stage, accumulation)
    shared_by = gpus if zero_stage else 1
    seconds["optimizer"] = 28 * weights / shared_by / (card.bandwidth * BANDWIDTH)
    memory = memory_of_rank(model, batch, execution, vocab_size=vocab_size, zero=zero_of(zero_stage), ranks=gpus)
    return Prediction(
        tokens=batch.tokens * accumulation * gpus,
        flops=needed_flops(model, vocab_size, batch) * accumulation * gpus,
        seconds=seconds,
        memory=memory,
        card=card,
        gpus=gpus,
        accumulation=accumulation,
    )


def zero_of(stage: int) -> ZeroOptimization:
    """Return the settings of ds_configs/zeroN.json."""
    return read_ds_config(ds_config_path(f"zero{stage}")).values.zero_optimization


def communication_s(weights: float, card: Card, gpus: int, zero_stage: int, accumulation: int) -> float:
    """Return the seconds that a step waits for fp32 gradients and weights; none of it is hidden behind other work.

    Every stage reduces gradients and ZeRO gathers weights: together 2 (n - 1) / n times their bytes. ZeRO 2 reduces in
    every micro-batch, and ZeRO 3 also gathers the weights twice in each.
    """
    if gpus == 1:
        return 0.0
    link = LINK_SHARE * (card.link if gpus <= MACHINE else min(card.link, PORT))
    passes = 2.0
    if zero_stage == 2:
        passes = accumulation + 1.0
    elif zero_stage == 3:
        passes = 3.0 * accumulation
    return passes * (gpus - 1) / gpus * 4 * weights / link


def predict_recipe(recipe: Recipe, card: Card, gpus: int, zero_stage: int) -> Prediction:
    """Predict a recipe's step at its full batch and last length.

    Raises ValueError if the ranks cannot share it, or the card cannot compute it.
    """
    data, multiple = recipe.data, recipe.model.pad_vocab_to_multiple_of
    vocab_size = -(-VOCAB_SIZE // multiple) * multiple
    execution = Execution.of(recipe.run, card.bf16 is not None, _runs_fused(recipe, card))
    execution = execution._replace(graphs=_uses_graphs(recipe, card, gpus, zero_stage))
    if execution.fp8 and card.fp8 is None:
        raise ValueError(refusal_of_fp8(f"the {card.name} has no FP8 (Hopper, Ada, MI300 and later ones have)"))
    if execution.fp8 and zero_stage > 1:
        raise ValueError(refusal_of_fp8(f"ZeRO {zero_stage} has not been tried with it (--zero 1)"))

    def memory_of(tokens: int) -> Memory:
        return memory_of_rank(
            recipe.model, batch_of_web_pages(recipe, tokens), execution, vocab_size=vocab_size,
            zero=zero_of(zero_stage), ranks=gpus,
        )  # fmt: skip

    tokens = data.micro_batch_tokens
    if tokens == "auto":
        tokens = largest_micro_batch(recipe.data, gpus, memory_of, card.memory)
    total = make_run_schedule(recipe.with_micro_batch(tokens), gpus).batches_per_step
    return predict(
        recipe.model, batch_of_web_pages(recipe, tokens), card, execution, gpus=gpus, accumulation=total // gpus,
        zero_stage=zero_stage, vocab_size=vocab_size,
    )  # fmt: skip


def _runs_fused(recipe: Recipe, card: Card) -> bool:
    return card.runs_kernels and recipe.run.ops != "torch"


def _uses_graphs(recipe: Recipe, card: Card, gpus: int, zero_stage: int) -> bool:
    """Whether run.cuda_graphs has an effect. Raises ValueError if it is true and cannot be."""
    resolved = read_ds_config(ds_config_path(f"zero{zero_stage}")).resolve(
        accumulation=1, max_grad_norm=recipe.optimizer.max_grad_norm, world_size=gpus, fast_bf16=card.bf16 is not None
    )
    missing = f"the kernels do not run on {card.name}, and plain PyTorch's operations cannot be captured"
    return choose_cuda_graphs(recipe, resolved, "cuda", lambda: None if card.runs_kernels else missing) is None


def hours_of(run: RunConfig, prediction: Prediction) -> float:
    """Return the hours of the whole run."""
    if run.max_hours is not None:
        return run.max_hours
    steps = run.max_steps if run.max_steps is not None else (run.max_tokens or 0) / prediction.tokens
    return steps * prediction.step_s / 3600


def describe(recipe: Recipe, prediction: Prediction, price: float | None) -> str:
    """Write the prediction as lines for the screen. price: dollars per GPU and hour."""
    card, memory, hours = prediction.card, prediction.memory, hours_of(recipe.run, prediction)
    fits = "fits" if memory.fits(card.memory) else "DOES NOT FIT: halve data.micro_batch_tokens"
    parts = sorted(prediction.seconds.items(), key=lambda part: -part[1])
    micro_batch = prediction.tokens / prediction.gpus / prediction.accumulation
    lines = [
        "Predicted, not measured: no GPU has run this code.",
        f"micro-batch       {micro_batch:,.0f} tokens, {prediction.accumulation} on each GPU in a step",
        f"memory per rank   {memory.total / 1e9:.1f} of {card.memory / 1e9:.0f} GB ({fits}): states "
        f"{memory.states / 1e9:.1f}, kept for backward {memory.kept / 1e9:.1f}, work {memory.work / 1e9:.1f}",
        f"tokens/s          {prediction.tokens_per_s / 1000:,.0f}k per GPU, "
        f"{prediction.tokens_per_s * prediction.gpus / 1000:,.0f}k in all",
        f"MFU               {100 * prediction.mfu:.0f} % of {(card.bf16 or card.fp32) / 1e12:.0f} TFLOP/s in "
        f"{'bf16' if card.bf16 else 'fp32'}",
        f"a step            {1000 * prediction.step_s:.0f} ms: "
        + ", ".join(f"{name} {100 * spent / prediction.step_s:.0f} %" for name, spent in parts if spent),
        f"the run           {hours:.1f} hours, {hours * prediction.gpus:,.0f} GPU hours"
        + ("" if price is None else f", ${hours * prediction.gpus * price:,.0f}"),
    ]
    if not _runs_fused(recipe, card):
        lines.append("operations        plain PyTorch's, whose memory is predicted; their speed is that of our kernels")
    if recipe.run.fp8 != "none":
        lines.append(
            "FP8               assumed: run.compile, and twice bf16's peak, of which the layers' products reach less, "
            "as on a card with that peak"
        )
    return "\n".join(lines)
