"""An adapter that peft saves gives the same logits where it is loaded again: no fresh part is lost."""

from pathlib import Path

import pytest
import torch
import transformers

import megabert
from megabert.convert.folder_to_hf import build_head, select_weights
from megabert.convert.from_hf import read_model
from megabert.model.modeling_megabert import MegaBertModel
from tests.convert.helpers.small_model import small_model

pytestmark = pytest.mark.peft

# As the README has them: the linear layers of every block, or all that are no head.
TARGETS = [
    {"target_modules": ["qkv", "out", "up", "down"]},
    {"target_modules": "all-linear", "exclude_modules": ["pre_classifier.dense", "classifier", "qa_outputs"]},
]
MODERNBERT = {
    "position": "rope", "norm_position": "pre", "bias": False, "norm_bias": False, "type_vocab_size": 0,
}  # fmt: skip
LABELS = {
    "SequenceClassification": {"labels": torch.tensor([0, 1])},
    "MultipleChoice": {"labels": torch.tensor([0, 1])},
    "TokenClassification": {"labels": torch.ones(2, 9, dtype=torch.long)},
    "QuestionAnswering": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
}
TASKS = {"MultipleChoice": "SEQ_CLS", "SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS",
         "QuestionAnswering": "QUESTION_ANS"}  # fmt: skip


def adapt_and_load(folder: Path, head: str, **settings) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Train an adapter of the model in `folder`; return its outputs, and those where it is loaded again."""
    import peft  # pyrefly: ignore[missing-import]

    megabert.register_auto_classes()

    def load_base(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return getattr(transformers, f"AutoModelFor{head}").from_pretrained(folder)

    ids = torch.randint(5, 800, (2, 3, 9) if head == "MultipleChoice" else (2, 9))
    tuned = peft.get_peft_model(load_base(1), peft.LoraConfig(task_type=TASKS[head], r=4, **settings))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        tuned(input_ids=ids, **LABELS[head]).loss.backward()
        optimizer.step()
    tuned.eval().save_pretrained(folder / "adapter")
    again = peft.PeftModel.from_pretrained(load_base(2), folder / "adapter").eval()
    with torch.no_grad():
        return tuned(input_ids=ids).to_tuple(), again(input_ids=ids).to_tuple()


def are_equal(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


@pytest.mark.parametrize("targets", TARGETS, ids=["blocks", "all-linear"])
@pytest.mark.parametrize("head", LABELS)
def test_a_saved_adapter_comes_back_with_the_same_logits(tmp_path, head, targets):
    # A masked language model: every head is fresh.
    small_model().save_pretrained(tmp_path)
    assert are_equal(*adapt_and_load(tmp_path, head, **targets))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["word_embeddings", "token_type_embeddings"]},
        {"target_modules": ["qkv"], "trainable_token_indices": {"word_embeddings": [5, 6, 7]}},
    ],
)
def test_an_adapter_of_embeddings_is_trained_and_comes_back(tmp_path, settings):
    small_model().save_pretrained(tmp_path)
    assert are_equal(*adapt_and_load(tmp_path, "SequenceClassification", **settings))


def test_the_fresh_transform_of_a_bare_modernbert_is_saved_where_it_is_named(tmp_path):
    small_model(cls=MegaBertModel, **MODERNBERT).save_pretrained(tmp_path)
    settings = {"modules_to_save": ["transform", "classifier"], **TARGETS[0]}
    assert are_equal(*adapt_and_load(tmp_path, "SequenceClassification", **settings))


def test_an_adapter_is_refused_and_its_merged_model_is_imported(tmp_path):
    import peft  # pyrefly: ignore[missing-import]

    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, intermediate_size=24))
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter_config.json: this is an adapter of .* model.merge_and_unload\(\)"):
        read_model(tmp_path / "adapter")
    ids = torch.randint(5, 190, (2, 9))
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
        read = read_model(tmp_path / "merged")
        got = build_head(select_weights(read), read.config)(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
