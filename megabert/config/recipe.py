"""The recipe: dataclasses with every setting of a training run, its unit, its default and its limits.

The ds_config, not the recipe, says how a run is spread over devices. --help prints the docstrings of the settings.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from megabert.config.settings import MAY_CHANGE, check_at_least, check_range, with_lists

# Settings for the length of a run: a recipe has exactly one of them.
LENGTHS = ("max_steps", "max_tokens", "max_hours")
CHECKPOINTING = re.compile(r"none|every_layer|every_(\d+)")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder's architecture."""

    num_hidden_layers: int = 12
    """number of layers"""
    hidden_size: int = 768
    """width of the residual stream, features"""
    num_attention_heads: int = 12
    """attention heads per layer"""
    intermediate_size: int = 3072
    """width of the MLP, features (geglu: of each half)"""
    position: Literal["alibi", "learned"] = "alibi"
    """alibi: attention scores get a bias of -slope * distance; learned: position embeddings"""
    ffn: Literal["geglu", "gelu"] = "geglu"
    """geglu: gated MLP; gelu: BERT's MLP"""
    layer_norm_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """precision of LayerNorm and the residual stream under bf16 autocast"""
    layer_norm_eps: float = 1e-12
    """added to the variance in LayerNorm"""
    hidden_dropout: float = 0.1
    """dropout probability of embeddings, of each block's outputs, and inside the GLU"""
    attention_dropout: float = 0.0
    """dropout probability of attention weights"""
    padding: Literal["unpadded", "padded"] = "unpadded"
    """padded: compute the padding too, as the BERT baseline does"""
    max_position_embeddings: int = 512
    """rows of the position table, tokens; used only by position: learned"""
    pad_vocab_to_multiple_of: int = 64
    """round the number of embedding rows up to a multiple of this"""
    initializer_range: float = 0.02
    """standard deviation of the initial weights"""
    z_loss: float = 0.0
    """add z_loss * log(sum of exp(logits))^2 to the training loss of each masked token, to keep logits small; 1e-4 is
    usual"""
    init_from: str | None = None
    """folder written by launch/convert_from_hf.py: start with its weights. A resumed run uses its checkpoint instead"""
    gradient_checkpointing: str = "none"
    """recompute activations in the backward pass: none, every_layer or every_K (every K-th layer)"""

    def __post_init__(self):
        if not CHECKPOINTING.fullmatch(self.gradient_checkpointing) or self.checkpoint_every < 0:
            raise ValueError(
                f"model.gradient_checkpointing is {self.gradient_checkpointing!r}, "
                "expected none, every_layer or every_K with K >= 1, such as every_2."
            )
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        check_at_least("model", self, (*sizes, "max_position_embeddings", "pad_vocab_to_multiple_of"), 1)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size is {self.hidden_size}, expected a multiple of "
                f"model.num_attention_heads ({self.num_attention_heads})."
            )
        for name in ("hidden_dropout", "attention_dropout"):
            check_range(f"model.{name}", getattr(self, name), 0, 1, closed_below=True)

    @property
    def checkpoint_every(self) -> int:
        """0: no layer is recomputed; 1: every layer; K: every K-th layer."""
        if self.gradient_checkpointing == "none":
            return 0
        number = self.gradient_checkpointing.removeprefix("every_")
        return 1 if number == "layer" else int(number) or -1


@dataclass(frozen=True, kw_only=True)
class CorpusPart:
    """One corpus of a mixture."""

    shards: str
    """as data.train"""
    weight: float = 1.0
    """share of the tokens, relative to the other weights"""

    def __post_init__(self):
        check_range("weight of a data.train", self.weight, 0, math.inf)


@dataclass(frozen=True, kw_only=True)
class LengthPhase:
    """A part of a run with one maximum length."""

    max_seq_len: int
    """longest piece of a document, tokens"""
    until: float
    """share of the run's steps at which this phase ends"""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The shards, and how documents are packed into batches."""

    train: list[CorpusPart] | str = field(default="data/quickstart/tokens", metadata=MAY_CHANGE)
    """shards: a folder with a manifest.json, or tar files in brace notation; local, a URL, or pipe:COMMAND. A list of
    {shards, weight} mixes several corpora"""
    heldout: str | None = field(default=None, metadata=MAY_CHANGE)
    """shards to evaluate on; default: the held-out split of data.train"""
    tokenizer: str | None = field(default=None, metadata=MAY_CHANGE)
    """tokenizer.json, or a folder with one, for shards that hold text"""
    max_seq_len: list[LengthPhase] | int = 128
    """longest piece of a document, tokens, including [CLS] and [SEP]. A list of {max_seq_len, until} changes it during
    the run; the last until is 1"""
    documents: Literal["split", "truncate"] = "split"
    """what to do with longer documents: split them evenly into pieces, or truncate them to the first piece"""
    micro_batch_tokens: int = 65_536
    """tokens per bin: the batch that one rank computes at once"""
    global_batch_tokens: int | Literal["auto"] = 524_288
    """token slots per optimizer step over all ranks; auto: micro_batch_tokens x ranks (for the quickstart)"""
    batch_warmup: float = 0.0
    """share of the run in which the batch grows from batch_warmup_from to global_batch_tokens, in equal stages"""
    batch_warmup_from: int | None = None
    """token slots of the first steps; must divide global_batch_tokens"""
    max_documents: int | Literal["auto"] = "auto"
    """most pieces in one bin; auto: 4 x micro_batch_tokens / median piece length"""
    num_workers: int = field(default=2, metadata=MAY_CHANGE)
    """loader processes per rank, rounded down to a divisor of streams / ranks; 0: pack in the training process"""
    max_streams: int = 192
    """most streams that the shards are divided into; the number of streams is fixed for the whole run"""
    on_bad_shard: Literal["stop", "skip"] = field(default="stop", metadata=MAY_CHANGE)
    """what to do with a damaged chunk of a shard: stop the run, or skip the chunk, count it and log it"""
    cache_dir: str = field(default="~/.cache/megabert/shards", metadata=MAY_CHANGE)
    """local folder for shards that cannot be read in parts: from a pipe, or a server without byte ranges"""
    cache_gb: int = field(default=64, metadata=MAY_CHANGE)
    """size limit of cache_dir, GiB; should hold one shard per stream of this machine's ranks"""

    def __post_init__(self):
        untils = [until for _, until in self.lengths]
        if not self.lengths or untils != sorted({*untils}) or untils[0] <= 0 or untils[-1] != 1:
            raise ValueError(f"data.max_seq_len has phases until {untils}, expected rising shares, the last of them 1.")
        if min(length for length, _ in self.lengths) < 3:
            raise ValueError(f"data.max_seq_len is {self.max_seq_len}, expected at least 3: [CLS], one token, [SEP].")
        if self.micro_batch_tokens < self.longest:
            raise ValueError(
                f"data.micro_batch_tokens is {self.micro_batch_tokens}, "
                f"expected at least data.max_seq_len ({self.longest})."
            )
        if isinstance(self.train, str) and self.train.startswith("["):
            raise ValueError(
                f"data.train is {self.train}, expected a path, or a list of {{shards: PATH, weight: NUMBER}}."
            )
        if not self.corpora:
            raise ValueError("data.train is an empty list, expected at least one corpus.")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers is {self.num_workers}, expected at least 0.")
        check_at_least("data", self, ("max_streams", "cache_gb"), 1)
        self._check_batch()

    def _check_batch(self) -> None:
        full, first, micro = self.global_batch_tokens, self.batch_warmup_from, self.micro_batch_tokens
        if full != "auto" and (full < 1 or full % micro):
            raise ValueError(
                f"data.global_batch_tokens is {full}, expected a multiple of data.micro_batch_tokens ({micro})."
            )
        check_range("data.batch_warmup", self.batch_warmup, 0, 1, closed_below=True)
        if (first is None) != (self.batch_warmup == 0):
            raise ValueError(
                f"data.batch_warmup is {self.batch_warmup} and data.batch_warmup_from {first}, "
                "expected both or neither."
            )
        if first is not None and (full == "auto" or first < 1 or first % micro or full % first):
            raise ValueError(
                f"data.batch_warmup_from is {first}, expected a multiple of data.micro_batch_tokens ({micro}) "
                f"that divides data.global_batch_tokens ({full})."
            )

    @property
    def corpora(self) -> list[tuple[str, float]]:
        """(location, weight) of each corpus."""
        if isinstance(self.train, str):
            return [(self.train, 1.0)]
        return [(part.shards, part.weight) for part in self.train]

    @property
    def lengths(self) -> list[tuple[int, float]]:
        """(max_seq_len, share of the run at which it ends) of each phase."""
        if isinstance(self.max_seq_len, int):
            return [(self.max_seq_len, 1.0)]
        return [(phase.max_seq_len, phase.until) for phase in self.max_seq_len]

    @property
    def longest(self) -> int:
        """Longest piece of any phase, tokens."""
        return max(length for length, _ in self.lengths)


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Masked language modelling: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay."""

    mlm_probability: float = 0.3
    """share of maskable tokens to predict in training"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """how the share changes to final_mlm_probability over the run"""
    final_mlm_probability: float = 0.15
    """share at the end of a linear or cosine schedule"""
    eval_mlm_probability: float = 0.15
    """share in evaluation"""

    def __post_init__(self):
        for name in ("mlm_probability", "final_mlm_probability", "eval_mlm_probability"):
            check_range(f"masking.{name}", getattr(self, name), 0, 1)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and the learning-rate schedule."""

    name: Literal["adamw", "muon", "stable_adamw"] = "adamw"
    """muon: Muon for the encoder's matrices, AdamW for the rest; stable_adamw: only at ZeRO stage 0"""
    lr: float = 5e-4
    """peak learning rate"""
    muon_lr: float = 0.02
    """peak learning rate of Muon's matrices"""
    betas: tuple[float, float] = (0.9, 0.98)
    """decay rates of Adam's two moments"""
    eps: float = 1e-6
    """added to Adam's denominator"""
    weight_decay: float = 0.01
    """in torch's convention: each step multiplies weights by 1 - lr * weight_decay. Composer's convention, used by
    MosaicBERT's 1e-5, divides lr by the peak: weight_decay here is Composer's value / lr"""
    decay_norms_and_biases: bool = False
    """apply weight decay to biases and LayerNorm weights too"""
    max_grad_norm: float = 1.0
    """clip the gradient to this norm; 0: no clipping"""
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """schedule after the warm-up: linear or cosine decay, warm-up-stable-decay, or constant"""
    warmup: float = 0.06
    """share of the run in which the learning rate rises linearly from 0"""
    decay: float = 0.1
    """wsd: share of the run in which the learning rate decays, by 1 - sqrt"""
    final_lr: float = 0.02
    """learning rate at the end of the decay, as a share of the peak"""

    def __post_init__(self):
        check_range("optimizer.warmup", self.warmup, 0, 1, closed_below=True)
        check_range("optimizer.final_lr", self.final_lr, 0, 1, closed_below=True, closed_above=True)
        check_range("optimizer.decay", self.decay, 0, 1, closed_above=True)
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"optimizer.warmup {self.warmup} and optimizer.decay {self.decay} together exceed the whole run."
            )
        for name in ("lr", "muon_lr"):
            if (value := getattr(self, name)) <= 0:
                raise ValueError(f"optimizer.{name} is {value}, expected more than 0.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The length of a run, its output folder, and what it reports."""

    output_dir: str = field(default="runs/default", metadata=MAY_CHANGE)
    """folder for checkpoints, TensorBoard files and run.json"""
    max_steps: int | None = None
    """length of the run, optimizer steps; set one of this, max_tokens and max_hours"""
    max_tokens: int | None = None
    """length of the run, token slots"""
    max_hours: float | None = None
    """length of the run, hours of wall-clock time since the start of the command, summed over all restarts. The
    learning rate follows the clock and has decayed at the end; the last evaluation and checkpoint come after. Also
    --max-hours"""
    seed: int = 17
    """seed of the weights, the data order, the masks and the dropout"""
    log_every_steps: int = field(default=10, metadata=MAY_CHANGE)
    """steps between two lines of the log"""
    eval_every_steps: int = field(default=2000, metadata=MAY_CHANGE)
    """steps between two evaluations; the end of the run has one too"""
    eval_tokens: int = field(default=1_048_576, metadata=MAY_CHANGE)
    """most token slots of held-out text to evaluate on"""
    save_every_steps: int = field(default=3500, metadata=MAY_CHANGE)
    """steps between two checkpoints; the end of the run has one too"""
    keep_checkpoints: int = field(default=2, metadata=MAY_CHANGE)
    """number of latest checkpoints to keep"""
    keep_every_steps: int = field(default=0, metadata=MAY_CHANGE)
    """also keep every checkpoint whose step is a multiple of this; 0: none"""
    keep_best: bool = field(default=False, metadata=MAY_CHANGE)
    """also keep the checkpoint with the lowest held-out loss; evaluates before every save"""
    async_save: bool = field(default=True, metadata=MAY_CHANGE)
    """write checkpoints in the background, from a copy of the state in host memory"""
    resume: str = field(default="auto", metadata=MAY_CHANGE)
    """auto: resume from the newest checkpoint of output_dir, if there is one; none: start from step 0; or the folder of
    a checkpoint. Also --resume"""
    trackers: list[Literal["tensorboard", "csv", "wandb"]] = field(
        default_factory=lambda: ["tensorboard"], metadata=MAY_CHANGE
    )
    """where to write curves in addition to metrics.jsonl; wandb must be installed"""
    max_norm_ratio: float = field(default=10.0, metadata=MAY_CHANGE)
    """skip an update whose gradient norm exceeds this multiple of the median of the last 128; 0: skip only norms that
    are not finite"""
    rollback_after: int = field(default=5, metadata=MAY_CHANGE)
    """skipped updates in a row after which to return to the last checkpoint and leave out those batches; 0: never"""
    ops: Literal["auto", "torch", "fused"] = field(default="auto", metadata=MAY_CHANGE)
    """kernels. auto: the fastest that run on this device; torch: plain PyTorch; fused: fused kernels, or an error"""
    compile: bool = False
    """apply torch.compile to the whole model; on a GPU, below ZeRO stage 3"""

    def __post_init__(self):
        given = {name: value for name in LENGTHS if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            raise ValueError(
                f"run has {' and '.join(f'{n} {v}' for n, v in given.items())}, expected only one of them."
            )
        if self.max_hours is not None and not 0 < self.max_hours < math.inf:
            raise ValueError(f"run.max_hours is {self.max_hours}, expected more than 0.")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"run.seed is {self.seed}, expected a number from 0 to 2^63 - 1.")
        check_at_least("run", self, ("max_norm_ratio", "rollback_after"), 0)
        positive = ("log_every_steps", "eval_every_steps", "save_every_steps", "keep_checkpoints", "eval_tokens")
        check_at_least("run", self, ("max_steps", "max_tokens", *positive), 1)
        if self.keep_every_steps < 0 or self.keep_every_steps % self.save_every_steps:
            raise ValueError(
                f"run.keep_every_steps is {self.keep_every_steps}, expected a multiple of run.save_every_steps "
                f"({self.save_every_steps}), or 0."
            )


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Fine-tune the run's checkpoints on a small task during training, in a separate process on the CPU."""

    task: str | None = field(default=None, metadata=MAY_CHANGE)
    """a GLUE task, or a task's YAML file, as for launch/finetune_glue.py; null: no probe"""
    data: str = field(default="data/glue", metadata=MAY_CHANGE)
    """folder with the task's data, as for launch/finetune_glue.py"""
    protocol: str = field(default="quick", metadata=MAY_CHANGE)
    """as for launch/finetune_glue.py; the probe uses its first candidate and first seed"""
    every_steps: int = field(default=10_000, metadata=MAY_CHANGE)
    """optimizer steps between two probes; a multiple of run.save_every_steps, since probes start from checkpoints"""
    max_examples: int = field(default=1000, metadata=MAY_CHANGE)
    """most examples to train on, and most examples to score"""

    def __post_init__(self):
        check_at_least("probe", self, ("every_steps", "max_examples"), 1)


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
        if run.max_hours and (data.batch_warmup or len(data.lengths) > 1 or self.masking.schedule != "constant"):
            raise ValueError(
                "run.max_hours leaves the number of batches open, so batch size, length and masking cannot change over "
                "the run: set data.batch_warmup 0, one data.max_seq_len and masking.schedule constant; or set "
                "run.max_steps instead."
            )
        if model.position == "learned" and data.longest > model.max_position_embeddings:
            raise ValueError(
                f"data.max_seq_len is {data.longest}, but model.position learned has only "
                f"model.max_position_embeddings = {model.max_position_embeddings} positions. Raise that setting too."
            )

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts and lists, ready for YAML or JSON."""
        return with_lists(dataclasses.asdict(self))


def may_change_at_resume(name: str) -> bool:
    """Whether "section.setting" may differ between a run and its continuation; unknown settings may not."""
    section, _, setting = name.partition(".")
    config = get_type_hints(Recipe).get(section)
    settings = {} if config is None else {one.name: one.metadata for one in dataclasses.fields(config)}
    return settings.get(setting, {}).get("may_change_at_resume", False)
