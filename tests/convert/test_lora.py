"""An adapter that peft saves gives the same logits where it is loaded again: no fresh part is lost."""

import pytest
import torch
import transformers

import megabert
from tests.convert.helpers.small_model import small_model

pytestmark = pytest.mark.peft

TARGETS = ["qkv", "out", "up", "down"]  # the linear layers of every block, as the README names them
LABELS = {
    "SequenceClassification": {"labels": torch.tensor([0, 1])},
    "MultipleChoice": {"labels": torch.tensor([0, 1])},
    "TokenClassification": {"labels": torch.ones(2, 9, dtype=torch.long)},
    "QuestionAnswering": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
}
TASKS = {"MultipleChoice": "SEQ_CLS", "SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS",
         "QuestionAnswering": "QUESTION_ANS"}  # fmt: skip


@pytest.mark.parametrize("head", LABELS)
def test_a_saved_adapter_comes_back_with_the_same_logits(tmp_path, head):
    import peft  # pyrefly: ignore[missing-import]

    megabert.register_auto_classes()
    small_model().save_pretrained(tmp_path / "base")  # a masked language model: every head is fresh

    def load_base(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path / "base")

    ids = torch.randint(5, 800, (2, 3, 9) if head == "MultipleChoice" else (2, 9))
    tuned = peft.get_peft_model(load_base(1), peft.LoraConfig(task_type=TASKS[head], target_modules=TARGETS, r=4))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        tuned(input_ids=ids, **LABELS[head]).loss.backward()
        optimizer.step()
    tuned.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_base(2), tmp_path / "adapter").eval()
    with torch.no_grad():
        got, expected = (model(input_ids=ids).to_tuple() for model in (again, tuned))
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
