"""The parameter groups that pretraining and fine-tuning share."""

import torch

from megabert.optim.parameter_groups import decay_groups


def test_only_matrices_decay_unless_norms_and_biases_do_too():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    decaying, others = decay_groups(model.parameters(), 0.1, norms_and_biases=False)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [p.dim() for p in decaying["params"]] == [2]
    assert [p.dim() for p in others["params"]] == [1, 1, 1]
    (whole,) = decay_groups(model.parameters(), 0.1, norms_and_biases=True)
    assert whole["params"] == list(model.parameters())


def test_empty_groups_are_left_out():
    assert decay_groups([], 0.1, norms_and_biases=False) == []
