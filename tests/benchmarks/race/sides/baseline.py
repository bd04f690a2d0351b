"""The baseline: transformers' BertForMaskedLM, trained by its Trainer, with the settings that a search may choose."""

import dataclasses
import statistics
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from race.texts.corpora import MAX_SEQ_LEN, Corpus, blocks, windows
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

# They do not change the time of a step.
WITHOUT_SPEED = ("lr", "masking", "warmup", "initializer_range")


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """layout: documents has one document a row, padded to the longest of its batch; blocks are run_mlm.py's full rows.

    batch: rows. masking: share of the tokens to predict. warmup: share of the steps. grouped: rows of similar length
    share a batch. compiled: torch.compile, as Trainer applies it.
    """

    layers: int = 4
    width: int = 256
    heads: int = 4
    ffn: int = 1024
    layout: Literal["documents", "blocks"] = "blocks"
    batch: int = 16
    lr: float = 1e-3
    masking: float = 0.15
    dropout: float = 0.0
    warmup: float = 0.06
    initializer_range: float = 0.02
    grouped: bool = False
    compiled: bool = False
    bf16: bool = True

    @property
    def side(self) -> str:
        return "baseline"

    @property
    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def profile(self) -> dict[str, Any]:
        """The settings that determine the time of a step."""
        return {name: value for name, value in self.settings.items() if name not in WITHOUT_SPEED}

    def train(self, corpus: Corpus, steps: int, seed: int, out: Path) -> Path:
        """Train, with the learning rate at 0 after the last step. Returns a folder of transformers with tokenizer."""
        trainer, _ = self._run(corpus, steps, seed, out)
        folder = out / "model"
        assert isinstance(trainer.model, BertForMaskedLM)
        trainer.model.save_pretrained(folder)
        tokenizer(corpus).save_pretrained(folder)
        return folder

    def step_seconds(self, corpus: Corpus, steps: int, out: Path) -> list[float]:
        """Return the seconds of each of the first steps, from one batch to the next."""
        return self._run(corpus, steps, 0, out)[1].seconds

    def reference_step(self, corpus: Corpus, steps: int, warm_up: int, out: Path) -> tuple[float, float]:
        """Return the mean seconds of a step after the warm-up, and its processor seconds over all threads."""
        watch = self._run(corpus, steps, 0, out)[1]
        return statistics.mean(watch.seconds[warm_up:]), statistics.mean(watch.cpu_seconds[warm_up:])

    def load(self, folder: Path) -> Any:
        return BertForMaskedLM.from_pretrained(folder)

    def _run(self, corpus: Corpus, steps: int, seed: int, out: Path) -> tuple[Trainer, "Stopwatch"]:
        set_seed(seed)
        names = tokenizer(corpus)
        config = BertConfig(
            vocab_size=len(names), hidden_size=self.width, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, intermediate_size=self.ffn, max_position_embeddings=MAX_SEQ_LEN,
            hidden_dropout_prob=self.dropout, attention_probs_dropout_prob=self.dropout,
            initializer_range=self.initializer_range, pad_token_id=names.pad_token_id,
        )  # fmt: skip
        arguments = TrainingArguments(
            str(out / "trainer"), use_cpu=True, bf16=self.bf16, seed=seed, max_steps=steps, learning_rate=self.lr,
            per_device_train_batch_size=self.batch, optim="adamw_torch_fused", weight_decay=0.01, adam_beta2=0.98,
            adam_epsilon=1e-6, max_grad_norm=1.0, lr_scheduler_type="linear", warmup_steps=round(self.warmup * steps),
            train_sampling_strategy="group_by_length" if self.grouped else "random", torch_compile=self.compiled,
            save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(names, mlm_probability=self.masking)
        watch = Stopwatch()
        model = BertForMaskedLM(config)
        model.set_attn_implementation("sdpa")
        trainer = Trainer(model, arguments, collator, Rows(corpus, self.layout), callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer, watch


class Stopwatch(TrainerCallback):
    """The seconds of each step, data included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.last = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter(), time.process_time()
        self.seconds.append(now[0] - self.last[0])
        self.cpu_seconds.append(now[1] - self.last[1])
        self.last = now


class Rows(Dataset):
    """The training rows, tokenized before the clock starts."""

    def __init__(self, corpus: Corpus, layout: str):
        self.rows, self.is_special = rows(corpus, layout), corpus.train.tokenizer.is_special

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self.rows[index]
        return {"input_ids": ids.tolist(), "special_tokens_mask": self.is_special[ids].astype(int).tolist()}


@lru_cache
def rows(corpus: Corpus, layout: str) -> list[np.ndarray]:
    """Return the rows of a layout, int64, made once per process."""
    return [row.astype(np.int64) for row in (blocks if layout == "blocks" else windows)(corpus.train)]


def tokenizer(corpus: Corpus) -> Any:
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_file=str(corpus.tokenizer_file), **names)
