"""Our side: a recipe of the project, trained by megabert.pretrain()."""

import shutil
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from race.texts.corpora import MAX_SEQ_LEN, Corpus

import megabert
from megabert.commands.notebook import FINISHED
from megabert.finetune.base_model import prepare_base_model
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training.telemetry.reporter import read_metrics

# They do not change the time of a step.
WITHOUT_SPEED = ("optimizer.lr", "optimizer.muon_lr", "optimizer.warmup", "optimizer.schedule", "optimizer.decay",
                 "model.initializer_range", "optimizer.weight_decay")  # fmt: skip
# As in launch/quickstart.sh: on one rank ZeRO would only copy gradients.
DS_CONFIG = "zero0"
# Of every recipe of the race; "same-size" is the baseline's layers and width.
COMMON: dict[str, Any] = {
    "model.num_hidden_layers": 4,
    "model.hidden_size": 256,
    "model.num_attention_heads": 4,
    "model.intermediate_size": 1024,
    "model.hidden_dropout": 0.0,
    "model.max_position_embeddings": MAX_SEQ_LEN,
    "data.max_seq_len": MAX_SEQ_LEN,
    "data.micro_batch_tokens": 2048,
    "data.num_workers": 0,
    "optimizer.final_lr": 0.0,
    "masking.mlm_probability": 0.3,
}


@dataclass(frozen=True)
class Ours:
    """Settings of a recipe, as "section.setting", that differ from COMMON and then from the recipe `quickstart`."""

    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def side(self) -> str:
        return "ours"

    @property
    def settings(self) -> dict[str, Any]:
        return COMMON | dict(self.changes)

    @property
    def profile(self) -> dict[str, Any]:
        """The settings that determine the time of a step."""
        return {name: value for name, value in self.settings.items() if name not in WITHOUT_SPEED}

    def train(self, corpus: Corpus, steps: int, seed: int, out: Path) -> Path:
        """Train, with the learning rate decayed at the last step. Returns a folder with the model in our layout."""
        self._run(corpus, steps, seed, out / "run", log_every_steps=max(1, steps // 50))
        return prepare_base_model(out / "run", out / "model").folder

    def step_seconds(self, corpus: Corpus, steps: int, out: Path) -> list[float]:
        """Return the seconds of each of the first steps, batches and the report of a step included."""
        self._run(corpus, steps, 0, out / "run", log_every_steps=1)
        records = read_metrics(out / "run/metrics.jsonl")
        return [record["seconds_per_step"] for record in records if "seconds_per_step" in record]

    def load(self, folder: Path) -> Any:
        return MegaBertForMaskedLM.from_pretrained(folder)

    def _run(self, corpus: Corpus, steps: int, seed: int, folder: Path, log_every_steps: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        sections: dict[str, dict[str, Any]] = {}
        for name, value in self.settings.items():
            section, setting = name.split(".")
            sections.setdefault(section, {})[setting] = value
        sections["data"]["train"] = str(corpus.tokens)
        # The race evaluates by itself, so the run evaluates on one bin only.
        sections["run"] = sections.get("run", {}) | {
            "output_dir": str(folder), "max_tokens": None, "max_steps": steps, "seed": seed, "trackers": [],
            "log_every_steps": log_every_steps, "eval_every_steps": steps, "save_every_steps": steps,
            "eval_tokens": 1, "keep_checkpoints": 1,
        }  # fmt: skip
        folder.mkdir(parents=True)
        with open(folder / "log", "w") as log, redirect_stdout(log):
            result = megabert.pretrain(megabert.load_recipe("quickstart", **sections), DS_CONFIG)
        if result.exit_reason != FINISHED:
            raise KeyboardInterrupt(result.exit_reason)
