"""One API for whatever a user holds: every entry point on every kind of live model, with the plain one's numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnsight
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headscope.interp import heads, load_model, plots, sweep, trace
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.discovery import discover
from headscope.interp.models import LanguageModel, output_projections
from headscope.interp.prompts import decode, prefill
from headscope.interp.statistics import Entropy, KeyMass
from headscope.interp.tracing.maps import head_pattern, patterns
from headscope.interventions import AblateHeads, NeedleTask, TextLoss, apply, evaluate, head_means
from headscope.probes import Labelled, head_outputs, logit_attribution, probe_heads

PROMPT = "The brass key is under the flowerpot."
TEXTS = [PROMPT, "Where is it?", "It is under it.", "No key is here.", "A key.", "It.", "One key", "None here"]
DATA = Labelled(TEXTS, np.array([1, 0, 0, 1, 1, 0, 1, 0]))
BOUND = 1e-5  # as for records through a site: float32's rounding of two implementations of one attention


class Adapted(nn.Module):
    """Around a model as PEFT is: its own forward and generate, the transformers model by ``get_base_model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)


class Holds(nn.Module):
    """A user's module around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.body = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body(ids).logits


def tokenizer_of_bytes(**options: Any) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<eos>"])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", **options)


def bridge(model: Any, tokenizer: Any) -> Any:
    """A TransformerBridge; it changes its model in place, and lets the end of a text also begin one."""
    name = type(model).__name__
    own = tokenizer_of_bytes()  # without a beginning: it reads one that has one anew from the hub
    made = build_bridge_from_module(model, name, hf_config=model.config, tokenizer=own)
    assert made.tokenizer.bos_token_id == tokenizer.bos_token_id
    return made


WITH_TOKENIZER = {
    "bridge": bridge,
    "nnsight.TransformersModel": lambda model, words: nnsight.TransformersModel(model, tokenizer=words),
    "nnsight.LanguageModel": lambda model, words: nnsight.LanguageModel(model, tokenizer=words),
}
WITHOUT = {
    "bare": lambda model: model,
    "compiled": torch.compile,
    "adapted": Adapted,
    "data parallel": nn.DataParallel,
    "held": Holds,
    "nnsight.NNsight": nnsight.NNsight,
}
REFUSED = {("bridge", "logit_attribution"): "load the model with load_model or transformers"}


def everything(model: Any, folder: Path) -> dict[str, Callable[[], Any]]:
    """Every entry point that takes a model and a prompt, as arrays or numbers."""
    quiet = {"progress": False}
    tasks = [NeedleTask(lengths=[700], depths=[50], needles=1, max_new_tokens=2), TextLoss(passages=1, length=32)]
    evaluation = folder / "evaluation"
    return {
        "heads": lambda: heads.induction(model, length=8, samples=2, **quiet).trials,
        "heads on texts": lambda: heads.sinks(model, samples=2, length=16, **quiet).trials,
        "discover": lambda: discover([heads.METHODS["previous_token"](samples=2)], model, **quiet)[0].trials,
        "retrieval": lambda: (
            heads.retrieval(
                model, lengths=[700], depths=[50], needles=1, max_new_tokens=2, threshold=-1.0, **quiet
            ).trials
        ),
        "evaluate": lambda: (
            evaluate(model, tasks, AblateHeads([(0, 1)]), controls=1, out=evaluation, **quiet)
            .trials["score"]
            .to_numpy()
        ),
        "head_pattern": lambda: head_pattern(model, PROMPT, 1, 2)[0],
        "patterns": lambda: patterns(model, PROMPT)[0],
        "head_on_prompt": lambda: np.nan_to_num(plots.head_on_prompt(model, PROMPT, 1, 2, log=False).data[0].z),
        "sweep": lambda: sweep(model, TEXTS, [Entropy(), KeyMass()], out=folder / "sweep", **quiet)[
            "entropy"
        ].to_numpy(),
        "head_outputs": lambda: head_outputs(model, TEXTS, **quiet),
        "probe_heads": lambda: probe_heads(model, DATA, seeds=[0], validation=0.5, **quiet).scores.trials,
        "logit_attribution": lambda: logit_attribution(model, TEXTS, list(range(5, 13)), **quiet).trials,
        "head_means": lambda: head_means(model, TEXTS).numpy(),
        "trace": lambda: traced(load_model(model)),
        "apply": lambda: edited(load_model(model)),
        "generate": lambda: generated(load_model(model)),
        "decode": lambda: decoded(load_model(model)),
    }


def traced(lm: LanguageModel) -> Any:
    with trace(lm, [Entropy()]) as tracer:
        lm(TEXTS)
    return tracer.record["entropy"].to_numpy()


def edited(lm: LanguageModel) -> Any:
    with apply(lm, AblateHeads([(0, 1), (1, 3)])):
        return lm([PROMPT]).logits.numpy()


def generated(lm: LanguageModel) -> Any:
    with apply(lm, AblateHeads([(0, 1)], during="answer")), trace(lm, [Entropy()]) as tracer:
        assert len(lm.generate(PROMPT, max_new_tokens=3)) == 1
    return tracer.record["entropy"].to_numpy()


def decoded(lm: LanguageModel) -> Any:
    ids = lm.encode([PROMPT])["input_ids"][0].tolist()
    return np.array(decode(lm, prefill(lm, ids[:-1]), ids[-1], 3))


NAMES = list(everything(None, Path()))


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer_of_bytes(bos_token="<eos>")


@pytest.fixture(scope="module")
def plain() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    grouped = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    ids = {"eos_token_id": 256, "bos_token_id": 256, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, initializer_range=0.3, **sizes, **grouped, **ids)).eval()


@pytest.fixture(scope="module")
def wanted(plain: Any, words: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    lm = load_model(plain, tokenizer=words)
    return {name: run() for name, run in everything(lm, tmp_path_factory.mktemp("plain")).items()}


@pytest.fixture(scope="module", params=[*WITH_TOKENIZER, *WITHOUT])
def live(request: pytest.FixtureRequest, plain: Any, words: Any) -> Any:
    """One kind of live model, by its name: what a user gives, with load_model's tokenizer where it brings none."""
    own = copy.deepcopy(plain)
    if request.param in WITH_TOKENIZER:
        return request.param, WITH_TOKENIZER[request.param](own, words)
    return request.param, load_model(WITHOUT[request.param](own), tokenizer=words)


@pytest.mark.parametrize("entry", NAMES)
def test_every_entry_point_gives_the_plain_models_numbers(live: Any, wanted: Any, entry: str, tmp_path: Path) -> None:
    kind, model = live
    if (kind, entry) in REFUSED:
        with pytest.raises(HeadscopeError, match=REFUSED[kind, entry]):
            everything(model, tmp_path)[entry]()
        return
    found = everything(model, tmp_path)[entry]()
    assert np.shape(found) == np.shape(wanted[entry])
    np.testing.assert_allclose(found, wanted[entry], rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("entry", NAMES)
@pytest.mark.parametrize("kind", ["bare", "adapted", "nnsight.NNsight"])
def test_without_a_tokenizer_it_runs_or_says_what_to_give(
    plain: Any, wanted: Any, kind: str, entry: str, tmp_path: Path
) -> None:
    model = WITHOUT[kind](copy.deepcopy(plain))
    try:
        found = everything(model, tmp_path)[entry]()
    except HeadscopeError as error:
        assert "tokenizer= to load_model" in str(error) and "\n" not in str(error)
    else:
        assert entry in ("heads", "discover")
        np.testing.assert_allclose(found, wanted[entry], rtol=BOUND, atol=BOUND)


def test_what_load_model_makes_of_them(plain: Any, words: Any) -> None:
    for make in WITH_TOKENIZER.values():
        given = make(copy.deepcopy(plain), words)
        lm = load_model(given)
        assert lm.tokenizer is given.tokenizer and type(lm.inner) is LlamaForCausalLM and load_model(lm) is lm
        other = copy.copy(words)
        assert load_model(given, tokenizer=other).tokenizer is other
        assert "LlamaForCausalLM" in repr(lm) and lm.info.parameters == load_model(plain).info.parameters
    adapted = Adapted(copy.deepcopy(plain))
    assert load_model(adapted).model is adapted and load_model(Holds(plain)).model is plain
    assert output_projections(load_model(adapted)) == output_projections(plain)


def test_the_inside_of_a_bridge_says_to_give_the_bridge(plain: Any, words: Any) -> None:
    made = bridge(copy.deepcopy(plain), words)
    with pytest.raises(HeadscopeError, match="give the bridge itself"), trace(made.original_model, [Entropy()]):
        raise AssertionError("the block must not run")
