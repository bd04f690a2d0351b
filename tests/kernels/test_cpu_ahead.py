"""Operations compiled ahead of training: one call of the C++ compiler, and nothing is left to compile in training."""

import pytest
import torch
from torch._inductor import codecache, cpu_vec_isa

from megabert.kernels.cpu import ahead
from megabert.kernels.resolve import cpu_ops
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.model.ops import TORCH_OPS

SMALL = {"vocab_size": 83, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


def step(config: MegaBertConfig, tokens: int, masked: int) -> list[float]:
    """Return the loss of a training step, the sum of the gradients, and the loss in evaluation."""
    torch.manual_seed(3)
    model = MegaBertForMaskedLM(config)
    set_ops(model, cpu_ops(config, True)[0])
    ids = (torch.arange(tokens) % config.vocab_size).int()
    rows, bounds = torch.arange(masked).int(), torch.tensor([0, 9, tokens]).int()
    found = []
    for training in (True, False):
        model.train(training)
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
            found.append(model.masked_loss(ids, ids, bounds, tokens, rows, rows).loss_sum)
    found[0].backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    total = sum(gradient.double().sum().item() for gradient in gradients)
    return [found[0].item(), total, found[1].item()]


@pytest.fixture
def compiler_calls(monkeypatch) -> list[str]:
    """What each call of the C++ compiler compiles."""
    calls: list[str] = []
    original = codecache.CppCodeCache.load_async.__func__

    def load_async(cls, main_code: str, *arguments, **options):
        calls.append(main_code)
        return original(cls, main_code, *arguments, **options)

    monkeypatch.setattr(codecache.CppPythonBindingsCodeCache, "load_async", classmethod(load_async))
    return calls


ARCHITECTURES = [
    {},
    {"hidden_dropout_prob": 0.0, "type_vocab_size": 0},
    {"position": "rope", "norm_position": "pre", "z_loss": 1e-4},
    {"position": "learned", "ffn": "gelu", "layer_norm_dtype": "float32"},
]
FIRST, *OTHERS = ARCHITECTURES


@pytest.mark.parametrize("changes", [FIRST, *(pytest.param(each, marks=pytest.mark.nightly) for each in OTHERS)])
def test_training_and_evaluating_need_no_graph_that_was_not_traced_ahead(changes):
    """Random numbers stay as they are."""
    config = MegaBertConfig(**SMALL, num_hidden_layers=3, **changes)
    torch._dynamo.reset()
    before = torch.get_rng_state()
    with torch.compiler.set_stance("default", force_backend="eager"):
        torch._dynamo.utils.counters.clear()
        ahead.compile_ahead(config, cpu_ops(config, True)[0], True, tokens=61, masked=13)
        traced = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert torch.equal(torch.get_rng_state(), before)
        for tokens, masked in ((61, 13), (45, 7)):
            step(config, tokens, masked)
    assert 0 < traced == torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.compiler
def test_kernels_of_several_graphs_become_one_library(compiler_calls):
    """Their calls do nothing as long as graphs are collected."""
    double, less = (torch.compile(function, dynamic=True) for function in (lambda x: 2 * x, lambda x: x.exp() - 1))
    x = torch.arange(1.0, 40.0)
    kernels = ahead.Kernels()
    with kernels.collected():
        double(x), less(x)
    assert len(kernels.sources) == 2
    assert len(compiler_calls) == 1
    torch.testing.assert_close(less(x), x.exp() - 1)
    assert torch.equal(double(x[:7]), 2 * x[:7])
    assert len(compiler_calls) == 1


@pytest.mark.nightly
@pytest.mark.compiler
@pytest.mark.parametrize("changes", ARCHITECTURES)
def test_code_that_is_compiled_at_once_has_the_results_of_separate_code(compiler_calls, changes):
    config = MegaBertConfig(**SMALL, num_hidden_layers=3, **changes)
    torch._dynamo.reset()
    ahead.compile_ahead(config, cpu_ops(config, True)[0], True, tokens=61, masked=13)
    together = [step(config, tokens, masked) for tokens, masked in ((61, 13), (45, 7))]
    assert len(compiler_calls) == 1
    torch._dynamo.reset()
    separate = [step(config, tokens, masked) for tokens, masked in ((61, 13), (45, 7))]
    assert len(compiler_calls) > 5
    assert together == separate


def test_plain_operations_are_not_compiled(compiler_calls):
    ahead.compile_ahead(MegaBertConfig(**SMALL), TORCH_OPS, True, 61, 13)
    assert not compiler_calls


def test_vectors_are_chosen_without_a_test_as_inductor_would_choose_them(monkeypatch):
    """The compiler must know the flags; where vectors are named, inductor looks itself."""
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", original := cpu_vec_isa.valid_vec_isa_list)
    choose = ahead.skip_tests_of_this_cpu.__wrapped__
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["avx2", "avx512", "avx512_vnni"])
    monkeypatch.setattr(ahead, "compiler_accepts", lambda flags: True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATEN_CPU_CAPABILITY", "avx2")
        choose()
    assert cpu_vec_isa.valid_vec_isa_list is original
    choose()
    assert str(cpu_vec_isa.pick_vec_isa()) == "avx512 avx512_vnni"
    assert cpu_vec_isa.pick_vec_isa()
    monkeypatch.setattr(ahead, "compiler_accepts", lambda flags: "-mavx512f" not in flags)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    choose()
    assert str(cpu_vec_isa.pick_vec_isa()) == "avx2"


@pytest.mark.compiler
def test_a_compiler_that_does_not_know_a_flag_is_noticed():
    assert ahead.compiler_accepts([])
    assert not ahead.compiler_accepts(["-mno-such-vectors"])
