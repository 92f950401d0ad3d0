"""Head discovery: scores against eager attention weights of the untouched model, models with known heads, bad input.

Tolerance: a score is a mean of float32 softmax weights. Two correct implementations differ by about eps (1.2e-7) times
the size of the scores before softmax (up to about 10 here), twice over, in each of up to 4 layers: 1e-5.
"""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from headscope.interp import heads, load_model
from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts import sequences
from headscope.interp.prompts.tokens import bos_tokens, random_tokens, start_tokens
from headscope.interp.results.scores import HeadScores

TOLERANCE = 1e-5
TARGETED = ("induction", "previous_token", "duplicate_token")
WORDS, BOS, ADDED = 60, 60, 61  # ids of ordinary words are 0..59; the models have 64 rows
TEXTS = [
    "w1 w2 w3 w1 w2 w4 w4 w5 w1 w2 w9 w3 w1 w8 w8 w8 w2 w7 w6 w5 w1 w2 w3 w4 w0 w9 w3 w1",
    "w7 w7 w1 w0 w7 w3 w2 w7 w3 w1 w1 w5 w0 w2 w7 w3 w9 w7 w2 w2 w5 w6 w0",
]
PROSE = [
    "The old lighthouse keeper climbed the stairs every evening, counting the steps aloud so that he would not forget "
    "how many there were. At the top he cleaned the glass, lit the lamp, and wrote the weather in a small green book. "
    "When the fog came in, he rang the bell once a minute until the morning, and nobody ever thanked him for it.",
    "Most bridges in the city were built within twenty years of each other, when stone was cheap and engineers were "
    "not. The river has since moved a little to the south, so that two of the bridges now cross a park, and the "
    "children who play beneath them believe that they were put there to keep the rain away from the swings.",
    "To make the soup, cut three onions and let them cook slowly in butter until they are soft and brown. Add the "
    "flour, stir for a minute, then pour in the broth and let it boil for half an hour. Taste it before you add any "
    "salt. Serve it in warm bowls with toasted bread on top, and grate as much cheese over it as you dare to use.",
    "A letter from the company arrived on Tuesday, and it said that the machine would be repaired free of charge if "
    "the fault had been present from the beginning. Nobody could remember the beginning. The machine had always made "
    "that noise, and everyone in the office had learned to pause, in the middle of a sentence, until it was over.",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0..w59, a BOS that it puts before every text, an added token."""
    vocabulary = {f"w{i}": i for i in range(WORDS)} | {"<s>": BOS}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    made = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", pad_token="<s>")
    made.add_tokens(["<added>"])
    return made


def build(kind: str):
    """A tiny random model whose attention is far from uniform (wide weights), in float32."""
    torch.manual_seed(1)
    common = dict(vocab_size=64, bos_token_id=BOS, eos_token_id=None, pad_token_id=None, initializer_range=0.3)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=128, **common))
    elif kind == "llama":
        config = LlamaConfig(num_hidden_layers=2, max_position_embeddings=128, **sizes, **common)
        model = LlamaForCausalLM(config)
    else:
        kinds = ["sliding_attention", "full_attention"] * 2
        config = Gemma3TextConfig(
            num_hidden_layers=4,
            layer_types=kinds,
            sliding_window=16,
            query_pre_attn_scalar=8,
            max_position_embeddings=128,
            **sizes,
            **common,
        )
        model = Gemma3ForCausalLM(config)
    return load_model(model.eval(), tokenizer=tokenizer())


def eager(lm, ids: torch.Tensor) -> np.ndarray:
    """The untouched model's own attention weights, one sequence at a time: (sample, layer, head, query, key)."""
    model = copy.deepcopy(lm.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = [torch.cat(model(one[None], output_attentions=True).attentions) for one in ids]
    return torch.stack(found).double().numpy()


def wanted_key(method: str, ids: list[int], query: int) -> int | None:
    """The key that a method looks at, by its definition in words."""
    if method == "previous_token":
        return query - 1 if query else None
    earlier = [j for j in range(query) if ids[j] == ids[query]]
    if not earlier:
        return None
    if method == "duplicate_token":
        return earlier[-1]
    return earlier[-1] + 1 if earlier[-1] + 1 < query else None


def by_definition(method: str, pattern: np.ndarray, ids: list[int]) -> np.ndarray:
    """One sample's scores (layer, head) from its pattern (layer, head, query, key)."""
    keys = [(query, wanted_key(method, ids, query)) for query in range(len(ids))]
    return np.mean([pattern[:, :, query, key] for query, key in keys if key is not None], axis=0)


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2"])
def tiny(request: pytest.FixtureRequest):
    return build(request.param)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.mark.parametrize("method", TARGETED)
def test_scores_on_repeated_random_tokens_are_eager_attention(tiny, method: str) -> None:
    n, samples = 20, 5
    scores = heads.method(method)(tiny, length=n, samples=samples, batch=2, seed=3, progress=False)
    ids = torch.stack([s.ids for s in sequences.repeated_samples(tiny, n, samples, 3, bos=True)])
    assert ids[:, 0].tolist() == [BOS] * samples and torch.equal(ids[:, 1 : n + 1], ids[:, n + 1 :])
    offset = {"induction": n - 1, "previous_token": 1, "duplicate_token": n}[method]
    queries = np.arange(1, 2 * n + 1) if method == "previous_token" else np.arange(n + 1, 2 * n + 1)
    pattern = eager(tiny, ids)
    expected = pattern[..., queries, queries - offset].mean(axis=-1)
    np.testing.assert_allclose(scores.trials, expected, rtol=0, atol=TOLERANCE)
    beside = pattern[..., queries, queries - offset - 1].mean(axis=-1)
    assert abs(beside - expected).max() > 100 * TOLERANCE  # one key off would be seen
    assert [d["queries"] for d in scores.details] == [len(queries)] * samples
    assert len(np.unique(scores.groups)) == samples


@pytest.mark.parametrize("method", TARGETED)
def test_scores_on_text_are_eager_attention(tiny, method: str) -> None:
    scores = heads.method(method)(tiny, texts=TEXTS, window=12, samples=3, batch=2, progress=False)
    # each window is BOS and 11 words; the texts take turns
    plain = [[int(word[1:]) for word in text.split()] for text in TEXTS]
    windows = [[BOS, *plain[0][:11]], [BOS, *plain[1][:11]], [BOS, *plain[0][11:22]]]
    patterns = eager(tiny, torch.tensor(windows))
    expected = [by_definition(method, pattern, ids) for pattern, ids in zip(patterns, windows, strict=True)]
    np.testing.assert_allclose(scores.trials, expected, rtol=0, atol=TOLERANCE)
    assert [(d["text"], d["first"]) for d in scores.details] == [(0, 0), (1, 0), (0, 11)]
    assert scores.groups.tolist() == [0, 1, 0]  # windows of one text are resampled together


@pytest.mark.parametrize("inputs", ["natural", "random", "repeat"])
def test_sinks_are_eager_attention(tiny, inputs: str) -> None:
    length, key, epsilon = 20, 2, 0.06
    texts = TEXTS if inputs == "natural" else None
    scores = heads.sinks(
        tiny, inputs=inputs, texts=texts, length=length, key=key, epsilon=epsilon, samples=3, batch=2, progress=False
    )
    if inputs == "natural":
        ids = torch.tensor([[BOS, *(int(word[1:]) for word in text.split())][:length] for text in TEXTS])
    else:
        first = [random_tokens(tiny, length if inputs == "random" else 1, [0, i]) for i in range(3)]
        ids = torch.stack([one.expand(length) for one in first])
    pattern = eager(tiny, ids)
    alpha = np.empty((*pattern.shape[:3], length))
    for layer in range(pattern.shape[1]):
        types = getattr(tiny.model.config, "layer_types", None)
        window = 16 if types and types[layer] == "sliding_attention" else length
        for k in range(length):
            alpha[:, layer, :, k] = pattern[:, layer, :, k : k + window, k].mean(axis=-1)  # the rows that see k
    np.testing.assert_allclose(scores.trials, alpha[..., key], rtol=0, atol=TOLERANCE)
    assert abs(alpha - epsilon).min() > TOLERANCE  # no alpha so near the threshold that rounding decides
    rate = 100 * (alpha > epsilon).mean(axis=(1, 2))
    np.testing.assert_allclose([d["sink_rate_percent"] for d in scores.details], rate)
    np.testing.assert_allclose(scores.provenance["sink_rate_percent"], rate.mean(axis=0))
    assert 0 < rate.mean() < 100


def test_key_outside_a_sliding_window_has_no_mass() -> None:
    scores = heads.duplicate_token(build("gemma3"), length=20, samples=2, progress=False)  # 20 back, window 16
    assert (scores.mean[0::2] == 0).all() and (scores.mean[1::2] > 0).all()


def positional_heads(offsets: list[list[int]]):
    """A GPT-2 whose head (layer, head) puts everything on the key ``offset`` back.

    Its residual stream is the position i as the unit vector i and nothing else; a head's query is its position shifted.
    LayerNorm makes the 1 of 32 entries 5.7 larger than the zeros, so the key in question scores 20 * 5.7^2 / sqrt(16)
    = 165 above all others, and exp(-165) is 0 in float32.
    """
    places = 16
    config = GPT2Config(n_layer=len(offsets), n_head=2, n_embd=2 * places, n_positions=places, vocab_size=64)
    config.bos_token_id, config.eos_token_id = BOS, None
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        model.transformer.wpe.weight[:, :places] = torch.eye(places)
        for block, layer in zip(model.transformer.h, offsets, strict=True):
            for head, offset in enumerate(layer):
                query, key = head * places, 2 * places + head * places
                shift = torch.diag(torch.ones(places - offset), -offset)  # unit vector i -> unit vector i - offset
                block.attn.c_attn.weight[:places, query : query + places] = 20 * shift
                block.attn.c_attn.weight[:places, key : key + places] = torch.eye(places)
    return load_model(model, tokenizer=tokenizer())


@pytest.mark.parametrize(("method", "offset"), [("induction", 4), ("previous_token", 1), ("duplicate_token", 5)])
def test_a_known_head_scores_one_and_the_others_zero(method: str, offset: int) -> None:
    model = positional_heads([[0, offset], [0, 0]])
    scores = heads.method(method)(model, length=5, samples=3, progress=False)
    assert scores.mean.tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert scores.above(0.5).heads == ((0, 1),)


def test_uniform_attention_has_the_alpha_of_uniform_attention() -> None:
    """One token repeated without positions: A[i, 0] = 1 / (i + 1), so alpha_0 over two tokens is 3/4, exactly."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=64, vocab_size=64)).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    settings = dict(inputs="repeat", samples=2, progress=False)
    assert (heads.sinks(model, length=2, **settings).mean == 0.75).all()
    for epsilon, rate in ((0.75, [0.0, 0.0]), (0.7, [100.0, 0.0]), (0.4, [100.0, 100.0])):  # strictly above
        scores = heads.sinks(model, length=2, epsilon=epsilon, **settings)
        assert scores.provenance["sink_rate_percent"] == rate
    longer = heads.sinks(model, length=64, **settings)
    np.testing.assert_allclose(longer.mean, np.mean(1 / np.arange(1, 65)), rtol=1e-6)


def test_random_tokens_are_ordinary_different_and_seeded(llama) -> None:
    ids = random_tokens(llama, WORDS, [0, 0])
    assert sorted(ids.tolist()) == list(range(WORDS))  # all words once: no BOS, no added token, no empty row
    assert torch.equal(ids, random_tokens(llama, WORDS, [0, 0]))
    assert not torch.equal(ids, random_tokens(llama, WORDS, [0, 1]))
    a, b = (sequences.repeated_samples(llama, 20, 3, seed, bos=False) for seed in (0, 1))
    drawn = {tuple(sample.ids.tolist()) for sample in (*a, *b)}
    assert len(drawn) == 6  # neighbouring seeds share no sequence
    with pytest.raises(HeadscopeError, match="61 different tokens .* 60 ordinary"):
        random_tokens(llama, WORDS + 1, [0])


def test_special_tokens_of_a_model_with_and_without_tokenizer(llama) -> None:
    assert bos_tokens(llama) == [BOS] and start_tokens(llama) == [BOS]
    bare = load_model(llama.model)
    assert bos_tokens(bare) == [BOS] and BOS not in random_tokens(bare, 63, [0]).tolist()
    scores = heads.previous_token(llama.model, length=5, samples=2, bos=False, progress=False)  # a bare module will do
    assert scores.details[0]["queries"] == 9 and scores.provenance["parameters"]["bos_token_ids"] == []


def test_tables_of_keys() -> None:
    ids = torch.tensor([9, 5, 6, 5, 7, 7, 5, 6])
    assert sequences.previous_occurrence(ids).tolist() == [-1, -1, -1, 1, -1, 4, 3, 2]
    assert sequences.after_previous_occurrence(ids).tolist() == [-1, -1, -1, 2, -1, -1, 4, 3]
    assert sequences.position_before(ids).tolist() == [-1, 0, 1, 2, 3, 4, 5, 6]


def test_a_window_without_repetition_is_not_kept(llama) -> None:
    text = "w1 w2 w3 w4 w5 w1 w2 w3 w4 w1"  # the first window has no repeated word, the second has
    scores = heads.induction(llama, texts=text, window=6, samples=2, progress=False)
    assert [(d["kept"], d["queries"]) for d in scores.details] == [(False, 0), (True, 1)]
    with pytest.raises(HeadscopeError, match="none of 1 trials was kept"):
        heads.induction(llama, texts=text, window=6, samples=1, progress=False)


@pytest.mark.parametrize("name", ["induction", "sinks"])
def test_batches_change_nothing_and_a_killed_run_resumes(llama, tmp_path, name: str) -> None:
    settings = dict(samples=5, length=10, seed=4, progress=False)
    settings |= {"inputs": "random"} if name == "sinks" else {}
    whole = heads.method(name)(llama, batch=5, **settings)
    first = heads.method(name)(llama, batch=2, out=tmp_path, **settings)
    np.testing.assert_allclose(first.trials, whole.trials, rtol=0, atol=TOLERANCE)
    journal = tmp_path / f"{name}.trials.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # two trials and a torn line
    again = heads.method(name)(llama, batch=3, out=tmp_path, **settings)
    np.testing.assert_allclose(again.trials, whole.trials, rtol=0, atol=TOLERANCE)
    assert np.array_equal(again.trials[:2], first.trials[:2])
    saved = HeadScores.load(tmp_path)
    assert np.array_equal(saved.trials, again.trials)
    assert saved.provenance.get("sink_rate_percent") == again.provenance.get("sink_rate_percent")
    with pytest.raises(HeadscopeError, match="other settings"):
        heads.method(name)(llama, out=tmp_path, **{**settings, "length": 11})


def test_the_model_is_left_as_it_was(llama) -> None:
    before = llama.model.config._attn_implementation
    heads.sinks(llama, inputs="random", length=8, samples=2, progress=False)
    assert llama.model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("induction", {"length": 1}, "too short to repeat"),
        ("induction", {"length": 70}, "141 tokens are longer than the context"),
        ("induction", {"length": 61}, "60 ordinary ones"),
        ("induction", {"samples": 0}, "at least 1"),
        ("induction", {"batch": 0}, "at least 1 sample"),
        ("duplicate_token", {"texts": TEXTS, "window": 26}, "text 1 has 24 tokens, fewer than the 26"),
        ("previous_token", {"texts": []}, "no text was given"),
        ("previous_token", {"texts": [7], "window": 8}, "not int"),
        ("previous_token", {"texts": TEXTS, "window": 2}, "too short"),
        ("previous_token", {"texts": TEXTS, "window": 400}, "longer than the context"),
        ("sinks", {"texts": TEXTS}, "text 0 has 29 tokens, fewer than the 64"),
        ("sinks", {"texts": []}, "no text was given"),
        ("sinks", {"inputs": "noise"}, "choose 'natural'"),
        ("sinks", {"inputs": "random", "texts": TEXTS}, "leave one of them out"),
        ("sinks", {"inputs": "random", "length": 8, "key": 8}, "choose 0 to 7"),
        ("sinks", {"inputs": "random", "epsilon": 30}, "0 <= epsilon < 1"),
        ("sinks", {"inputs": "repeat", "length": 129}, "longer than the context"),
        ("sinks", {"inputs": "repeat", "length": 8, "samples": 0}, "at least 1"),
    ],
)
def test_bad_input(llama, name: str, settings: dict, message: str) -> None:
    with pytest.raises(HeadscopeError, match=message):
        heads.method(name)(llama, progress=False, **settings)


def test_text_without_a_tokenizer_and_a_broken_model(llama) -> None:
    with pytest.raises(HeadscopeError, match="without a tokenizer"):
        heads.induction(llama.model, texts=TEXTS, window=8, progress=False)
    lm = build("llama")
    heads.previous_token(lm, length=4, samples=1, progress=False)  # verified while it was whole
    with torch.no_grad():
        lm.model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    for name, settings in (("previous_token", {}), ("sinks", {"inputs": "random"})):
        with pytest.raises(HeadscopeError, match="attention of layer 1 .* is not a number in float32"):
            heads.method(name)(lm, length=4, samples=1, progress=False, **settings)


@pytest.mark.parametrize("name", heads.METHODS)
def test_every_method_is_reached_by_its_name(name: str) -> None:
    function = heads.method(name)
    assert function is getattr(heads, name) and function is heads.method(name.replace("_", "-"))
    assert function.__name__ == heads.METHODS[name].name == name and name in dir(heads) and name in heads.__all__
    parameters = inspect.signature(function).parameters
    assert [*parameters][0] == "lm" and {"out", "progress"} <= {*parameters}


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(HeadscopeError, match="no head method 'singing'; known: induction, previous_token"):
        heads.method("singing")
    with pytest.raises(AttributeError, match="singing"):
        heads.singing  # noqa: B018


@pytest.mark.slow
def test_smollm2_has_induction_previous_and_duplicate_token_heads(smollm2) -> None:
    for name in TARGETED:
        scores = heads.method(name)(smollm2, samples=4, progress=False)
        low, high = scores.interval
        best = np.unravel_index(scores.mean.argmax(), scores.mean.shape)
        print(scores.to_frame().head(8).round(3).to_string())
        # far above chance (about 1/50 on one of the keys seen), in few heads, and not by luck of the draw
        assert scores.mean[best] > 0.5 and low[best] > 0.4 and high[best] <= 1.0
        assert np.median(scores.mean) < 0.05


@pytest.mark.slow
def test_induction_heads_of_random_tokens_are_those_of_text(smollm2) -> None:
    random = heads.induction(smollm2, samples=4, progress=False)
    text = heads.induction(smollm2, texts=PROSE, window=64, samples=4, progress=False)
    best = random.top(10).heads
    chosen = np.mean([text.mean[pair] for pair in best])
    assert chosen > 2 * text.mean.mean()


@pytest.mark.slow
def test_smollm2_has_sinks_at_its_first_token(smollm2) -> None:
    scores = heads.sinks(smollm2, texts=PROSE, progress=False)
    rates = scores.provenance["sink_rate_percent"]
    print([round(rate, 2) for rate in rates[:6]], scores.to_frame().head(5).round(3).to_string())
    assert rates[0] > 50 and max(rates[1:16]) < 20  # nothing but the first token among those that many queries see
    repeat = heads.sinks(smollm2, inputs="repeat", samples=2, progress=False)
    assert repeat.provenance["sink_rate_percent"][0] == 0.0  # identical states cannot single out the first token


@pytest.mark.slow
def test_smollm2_reads_the_bundled_prose_by_default(smollm2) -> None:
    scores = heads.sinks(smollm2, samples=2, progress=False)
    assert scores.provenance["sink_rate_percent"][0] > 50
    passages = sequences.bundled_passages(smollm2, 64, 100)
    assert len(set(passages)) == 100 and min(len(smollm2.tokenizer(one)["input_ids"]) for one in passages) >= 64


@pytest.mark.parametrize("method", TARGETED)
def test_every_setting_is_documented(method: str) -> None:
    function = heads.method(method)
    said = inspect.getdoc(function) or ""
    missing = [name for name in inspect.signature(function).parameters if f"    {name}: " not in said]
    assert set(missing) <= {"seed", "progress"} and "Raises:" in said
