"""torch.compile and static caches: a block has the uncompiled model's numbers, and the graphs come back after it.

``Graphs`` is a compiler backend that counts what it compiles and how often it runs, so that a test can tell whether
compiled code ran, stood aside, or was compiled anew.
"""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig

from headscope.interp import load_model, trace
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import output_projections
from headscope.interp.sites import attached, verify
from headscope.interp.sites.compiled import uncompiled
from headscope.interp.sites.unwrap import bare_model
from headscope.interp.statistics import Distance, Entropy, KeyMass, LogSumExp, SinkMass, TopKeys
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import AblateHeads, Composed, ScaleHeads, apply
from headscope.kernels import flex

STATISTICS = [LogSumExp(), Entropy(), SinkMass(first=2), KeyMass(), TopKeys(2), Distance()]


class Graphs:
    """A backend for torch.compile: ``made`` graphs so far, ``ran`` calls of them."""

    def __init__(self) -> None:
        self.made = self.ran = 0

    def __call__(self, graph, inputs, **_):
        self.made += 1

        def run(*args):
            self.ran += 1
            return graph(*args)

        return run

    def __deepcopy__(self, _):
        return self  # transformers copies its CompileConfig


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tokens(length: int = 12, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 60, (2, length), generator=torch.Generator().manual_seed(seed))


def largest_difference(one, other) -> float:
    assert set(one.data_vars) == set(other.data_vars)
    return max(float(abs(one[name] - other[name]).fillna(0).max()) for name in one.data_vars)


def compile_wrapper(model, graphs, **options):
    return torch.compile(model, backend=graphs, **options)


def compile_in_place(model, graphs, **options):
    model.compile(backend=graphs, **options)
    return model


def compile_forward(model, graphs, **options):
    model.forward = torch.compile(model.forward, backend=graphs, **options)
    return model


def compile_base(model, graphs, **options):
    model.model = torch.compile(model.model, backend=graphs, **options)
    return model


def compile_layers(model, graphs, **options):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend=graphs, **options)
    return model


WAYS = [compile_wrapper, compile_in_place, compile_forward, compile_base, compile_layers]


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_is_traced_uncompiled_and_its_graphs_run_again_afterwards(way, fullgraph):
    twin, graphs = tiny_model("llama"), Graphs()
    model = way(tiny_model("llama"), graphs, fullgraph=fullgraph)
    with torch.no_grad():
        compiled = model(tokens()).logits  # compiled before anything was attached: the old attention is in the graph
    made, ran = graphs.made, graphs.ran
    assert made > 0 and ran > 0
    with trace(model, STATISTICS) as tracer:
        traced = model(tokens()).logits
    assert (graphs.made, graphs.ran) == (made, ran)
    with trace(twin, STATISTICS) as plain:
        expected = twin(tokens()).logits
    assert torch.equal(traced, expected)
    assert largest_difference(tracer.record, plain.record) == 0.0
    assert tracer.record.attrs["module"] == plain.record.attrs["module"]
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, compiled)
    assert graphs.made == made and graphs.ran == 2 * ran


@pytest.mark.parametrize("way", WAYS)
def test_edits_of_a_compiled_model(way):
    twin = tiny_model("llama")
    model = way(tiny_model("llama"), Graphs(), fullgraph=True)
    heads = AblateHeads([(0, 1), (1, 2)])
    with torch.no_grad():
        before = model(tokens()).logits
    with apply(model, heads):
        edited = model(tokens()).logits
    with apply(twin, heads):
        expected = twin(tokens()).logits
    assert torch.equal(edited, expected)
    assert float((edited - before).abs().max()) > 1e-2
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, before)


def test_a_function_that_calls_the_model_may_be_compiled():
    model, graphs = tiny_model("llama"), Graphs()
    loss = torch.compile(lambda ids: model(ids).logits.logsumexp(-1).mean(), backend=graphs, fullgraph=True)
    with torch.no_grad():
        outside = loss(tokens())
    ran = graphs.ran
    with trace(model, [Entropy()]) as tracer:
        inside = loss(tokens())
    assert graphs.ran == ran == 1
    assert tracer.record.sizes["layer"] == 2
    assert abs(float(inside - outside)) < 1e-5


def test_compiled_code_comes_back_after_an_exception_and_after_blocks_that_end_in_any_order():
    model, graphs = compile_in_place(tiny_model("llama"), graphs := Graphs()), graphs
    other = tiny_model("gpt2")
    with pytest.raises(ZeroDivisionError):
        with trace(model, [Entropy()]):
            model(tokens())
            raise ZeroDivisionError
    first, second = attached(model, Handler()), attached(other, Handler())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # not in the order of nesting
    model(tokens())
    assert graphs.ran == 0
    second.__exit__(None, None, None)
    with torch.no_grad():
        model(tokens())
    assert graphs.ran == 1


def test_a_stance_of_the_users_own_comes_back():
    model, graphs = compile_in_place(tiny_model("llama"), graphs := Graphs()), graphs
    with torch.compiler.set_stance("force_eager"):
        with trace(model, [Entropy()]):
            model(tokens())
        model(tokens())
        assert graphs.made == 0
    with torch.compiler.set_stance("fail_on_recompile"):
        with trace(model, [Entropy()]):
            model(tokens())
        with pytest.raises(RuntimeError, match="recompile"):
            model(tokens())


def test_a_block_inside_compiled_code_says_so_before_anything_runs():
    model = tiny_model("llama")
    assert verify(model).passed

    @torch.compile(backend=Graphs())
    def inside(ids):
        with attached(model, Handler()):
            return model(ids).logits

    with pytest.raises(HeadscopeError, match="put the `with` block around"):
        inside(tokens())
    with uncompiled():  # the failed block left nothing held
        pass
    graphs = Graphs()
    torch.compile(lambda x: x + 1, backend=graphs)(torch.ones(1))
    assert graphs.ran == 1


def test_our_own_compiled_kernel_stays_compiled(monkeypatch):
    """FlexAttention is dense when it runs uncompiled."""
    graphs = Graphs()
    monkeypatch.setattr(flex, "_compiled", lambda: torch.compile(lambda x: 2 * x, backend=graphs))
    with uncompiled():
        assert torch.equal(flex._fused(torch.ones(2)), torch.full((2,), 2.0))
    assert graphs.ran == 1


@pytest.mark.slow
def test_an_exported_model_is_refused_when_it_runs_not_recorded_as_nothing():
    model = tiny_model("llama")
    assert verify(model).passed
    with torch.no_grad():
        exported = torch.export.export(model, (), {"input_ids": tokens(), "use_cache": False}).module()
        expected = model(input_ids=tokens(), use_cache=False).logits
        model.forward = lambda **inputs: exported(**inputs)  # verified before it was exported
        assert torch.allclose(model(input_ids=tokens(), use_cache=False).logits, expected, atol=1e-5)
    with pytest.raises(HeadscopeError, match="ran without calling its attention"):
        with trace(model, [Entropy()]):
            model(input_ids=tokens(), use_cache=False)


def test_load_model_takes_a_compiled_model_without_its_wrapper():
    inner = tiny_model("llama")
    wrapped = torch.compile(inner, backend=Graphs())
    lm = load_model(wrapped)
    assert lm.model is inner is bare_model(wrapped)
    assert lm.info.architecture == "LlamaForCausalLM"
    assert output_projections(wrapped) == output_projections(inner)


def generate(model, ids, mask, **options):
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **settings, **options)


def padded(length: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokens(length)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids, mask


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_generation_that_compiles_itself(architecture):
    """What ``generate`` does with a static cache on a GPU, asked for here by its ``compile_config``."""
    model, graphs, (ids, mask) = tiny_model(architecture), Graphs(), padded()
    compiling = CompileConfig(backend=graphs, fullgraph=True)
    compiling._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiling}
    untraced = generate(model, ids, mask, **options)
    made, ran = graphs.made, graphs.ran
    assert made > 0 and ran == 9  # every step after the prompt
    with trace(model, STATISTICS) as tracer:
        traced = generate(model, ids, mask, **options)
    assert (graphs.made, graphs.ran) == (made, ran)
    assert torch.equal(traced, untraced)
    with trace(model, STATISTICS) as plain:
        generate(model, ids, mask)
    assert largest_difference(tracer.record, plain.record) < 1e-5
    generate(model, ids, mask, **options)
    assert graphs.made == made and graphs.ran == 2 * ran


@pytest.mark.parametrize("block", ["trace", "apply", "composed"])
def test_what_nobody_reads_or_changes_stays_compiled(block: str) -> None:
    """``generate`` compiles for a static cache on a GPU: run as plain Python, its tokens would differ by rounding."""
    model, runs = tiny_model("llama"), []

    def backend(graph, inputs):
        def run(*args):
            runs.append(len(args))
            return graph(*args)

        return run

    forward = torch.compile(model, backend=backend)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        forward(input_ids=ids, use_cache=False)
    compiled = len(runs)
    assert compiled > 0
    off = AblateHeads([(0, 1)], strength=0)
    edit = Composed([off, ScaleHeads([(1, 1)], 3.0, strength=0)]) if block == "composed" else off
    nothing = trace(model, STATISTICS, layers=[]) if block == "trace" else apply(model, edit)
    with nothing:
        forward(input_ids=ids, use_cache=False)
    assert len(runs) == 2 * compiled
    with trace(model, STATISTICS):
        forward(input_ids=ids, use_cache=False)
    assert len(runs) == 2 * compiled


def test_no_layers_record_nothing_and_say_so() -> None:
    model = tiny_model("llama")
    with trace(model, STATISTICS, layers=[]) as tracer, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 8]]))
    with pytest.raises(HeadscopeError, match="layers=\\[\\] reads none"):
        _ = tracer.record
