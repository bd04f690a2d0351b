"""How documents are grouped, and which attention they get; tests/kernels/test_cpu.py tests that of buckets on a CPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megabert.model import attention, buckets
from megabert.model.buckets import bucket_layout, exact_buckets, near_buckets, token_slots
from megabert.model.ops import alibi_slopes
from megabert.model.padding import Sequences

LENGTHS = st.lists(st.integers(0, 700), max_size=40)
HEADS = st.sampled_from([1, 4, 12])


@given(lengths=LENGTHS, heads=HEADS)
def test_every_document_has_one_bucket_that_holds_it(lengths, heads):
    for made in (exact_buckets(lengths, heads), near_buckets(lengths, heads)):
        documents = [document for bucket in made for document in bucket.documents]
        assert sorted(documents) == [document for document, length in enumerate(lengths) if length]
        for documents, length in made:
            assert all(lengths[document] <= length for document in documents)
            assert len(documents) == 1 or heads * len(documents) * length**2 <= buckets.MAX_SCORES


@given(lengths=LENGTHS, heads=HEADS)
def test_empty_slots_are_bounded(lengths, heads):
    """Apart from rounding up a bucket of one length, they cost less than another bucket; long documents have none."""
    for documents, length in exact_buckets(lengths, heads):
        assert {lengths[document] for document in documents} == {length}
    for documents, length in near_buckets(lengths, heads):
        wasted = heads * sum(length**2 - lengths[document] ** 2 for document in documents)
        alike = len({lengths[document] for document in documents}) == 1
        assert alike or wasted <= buckets.MAX_WASTED
        assert length - lengths[documents[0]] < buckets.ROUND_TO
        assert length <= buckets.LONGEST_KEPT or (alike and length == lengths[documents[0]])


def test_equal_documents_are_split_where_their_scores_would_be_too_many(monkeypatch):
    monkeypatch.setattr(buckets, "MAX_SCORES", 2 * 3 * 16**2)
    assert [len(bucket.documents) for bucket in near_buckets([16] * 5, heads=3)] == [2, 2, 1]


@given(lengths=LENGTHS, heads=HEADS)
def test_every_token_has_one_slot_and_every_empty_slot_a_token_of_its_document(lengths, heads):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    made = near_buckets(lengths, heads)
    tokens, empty = token_slots(bounds, made)
    assert sorted(tokens[~empty].tolist()) == list(range(sum(lengths)))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    slots = [document for documents, length in made for document in documents for _ in range(length)]
    assert owner[tokens].tolist() == slots
    layout = bucket_layout(bounds, made, 2)
    assert torch.equal(layout.out.to_buckets[layout.out.to_tokens], torch.arange(2 * sum(lengths)))
    assert torch.equal(layout.qkv.to_buckets[layout.qkv.to_tokens], torch.arange(6 * sum(lengths)))
    assert len(layout.empty) == 2 * int(empty.sum())


def test_the_layout_of_two_documents_is_that_of_its_docstring():
    layout = bucket_layout(torch.tensor([0, 2, 3], dtype=torch.int32), [buckets.Bucket([0, 1], 2)], heads=1)
    assert layout.shapes == [(2, 2)]
    assert layout.out.to_buckets.tolist() == [0, 1, 2, 2]
    assert layout.out.to_tokens.tolist() == [0, 1, 2]
    assert layout.empty.tolist() == [3]


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=9).filter(any), alibi=st.booleans())
def test_padding_documents_for_one_call_changes_neither_results_nor_gradients(lengths, alibi):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    slopes = alibi_slopes(2).double() if alibi else None
    qkv = torch.randn(sum(lengths), 3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(sum(lengths), 2, 4, dtype=torch.float64)
    results = []
    for attend in (
        attention._plan_padded(bounds, lengths, slopes),
        attention.plan_eager(Sequences(bounds, max(lengths)), slopes, 4),
    ):
        out = attend(qkv, 0.0)
        results.append((out, *torch.autograd.grad((out * weight).sum(), qkv)))
    for padded, exact in zip(*results, strict=True):
        torch.testing.assert_close(padded, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("lengths", "heads", "planner"),
    [
        ([9, 64, 30], 12, "_plan_padded"),
        ([0, 64], 12, "_plan_padded"),
        ([64, 64, 64], 12, "_plan_by_length"),
        ([0, 0], 12, "_plan_by_length"),
        ([], 12, "_plan_by_length"),
        ([2048, 30], 12, "_plan_by_length"),
        ([2048, 30], None, "_plan_padded"),
    ],
)
def test_a_gpu_gets_one_call_for_a_small_batch(lengths, heads, planner, monkeypatch):
    for name in ("_plan_padded", "_plan_by_length"):
        monkeypatch.setattr(attention, name, lambda *_, name=name: name)
    bounds: Any = SimpleNamespace(is_cpu=False, diff=lambda: torch.tensor(lengths))
    slopes = None if heads is None else torch.ones(heads)
    assert attention.plan_sdpa(Sequences(bounds, 2048), slopes, 64) == planner
