"""Define the recipe: dataclasses with every setting of a training run, its unit, its default and its limits.

The ds_config, not the recipe, says how a run is spread over devices. --help prints the docstrings of the settings.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from megabert.config.data_section import DataConfig
from megabert.config.model_section import ModelConfig
from megabert.config.settings import check_limits, check_once, check_range, metadata_of, setting, with_lists

# Settings for the length of a run: a recipe has exactly one of them.
LENGTHS = ("max_steps", "max_tokens", "max_hours")


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Masked language modelling: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay."""

    mlm_probability: float = setting(0.3, "(0, 1)", may_branch=True)
    """share of maskable tokens to predict in training"""
    schedule: Literal["constant", "linear", "cosine"] = setting("constant", may_branch=True)
    """how the share changes to final_mlm_probability over the run"""
    final_mlm_probability: float = setting(0.15, "(0, 1)", may_branch=True)
    """share at the end of a linear or cosine schedule"""
    eval_mlm_probability: float = setting(0.15, "(0, 1)")
    """share in evaluation"""

    def __post_init__(self):
        check_limits(self, "masking.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and the learning-rate schedule."""

    name: Literal["adamw", "muon", "stable_adamw"] = "adamw"
    """muon: Muon for the matrices of linear maps, AdamW for the rest; stable_adamw: AdamW with smaller steps of
    parameters whose update would be large"""
    lr: float = setting(5e-4, "(0, 10]", may_branch=True)
    """peak learning rate"""
    muon_lr: float = setting(0.02, "(0, 10]", may_branch=True)
    """peak learning rate of Muon's matrices"""
    betas: tuple[float, float] = (0.9, 0.98)
    """decay rates of Adam's two moments"""
    eps: float = setting(1e-6, "[1e-30, 0.1]")
    """added to Adam's denominator"""
    weight_decay: float = setting(0.01, "[0, 100]")
    """each step multiplies weights by 1 - lr * weight_decay, as in torch. Composer multiplies by
    1 - lr / peak * value: divide its value, such as MosaicBERT's 1e-5, by the peak optimizer.lr"""
    decay_norms_and_biases: bool = False
    """apply weight decay to biases and LayerNorm weights too"""
    max_grad_norm: float = setting(1.0, "[0, 1e6]")
    """clip the gradient to this norm; 0: no clipping"""
    schedule: Literal["linear", "cosine", "wsd", "constant"] = setting("linear", may_branch=True)
    """schedule after the warm-up: linear or cosine decay, warm-up-stable-decay, or constant"""
    warmup: float = setting(0.06, "[0, 1)", may_branch=True)
    """share of the run with linear warm-up of the learning rate, from peak / warm-up steps to the peak"""
    decay: float = setting(0.1, "(0, 1]", may_branch=True)
    """share of the run, for wsd: its end, in which the learning rate decays, by 1 - sqrt"""
    final_lr: float = setting(0.02, "[0, 1]", may_branch=True)
    """learning rate at the end of the decay, as a share of the peak"""

    def __post_init__(self):
        check_limits(self, "optimizer.")
        for beta in self.betas:
            check_range("optimizer.betas", beta, "[0, 1)")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"optimizer.warmup {self.warmup} and optimizer.decay {self.decay} together exceed the whole run."
            )
        peak = max(self.lr, self.muon_lr) if self.name == "muon" else self.lr
        if peak * self.weight_decay >= 1:
            raise ValueError(
                f"optimizer.weight_decay is {self.weight_decay}, expected less than {1 / peak:g}: a step at the peak "
                f"learning rate {peak} multiplies the weights by 1 - {peak} * {self.weight_decay}."
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The length of a run, its output folder, and what it reports."""

    output_dir: str = setting("runs/default", may_change=True, is_output=True)
    """folder for checkpoints, TensorBoard files and run.json"""
    max_steps: int | None = setting(None, "[1, 1e12]", may_branch=True)
    """length of the run, optimizer steps; set one of this, max_tokens and max_hours"""
    max_tokens: int | None = setting(None, "[1, 1e18]", may_branch=True)
    """slots (padding counted): the length of the run"""
    max_hours: float | None = setting(None, "(0, 1e5]", may_branch=True)
    """length of the run, hours of wall-clock time since the start of the command, summed over all restarts. Learning
    rate, batch, data and masking follow the clock: they depend on the share of the time that is used. The last
    evaluation and checkpoint come after. Also --max-hours"""
    seed: int = setting(17, "[0, 2^63)")
    """seed of the weights, the data order, the masks and the dropout"""
    log_every_steps: int = setting(10, "[1, 1e12]", may_change=True)
    """steps between two lines of the log"""
    eval_every_steps: int = setting(2000, "[1, 1e12]", may_change=True)
    """steps between two evaluations; the end of the run has one too"""
    eval_tokens: int = setting(1_048_576, "[1, 1e12]", may_change=True)
    """slots (padding counted): the most held-out text to evaluate on"""
    save_every_steps: int = setting(3500, "[1, 1e12]", may_change=True)
    """steps between two checkpoints; the end of the run has one too"""
    keep_checkpoints: int = setting(2, "[1, 1e6]", may_change=True)
    """number of latest checkpoints to keep"""
    keep_every_steps: int = setting(0, "[0, 1e12]", may_change=True)
    """also keep every checkpoint whose step is a multiple of this; 0: none"""
    keep_best: bool = setting(False, may_change=True)
    """also keep the checkpoint with the lowest held-out loss; evaluates before every save"""
    async_save: bool = setting(True, may_change=True)
    """write checkpoints in the background, from a copy of the state in host memory"""
    resume: str = setting("auto", may_change=True)
    """auto: resume from the newest checkpoint of output_dir, if there is one; none: start from step 0; or the folder of
    a checkpoint. Also --resume"""
    branch_from: str | None = setting(None, may_change=True)
    """a checkpoint, or another run's folder: where output_dir has no checkpoint, start from that one, with its weights,
    optimizer state, step and place in the data. The length, learning rate and masking of the run may differ"""
    trackers: list[Literal["tensorboard", "csv", "wandb"]] = setting(lambda: ["tensorboard"], may_change=True)
    """where to write curves in addition to metrics.jsonl; wandb must be installed"""
    max_norm_ratio: float = setting(10.0, "[0, 1e6]", may_change=True)
    """skip an update whose gradient norm exceeds this multiple of the median of the last 128; 0: skip only norms that
    are not finite"""
    rollback_after: int = setting(5, "[0, 1e6]", may_change=True)
    """skipped updates in a row after which to return to the last checkpoint and leave out those batches; 0: never"""
    hang_timeout_s: float = setting(60.0, "[0, 86400]", may_change=True)
    """end the run, and name the rank, if one of several ranks makes no progress for this many seconds; before its first
    step, and while PyTorch compiles, for five times as many; around a checkpoint, for half an hour. 0: never"""
    ops: Literal["auto", "torch", "fused"] = setting("auto", may_change=True)
    """kernels. auto: the fastest that run on this device; torch: plain PyTorch; fused: fused kernels, or an error"""
    compile: bool = False
    """apply torch.compile to the whole model; on a GPU, below ZeRO stage 3"""
    fp8: Literal["none", "torchao"] = "none"
    """torchao: multiply in FP8 in the layers' linear maps, forward and backward, at ZeRO stage 0 or 1. On a CPU the
    rounding is emulated, which is slow; not run on a GPU yet"""
    cuda_graphs: bool | Literal["auto"] = setting(False, may_change=True)
    """launch a micro-batch's forward and backward pass as one CUDA graph, with the same results. auto: where that is
    possible; true: refuse to start where it is not. Needs a GPU, fused kernels and ZeRO stage 0 or 1; not run on a GPU
    yet"""

    def __post_init__(self):
        given = {name: value for name in LENGTHS if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            raise ValueError(
                f"run has {' and '.join(f'{n} {v}' for n, v in given.items())}, expected only one of them."
            )
        check_limits(self, "run.")
        if self.branch_from is not None and self.resume not in ("auto", "none"):
            raise ValueError(
                f"run.branch_from is {self.branch_from} and run.resume {self.resume}: a run starts from one of them. "
                "Leave one out."
            )
        check_once("run.trackers", self.trackers)
        if self.keep_every_steps % self.save_every_steps:
            raise ValueError(
                f"run.keep_every_steps is {self.keep_every_steps}, expected a multiple of run.save_every_steps "
                f"({self.save_every_steps}), or 0."
            )


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Fine-tune the run's checkpoints on a small task during training, in a separate process on the CPU."""

    task: str | None = setting(None, may_change=True)
    """a GLUE task, or a task's YAML file, as for launch/finetune_glue.py; null: no probe"""
    data: str = setting("data/glue", may_change=True)
    """folder with the task's data, as for launch/finetune_glue.py"""
    protocol: str = setting("quick", may_change=True)
    """as for launch/finetune_glue.py; the probe uses its first candidate and first seed"""
    every_steps: int = setting(10_000, "[1, 1e12]", may_change=True)
    """optimizer steps between two probes; a multiple of run.save_every_steps, since probes start from checkpoints"""
    max_examples: int = setting(1000, "[1, 1e9]", may_change=True)
    """most examples to train on, and most examples to score"""

    def __post_init__(self):
        check_limits(self, "probe.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings that determine the result of a run, together with the corpus and the ds_config's precision."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self):
        run, data, model = self.run, self.data, self.model
        if self.probe.task is not None and self.probe.every_steps % run.save_every_steps:
            raise ValueError(
                f"probe.every_steps is {self.probe.every_steps}, expected a multiple of run.save_every_steps "
                f"({run.save_every_steps}): a probe starts from a checkpoint."
            )
        if all(getattr(run, length) is None for length in LENGTHS):
            raise ValueError(
                "the recipe does not say how long to train: set run.max_steps, run.max_tokens or run.max_hours."
            )
        if self.masking.schedule != "constant" and any(phase.mlm_probability for phase in data.phases or ()):
            raise ValueError(
                f"data.phases has mlm_probability, and masking.schedule is {self.masking.schedule}: both change the "
                "masking. Leave one of them out."
            )
        if model.position == "learned" and data.longest > model.max_position_embeddings:
            raise ValueError(
                f"data.max_seq_len is {data.longest}, but model.position learned has only "
                f"model.max_position_embeddings = {model.max_position_embeddings} positions. Raise that setting too."
            )

    @property
    def masking_rates(self) -> list[float]:
        """The shares of maskable tokens to mask: at the start and the end of a schedule, or in each of data.phases."""
        masking = self.masking
        if masking.schedule != "constant":
            return [masking.mlm_probability, masking.final_mlm_probability]
        of_phases = [phase.mlm_probability for phase in self.data.phases or ()]
        return [rate or masking.mlm_probability for rate in of_phases or [None]]

    def with_micro_batch(self, tokens: int) -> "Recipe":
        """Return the recipe with another micro-batch. Raises ValueError if it does not divide the batch."""
        return dataclasses.replace(self, data=dataclasses.replace(self.data, micro_batch_tokens=tokens))

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts and lists, ready for YAML or JSON."""
        return with_lists(dataclasses.asdict(self))


def default_settings() -> dict[str, Any]:
    """Return every section's defaults, as in Recipe.to_dict(). A new setting's must reproduce the old behaviour."""
    sections = {field.name: field.default_factory for field in dataclasses.fields(Recipe)}
    return {
        name: with_lists(dataclasses.asdict(make()))
        for name, make in sections.items()
        if make is not dataclasses.MISSING
    }


def may_change_at_resume(name: str) -> bool:
    """Return whether "section.setting" may differ between a run and its continuation; unknown settings may not."""
    return metadata_of(Recipe, name).get("may_change_at_resume", False)


def may_change_at_branch(name: str) -> bool:
    """Return whether "section.setting" may differ between a run and a branch of it; unknown settings may not."""
    return metadata_of(Recipe, name).get("may_change_at_branch", False)
