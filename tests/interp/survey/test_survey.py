"""The sweep over architectures, and the table it left."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest

from headscope.interp.errors import HeadscopeError
from headscope.interp.survey import run as module
from headscope.interp.survey.run import check_type, model_types, sweep
from headscope.interp.survey.shrink import HEADS, shrink
from headscope.interp.survey.table import BEGIN, END, FOLDER, NAMED, README, Finding, Support, readme_block, to_markdown
from headscope.interp.survey.tiny import tiny_config, tiny_model


def test_each_outcome_is_told_apart():
    assert check_type("causal-lm", "llama").outcome == "right"
    refused = check_type("causal-lm", "falcon")
    assert refused.outcome == "refused" and "FalconForCausalLM" in refused.why
    assert check_type("image-text", "perception_lm").outcome in ("not buildable", "right")  # right where timm is there
    assert check_type("causal-lm", "musicgen").outcome == "not buildable"


def test_a_wrong_statistic_is_found(monkeypatch):
    from headscope.interp.attention import call as attention

    right = attention.AttentionCall.attend

    def wrong(self, request):
        seen = right(self, request)
        if seen.entropy is not None:
            seen.entropy = seen.entropy * 1.01
        return seen

    monkeypatch.setattr(attention.AttentionCall, "attend", wrong)
    found = check_type("causal-lm", "llama")
    assert found.outcome == "wrong" and "entropy differs" in found.why


def test_a_crash_or_a_hang_ends_only_its_own_check(monkeypatch):
    monkeypatch.setattr(module, "check_type", lambda kind, name: 1 / 0)
    found = module.check_apart("causal-lm", "llama")
    assert found.outcome == "wrong" and "ZeroDivisionError" in found.why
    monkeypatch.setattr(module, "check_type", lambda kind, name: __import__("time").sleep(60))
    assert "more than 1 s" in module.check_apart("causal-lm", "llama", timeout=1.0).why


def test_sweep_reports_each_type_and_writes_a_row():
    seen: list[Finding] = []
    found = sweep(["causal-lm"], ["gpt2", "bloom"], report=seen.append)
    assert found == seen and [f.model_type for f in found] == ["bloom", "gpt2"]
    written = to_markdown(Support.of(found))
    row = "| gpt2 | right | `transformer.h.*.attn` | text | optional inputs left out; large logits; "
    assert row + "generation padded left; generation padded right (refused); edit |" in written
    assert "| bloom | refused | BloomForCausalLM (bloom) is refused" in written
    assert "| causal-lm | 1 | 1 | 0 | 0 |" in written


def test_rows_are_replaced_by_newer_ones_of_the_same_libraries():
    old = Support.of([Finding("causal-lm", "gpt2", "right"), Finding("encoder", "gpt2", "right")])
    new = Finding("causal-lm", "gpt2", "refused", "why")
    assert old.updated([new]).findings == [new, old.findings[1]]
    with pytest.raises(HeadscopeError, match="sweep everything"):
        Support({"transformers": "0", "torch": "0"}, old.findings).updated([new])


# what a fault would be, and the comparison that must see it
FAULTS = {
    "optional inputs left out": lambda call: call.mask.start is None and call.mask.query_offset == 0,
    "large logits": lambda call: float((call.query[:, :, -1] * call.scale).norm(dim=-1).max()) > 3,
    "generation padded left": lambda call: call.mask.query_offset > 0 and call.mask.start is not None,
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_further_comparison_finds_its_fault(name, monkeypatch):
    """A sound record, spoiled only where this comparison looks."""
    from headscope.interp.attention import call as attention
    from headscope.interp.sites.inputs import example_inputs
    from headscope.interp.survey.further import COMPARISONS

    model = tiny_model("llama")
    inputs = example_inputs(model)
    assert COMPARISONS[name](model, inputs, None) is None
    right = attention.AttentionCall.attend

    def wrong(self, request):
        seen = right(self, request)
        if seen.entropy is not None and FAULTS[name](self):
            seen.entropy = seen.entropy + 0.5
        return seen

    monkeypatch.setattr(attention.AttentionCall, "attend", wrong)
    assert "entropy differs" in COMPARISONS[name](model, inputs, None)


def test_an_edit_of_another_head_and_one_in_too_few_layers_are_found(monkeypatch):
    from headscope.interp.sites.inputs import example_inputs
    from headscope.interp.survey import further
    from headscope.interp.survey.tiny import tiny_model as rebuilt

    model = tiny_model("bart", "encoder-decoder")
    inputs = example_inputs(model)
    deeper = lambda **sizes: rebuilt("bart", "encoder-decoder", **sizes)  # noqa: E731
    assert further.edited(model, inputs, None) is None and further.unequal_depths(model, inputs, deeper) is None
    assert deeper(decoder_layers=3).config.decoder_layers == 3
    monkeypatch.setattr(further._Zeroes, "edit_output", lambda self, call, z: z * 1.0)
    assert "zeroed: the output differs" in further.edited(model, inputs, None)
    assert "zeroed: the output differs" in further.unequal_depths(model, inputs, deeper)


def test_the_committed_table_holds_nothing_wrong_and_every_named_architecture():
    findings = Support.read().findings
    count = Counter(f.outcome for f in findings)
    assert count["wrong"] == 0 and count["right"] > 300
    right = {(f.kind, f.model_type) for f in findings if f.outcome == "right"}
    refused = {f.model_type for f in findings if f.outcome == "refused"}
    own_code = {"falcon", "bloom", "mpt", "gptj", "gpt_neo", "codegen"}
    assert own_code <= refused
    assert {(kind, name) for _, kind, names in NAMED for name in names.split() if name not in own_code} <= right
    assert {f.kind for f in findings} == {"causal-lm", "image-text", "encoder", "encoder-decoder"}


def test_named_models_of_images_and_text_were_given_images_in_both_towers():
    _, kind, names = NAMED[-1]
    found = {f.model_type: f for f in Support.read().findings if f.kind == kind}
    for name in names.split():
        towers = " ".join(found[name].towers)
        assert found[name].inputs == "text and images" and found[name].eager
        assert "visi" in towers or "visual" in towers, name
        assert "language_model" in towers or "text_model" in towers, name


def test_the_tables_are_those_of_the_committed_findings(tmp_path):
    """SUPPORT.md and the README say what SUPPORT.json holds: nobody typed them."""
    support = Support.read()
    shutil.copy(README, tmp_path / "README.md")
    support.write(tmp_path, tmp_path / "README.md")
    for path in (FOLDER / "SUPPORT.json", FOLDER / "SUPPORT.md", README):
        assert (tmp_path / path.name).read_text() == path.read_text(), f"{path.name}: run the sweep with --tables"


def test_the_readme_block_is_replaced_between_its_marks_only(tmp_path):
    findings = [
        Finding("causal-lm", "llama", "right", towers={"model.layers.*.self_attn": [0]}),
        Finding("causal-lm", "falcon", "refused", "its own"),
        Finding("image-text", "llava", "right", towers={"language": [0]}),
    ]
    support = Support({"transformers": "9.9", "torch": "8.8"}, findings)
    block = readme_block(support)
    assert "| language | llama; not buildable: llama4, mistral" in block and "| falcon |" in block
    assert "llava (language tower only)" in block
    assert (
        "| every model type of transformers 9.9 (0 could not be built or run tiny; silently wrong: 0) | 2 | 1 |"
        in block
    )
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    support.write(tmp_path, readme)
    assert readme.read_text() == f"before\n{block}\nafter\n"
    assert Support.read(tmp_path / "SUPPORT.json") == support
    readme.write_text("no marks\n")
    with pytest.raises(HeadscopeError, match="needs the lines"):
        support.write_tables(tmp_path, readme)


@pytest.mark.parametrize("name", ["aria", "fuyu", "gemma4", "mllama", "muse_glimmer", "vipllava"])
def test_images_in_every_form(name):
    """Patches to tokens, rows of patches, positions beside them, tiles with aspect ratios, merged patches, layers."""
    found = check_type("image-text", name)
    assert found.outcome == "right" and found.inputs == "text and images" and found.eager, found


def test_the_kinds_list_transformers_types():
    assert {"llama", "gpt2"} <= set(model_types("causal-lm"))
    assert (
        "llava" in model_types("image-text")
        and "bert" in model_types("encoder")
        and "t5" in model_types("encoder-decoder")
    )


def test_shrinking_keeps_one_layer_of_each_kind_and_grouped_heads():
    small = shrink(
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "image_token_id": 99999,
            "eos_token_id": 2,
        }
    )
    assert small["layer_types"] == ["sliding_attention", "full_attention"] and small["num_hidden_layers"] == 2
    assert small["num_attention_heads"] == HEADS and small["num_key_value_heads"] < HEADS
    assert small["sliding_window"] <= 8 and small["image_token_id"] < 128 and small["eos_token_id"] == 2


def test_tiny_models_are_tiny_and_repeatable():
    import torch

    before = torch.random.get_rng_state()
    one, two, other = tiny_model("llama"), tiny_model("llama"), tiny_model("llama", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sum(p.numel() for p in one.parameters()) < 1_000_000
    pairs = list(zip(one.parameters(), two.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("nosuch", "causal-lm", "no model type"),
        ("bert", "image-text", "no image-text"),
        ("llama", "x", "kind is one of"),
    ],
)
def test_what_does_not_exist_is_named(name, kind, why):
    with pytest.raises(HeadscopeError, match=why):
        tiny_model(name, kind)
    if name == "nosuch":
        with pytest.raises(HeadscopeError, match=why):
            tiny_config(name)
