"""The prediction of a run on GPUs: its formulas and its limits."""

import dataclasses
import re

import pytest
import torch

from megabert.config.ds_config import DsConfig
from megabert.config.ds_schema import Offload
from megabert.config.recipe_parser import load_recipe, recipe_names
from megabert.kernels.resolve import torch_ops
from megabert.model import attention
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training.architecture import architecture_of
from megabert.training.micro_batch.batch import Batch, batch_of, piece_lengths
from megabert.training.micro_batch.memory import FP32, Execution, Formats, memory_of_rank, num_weights, weights_of_maps
from megabert.training.roofline.estimate import communication_s, hours_of, predict_recipe, zero_of
from megabert.training.roofline.work import needed_flops, operations
from megabert.training.telemetry.cards import card_named
from tests.benchmarks.bench_estimate import CLOSE, LEVERS, RUNS, print_levers
from tests.benchmarks.support import contenders, this_cpu
from tests.benchmarks.support.contenders import Row

H100 = card_named("h100")
BASE = load_recipe("mosaicbert-base")


@pytest.mark.parametrize(
    ("ffn", "changes"),
    [
        ("geglu", {}),
        ("geglu", {"norm_bias": False, "norm_position": "pre"}),
        ("gelu", {}),
        ("gelu", {"bias": False}),
        ("geglu", {"embedding_neighbors": 2}),
        ("gelu", {"position_offset": 2, "type_vocab_size": 1}),
    ],
)
def test_weights_are_those_of_the_model(ffn, changes):
    position = "alibi" if ffn == "geglu" else "learned"
    small = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    small |= {"ffn": ffn, "position": position, "max_position_embeddings": 64} | changes
    model = MegaBertForMaskedLM(MegaBertConfig(vocab_size=97, **small))
    assert num_weights(dataclasses.replace(BASE.model, **small), 97) == sum(x.numel() for x in model.parameters())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipes_weights_are_counted_exactly(name):
    recipe = load_recipe(name).model
    config = architecture_of(recipe, 50_281)
    with torch.device("meta"):
        model = MegaBertForMaskedLM(config)
    model.tie_weights()
    assert num_weights(recipe, config.vocab_size) == sum(parameter.numel() for parameter in model.parameters())
    maps = [module.weight for module in model.bert.encoder.modules() if isinstance(module, torch.nn.Linear)]
    assert recipe.num_hidden_layers * weights_of_maps(recipe) == sum(weight.numel() for weight in maps)


def memory(tokens, model=BASE.model, zero=1, ranks=8, formats=FP32, **execution):
    """zero: a stage, as ds_configs/ has it, or the section of a ds_config."""
    batch = Batch(tokens=tokens, slots=tokens, masked=0.3 * tokens, attended=0)
    section = zero_of(zero) if isinstance(zero, int) else zero
    return memory_of_rank(
        model, batch, Execution(**execution), vocab_size=30_528, zero=section, ranks=ranks, formats=formats
    )


@pytest.mark.parametrize(("tokens", "gib"), [(14_720, 5.2), (58_880, 19.8)])
def test_what_is_kept_is_what_a_walk_of_the_model_on_fake_tensors_kept(tokens, gib):
    """The walk saved tensors of mosaicbert-base with the Triton kernels and counted each storage once."""
    assert memory(tokens).kept == pytest.approx(gib * 2**30, rel=0.1)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("name", ["mosaicbert-base", "modernbert-base", "bert-base"])
def test_what_plain_pytorch_keeps_is_what_autograd_saves(name, bf16, monkeypatch):
    """Each storage is counted once, with the dropout and the fused attention that PyTorch has on a GPU."""
    layers, vocab_size, slots, length = 6, 512, 1024, 256
    small = {"num_hidden_layers": layers, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
    recipe = load_recipe(name, model=small | ({"max_position_embeddings": 512} if name == "bert-base" else {}))
    # With dropout PyTorch's attention on a CPU would keep its weights.
    section = dataclasses.replace(recipe.model, attention_dropout=0.0)
    model = MegaBertForMaskedLM(architecture_of(section, vocab_size)).train()

    def planner(sequences, slopes, head_dim, reach=None):
        if sequences.num_keys is None and reach is None:
            return attention._plan_by_length(sequences.cu_seqlens, slopes)
        return attention.plan_sdpa(sequences, slopes, head_dim, reach)

    set_ops(model, torch_ops()._replace(attention=planner))
    monkeypatch.setattr("torch.nn.functional.dropout", lambda x, p: torch.native_dropout(x, p, train=True)[0])
    weights, saved = {parameter.untyped_storage()._cdata for parameter in model.parameters()}, {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    documents, masked = slots // length, 256
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16, bf16):
        loss = model.masked_loss(
            input_ids=torch.arange(slots) % vocab_size,
            position_ids=torch.arange(length).repeat(documents),
            cu_seqlens=torch.arange(0, slots + 1, length, dtype=torch.int32),
            max_seqlen=length,
            masked_positions=torch.arange(masked),
            masked_labels=torch.arange(masked),
        )
    kept = sum(storage.nbytes() for key, storage in saved.items() if key not in weights)
    assert loss.loss_sum.requires_grad
    batch = Batch(tokens=slots, slots=slots, masked=masked, attended=0)
    predicted = memory_of_rank(
        section, batch, Execution(bf16=bf16, fused=False), vocab_size=vocab_size, zero=zero_of(1), ranks=1
    ).kept
    assert kept == pytest.approx(predicted, rel=0.05)


def test_weights_in_bf16_have_no_copies_of_autocast():
    own = Formats.of(DsConfig("ds.json", {"bf16": {"enabled": True}}).values)
    assert memory(1024).kept - memory(1024, formats=own).kept == 2 * num_weights(BASE.model, 30_528)


def test_a_card_without_our_kernels_needs_more_memory():
    recipes = [load_recipe("mosaicbert-base", run={"ops": ops}) for ops in ("auto", "torch")]
    chosen = [predict_recipe(recipe, card_named("a10"), 8, 1).tokens for recipe in recipes]
    assert chosen[0] == chosen[1]
    fits = {name: predict_recipe(recipes[0], card_named(name), 8, 1).memory.total for name in ("v100", "t4", "mi300x")}
    assert all(total <= 0.9 * card_named(name).memory for name, total in fits.items())
    small = load_recipe("mosaicbert-base", data={"micro_batch_tokens": 14_720})
    assert predict_recipe(small, card_named("mi300x"), 8, 1).memory.kept > 1.3 * memory(14_720).kept


def test_the_memory_with_recomputed_layers_is_at_least_the_walks_peak():
    """walk.py's peak_bytes of mosaicbert-base, ZeRO 1 on 8 ranks, 5 layers, a decoder of 30,528 rows."""
    for every, peak in (("every_layer", 1_837_560_332), ("every_2", 2_446_255_660)):
        model = dataclasses.replace(BASE.model, num_hidden_layers=5, gradient_checkpointing=every)
        found = memory(14_720, model)
        assert peak <= found.states + found.kept + found.work <= 1.25 * peak


def test_offloading_and_the_size_of_buckets_count():
    weights = num_weights(BASE.model, 30_528)
    plain = {stage: memory(1024, zero=stage).states for stage in (1, 2, 3)}
    for stage in (1, 2, 3):
        offloaded = dataclasses.replace(zero_of(stage), offload_optimizer=Offload(device="cpu"))
        assert plain[stage] - memory(1024, zero=offloaded).states == 12 * weights / 8
        assert memory(1024, zero=dataclasses.replace(offloaded, offload_optimizer=Offload())).states == plain[stage]
        larger = dataclasses.replace(zero_of(stage), reduce_bucket_size=500_000_000)
        assert memory(1024, zero=larger).states - plain[stage] == (1 if stage == 1 else 2) * 2 * 4 * 450_000_000
    no_weights = dataclasses.replace(zero_of(3), offload_param=Offload(device="cpu"))
    assert plain[3] - memory(1024, zero=no_weights).states == 4 * weights / 8


@pytest.mark.parametrize(
    ("stage", "settings", "expected"),
    [
        (1, {}, 4 + 4 + 12 / 8),
        (1, {"bf16": {"enabled": True}}, 2 + 2 + 12 / 8),
        (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, 2 + 2 + 4 + 12 / 8),
        (2, {"bf16": {"enabled": True}}, 2 + (2 + 12) / 8),
        (3, {}, (4 + 4 + 12) / 8),
        (3, {"bf16": {"enabled": True}}, (2 + 2 + 12) / 8),
        (3, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, (2 + 4 + 12) / 8),
    ],
)
def test_the_states_are_those_that_deepspeed_holds(stage, settings, expected):
    """Bytes for a weight that rank 0 of 8 had after a backward pass on a CPU, without the buckets: DeepSpeed 0.19.8."""
    formats = Formats.of(DsConfig("ds.json", settings).values)
    section = dataclasses.replace(zero_of(stage), reduce_bucket_size=0)
    gathered = 2 * formats.weight / BASE.model.num_hidden_layers if stage == 3 else 0
    states = memory(1024, zero=section, formats=formats).states / num_weights(BASE.model, 30_528)
    assert states - gathered == pytest.approx(expected)


def test_graphs_hold_the_gradients_of_a_micro_batch():
    assert memory(1024, graphs=True).states - memory(1024).states == 4 * num_weights(BASE.model, 30_528)
    graphs, none = (
        predict_recipe(load_recipe("mosaicbert-base", run={"cuda_graphs": on}), H100, 8, 1) for on in ("auto", False)
    )
    assert graphs.memory.states > none.memory.states


def test_fp8_keeps_no_copies_of_the_layers_weights_and_casts_take_memory():
    bf16, fp8 = memory(14_720), memory(14_720, fp8=True)
    assert bf16.kept - fp8.kept == 2 * 12 * weights_of_maps(BASE.model)
    assert fp8.work - bf16.work == 4 * 14_720 * 2 * 3072


def test_memory_falls_with_ranks_and_stages_and_recomputation():
    def states(stage, ranks):
        return memory(1024, zero=stage, ranks=ranks).states

    weights = num_weights(BASE.model, 30_528)
    assert states(0, 8) == states(0, 1) == 16 * weights
    assert states(1, 64) < states(1, 8) < states(1, 1)
    assert states(3, 64) < states(2, 64) < states(1, 64)
    every = dataclasses.replace(BASE.model, gradient_checkpointing="every_layer")
    kept = [memory(58_880, model, ranks=1).kept for model in (BASE.model, every)]
    assert kept[1] < kept[0] / 5


def test_pieces_of_web_documents():
    mean, attended = piece_lengths(128, "truncate")
    assert 110 < mean < attended < 128
    assert piece_lengths(100_000, "split")[0] == pytest.approx(2.718 ** (5.5 + 0.5), rel=0.1)


def test_operations_have_at_least_the_needed_flops_and_a_padded_model_has_more():
    for name, most in (("mosaicbert-base", 1.1), ("bert-base", 1.4)):
        recipe = load_recipe(name)
        batch = batch_of(recipe.model, 14_720, 128, "truncate", recipe.masking.mlm_probability)
        done = sum(operation.flops for operation in operations(recipe.model, 30_528, batch))
        needed = needed_flops(recipe.model, 30_528, batch)
        assert needed < done < most * needed, name


@pytest.mark.parametrize("stream", [2, 4])
def test_a_norm_after_a_sum_moves_what_its_kernel_says_and_autograd_sums_nothing(stream):
    """As in the docstring of kernels/add_layer_norm.py, two norms in each of 12 layers. x, dx: bf16."""
    dtype = "bfloat16" if stream == 2 else "float32"
    model = dataclasses.replace(BASE.model, layer_norm_dtype=dtype, bias=False)
    batch = Batch(tokens=100, slots=100, masked=30, attended=50)
    moved = {operation.name: operation.moved_bytes for operation in operations(model, 30_528, batch)}
    forward, backward = 2 + stream + stream, 2 * stream + 2 + stream + 2 + stream
    assert moved["LayerNorm"] == 2 * 12 * 100 * 768 * (forward + backward)
    assert moved["sums"] == moved["rotation"] == 0
    modern = dataclasses.replace(model, norm_position="pre", position="rope")
    moved = {operation.name: operation.moved_bytes for operation in operations(modern, 30_528, batch)}
    assert moved["sums"] == 2 * 12 * 100 * 768 * 6 * stream
    # kernels/rotate.py: 6 * H * D * 2 bytes a pass
    assert moved["rotation"] == 12 * 100 * 2 * 6 * 768 * 2


def test_attention_of_local_layers_sees_a_window():
    def attention(model, attended):
        batch = Batch(tokens=100, slots=100, masked=30, attended=attended)
        (found,) = [operation for operation in operations(model, 30_528, batch) if operation.name == "attention"]
        return found.flops

    windowed = load_recipe("modernbert-base").model
    everywhere = dataclasses.replace(
        windowed, global_attention_every=1, local_attention_window=None, local_rope_theta=None
    )
    assert attention(windowed, 100) == attention(everywhere, 100)
    # 8 of 22 layers are global, and the window has 64 tokens on each side.
    assert attention(windowed, 1290) == pytest.approx(attention(everywhere, 1290) * (8 + 14 / 10) / 22)


def test_the_maps_of_neighbors_are_not_in_fp8():
    """As in kernels/fp8.py, which converts the layers only."""
    batch = Batch(slots=1000, tokens=1000.0, masked=300.0, attended=100.0)
    mixed = dataclasses.replace(BASE.model, embedding_neighbors=2)
    plain, found = (
        {each.name: each for each in operations(model, 30528, batch, Execution(fp8=True))}
        for model in (BASE.model, mixed)
    )
    assert found["layers' products"] == plain["layers' products"]
    assert found["neighbors' products"].flops == 6 * 1000 * 4 * 768**2
    assert not found["neighbors' products"].fp8


def test_fp8_pays_for_wide_layers_and_is_refused_where_there_is_none():
    def speed(name, card, fp8, stage=1):
        recipe = load_recipe(name, run={"fp8": fp8})
        return predict_recipe(recipe, card_named(card), 8, stage).tokens_per_s

    assert speed("mosaicbert-base", "h100", "torchao") < speed("mosaicbert-base", "h100", "none")
    assert speed("mosaicbert-large", "h100", "torchao") > speed("mosaicbert-large", "h100", "none")
    for card in ("a100", "a10", "v100", "rtx-a6000", "rtx-3090", "mi250x"):
        with pytest.raises(ValueError, match=f"run.fp8 is torchao, but the {card} has no FP8"):
            speed("mosaicbert-base", card, "torchao")
    with pytest.raises(ValueError, match=r"ZeRO 2 has not been tried with it \(--zero 1\)"):
        speed("mosaicbert-base", "h100", "torchao", stage=2)
    for name, peak in (
        ("l4", 242e12),
        ("h20", 296e12),
        ("rtx-6000-ada", 728e12),
        ("b200", 4.5e15),
        ("mi300x", 2614e12),
    ):
        assert card_named(name).fp8 == pytest.approx(peak)


def test_a_cuda_graph_takes_pythons_time_away_and_is_refused_where_it_cannot_be():
    def predict(card="b200", stage=1, **run):
        data = {"micro_batch_tokens": 3680, "global_batch_tokens": 29_440}
        return predict_recipe(load_recipe("mosaicbert-base", data=data, run=run), card_named(card), 8, stage)

    assert predict().seconds["Python"] > 0
    for on in ("auto", True):
        assert predict(cuda_graphs=on).seconds["Python"] == 0
    for card, stage, reason in (("b200", 2, "ZeRO 2 reduces"), ("v100", 1, "the kernels do not run on v100")):
        impossible = predict(card, stage, cuda_graphs="auto")
        assert impossible == predict(card, stage)
        with pytest.raises(ValueError, match=f"run.cuda_graphs is true, but {reason}"):
            predict(card, stage, cuda_graphs=True)


def test_communication_grows_with_stages_and_machines():
    assert communication_s(1e8, H100, 1, 2, 4) == 0
    one, two, many = (communication_s(1e8, H100, *rest) for rest in ((8, 1, 4), (8, 2, 4), (64, 1, 4)))
    assert one < two
    assert many > 5 * one


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_prediction(name):
    recipe = load_recipe(name)
    prediction = predict_recipe(recipe, H100, 2, 1)
    assert 0 < prediction.mfu < 0.7
    assert predict_recipe(recipe, H100, 8, 1).memory.fits(H100.memory)
    assert hours_of(recipe.run, prediction) > 0


@pytest.mark.parametrize(("name", "ranks"), [("bert-base", 6), ("modernbert-continue", 7)])
def test_every_advice_for_a_number_of_ranks_works(name, ranks):
    recipe = load_recipe(name)
    with pytest.raises(ValueError, match=f"{ranks} ranks") as refused:
        predict_recipe(recipe, H100, ranks, 1)
    settings = re.findall(r"[Ss]et data\.(\w+) (\d+)", str(refused.value))
    others = re.findall(r"\d+", re.findall(r"use ([\d, or]+) ranks?", str(refused.value))[0])
    assert settings
    assert others
    for setting, value in settings:
        changed = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **{setting: int(value)}))
        assert predict_recipe(changed, H100, ranks, 1).gpus == ranks
    for number in others:
        assert predict_recipe(recipe, H100, int(number), 1).gpus == int(number)


def test_a_faster_card_and_more_gpus_take_less_time():
    hours = [
        hours_of(BASE.run, predict_recipe(BASE, card_named(card), gpus, 1))
        for card, gpus in (("t4", 8), ("a100", 8), ("h100", 8), ("h100", 32))
    ]
    assert hours == sorted(hours, reverse=True)


def test_every_published_run_is_met_or_has_a_reason():
    for run in RUNS:
        assert abs(run.error()) <= CLOSE or run.reason, run.name
        assert run.fp8 == ("MLPerf" in run.name and run.gpu != "a100")


def test_the_floor_and_the_levers_are_printed_for_both_cards(capsys):
    print_levers()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert [name for name, *_ in rows] == ["likely", "floor", *LEVERS]
    likely, floor = ([int(cell[:-1]) for cell in row[1:]] for row in rows[:2])
    assert all(low < high for low, high in zip(floor, likely, strict=True))


def test_this_cpus_row_has_a_measured_and_a_predicted_speed(monkeypatch, capsys):
    row = Row(1, 32, 2, 48, cap=32, tokens=64, rows=2, vocab=2048)
    # Nothing is compiled.
    monkeypatch.setattr(contenders, "resolve", lambda *arguments, **options: torch_ops())
    monkeypatch.setattr(this_cpu, "COPIED", 1 << 20)
    monkeypatch.setattr(this_cpu, "ROWS", {this_cpu.QUICKSTART: row})
    [difference] = this_cpu.compare(quick=True).values()
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    measured, predicted = (float(cell.replace(",", "")) for cell in cells[2:4])
    assert measured > 0
    assert difference == pytest.approx(predicted / measured - 1, rel=0.02)
