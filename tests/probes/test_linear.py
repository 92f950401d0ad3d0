"""Probes: planted directions are found, controls stay at chance, ITI's recipe is what runs, runs resume."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.probes import Labelled, ProbeResult, head_outputs, probe_activations, probe_heads, truth
from headscope.probes.linear import activations
from headscope.probes.linear.fitting import Settings

LAYERS, HEADS, D = 3, 4, 8
PLANTED = (1, 2)


def small(count: int = 60) -> Labelled:
    """``count`` groups of two texts of different lengths, one of either label."""
    texts = [f"{'alpha ' * (i % 5 + 1)}{word} n{i}" for i in range(count) for word in ("b", "c")]
    return Labelled(texts, np.tile([0, 1], count), [str(i // 2) for i in range(2 * count)], "small", "says c")


def planted(dataset: Labelled, strength: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Noise z with the label along a unit direction of one head; returns z and that direction."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(len(dataset), LAYERS, HEADS, D))
    direction = rng.normal(size=D)
    direction /= np.linalg.norm(direction)
    z[:, *PLANTED] += strength * np.outer(dataset.labels - 0.5, direction)
    return z.astype(np.float32), direction


@pytest.fixture(scope="module")
def result() -> ProbeResult:
    dataset = small(150)
    return probe_activations(planted(dataset)[0], dataset, progress=False)


@pytest.fixture
def lm() -> LanguageModel:
    """A random llama of two layers, four query heads and two key/value heads, with a tokenizer of words."""
    torch.manual_seed(0)
    words = sorted({word for text in small().texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LanguageModel.wrap(LlamaForCausalLM(config).eval(), tokenizer, name="tiny")


def test_a_planted_head_is_found_and_everything_else_is_at_chance(result: ProbeResult) -> None:
    assert result.scores.top(1).heads == (PLANTED,)
    assert result.above_chance().heads[0] == PLANTED
    best = result.scores.mean[PLANTED]
    low, high = (bound[PLANTED] for bound in result.scores.interval)
    assert 0.85 < best < 1.0 and low < best < high and low > result.best_by_chance
    others = np.delete(result.scores.mean.ravel(), PLANTED[0] * HEADS + PLANTED[1])
    assert abs(others.mean() - 0.5) < 0.04 and others.max() < 0.62
    assert abs(result.control.mean.mean() - 0.5) < 0.04 and result.control.mean[PLANTED] < 0.62
    assert result.control.mean.max() <= result.best_by_chance


def test_directions_point_where_the_label_was_planted(result: ProbeResult) -> None:
    dataset = small(150)
    z, direction = planted(dataset)
    found = result.directions
    assert found.mass_mean.shape == found.probe_weight.shape == (LAYERS, HEADS, D)
    assert found.mass_mean_sigma.shape == found.probe_bias.shape == (LAYERS, HEADS)
    np.testing.assert_allclose(np.linalg.norm(found.mass_mean, axis=-1), 1.0, rtol=1e-5)
    assert found.mass_mean[PLANTED] @ direction > 0.97
    weight = found.probe_weight[PLANTED]
    assert weight @ direction / np.linalg.norm(weight) > 0.95
    assert found.mass_mean_norm[PLANTED] == pytest.approx(3.0, rel=0.1)
    along = torch.from_numpy(z[:, *PLANTED]) @ torch.from_numpy(found.mass_mean[PLANTED])
    assert found.mass_mean_sigma[PLANTED] == pytest.approx(float(along.std()), rel=1e-4)  # n - 1, as ITI


@pytest.mark.parametrize("scale", [False, True])
def test_accuracy_is_that_of_a_plain_sklearn_script(scale: bool) -> None:
    dataset = small(80)
    z = planted(dataset, 1.0)[0] * np.linspace(0.1, 5, D, dtype=np.float32) + 2
    found = probe_activations(z, dataset, settings=Settings(seeds=(7, 8), scale=scale), progress=False)
    for i, seed in enumerate((7, 8)):
        splitter = GroupShuffleSplit(1, test_size=0.2, random_state=seed)
        train, held_out = next(splitter.split(z, groups=np.array(dataset.groups)))
        for layer, head in np.ndindex(LAYERS, HEADS):
            x = z[:, layer, head]
            x = (x - x[train].mean(0)) / x[train].std(0) if scale else x
            probe = LogisticRegression(max_iter=1000, random_state=seed).fit(x[train], dataset.labels[train])
            expected = probe.score(x[held_out], dataset.labels[held_out])
            assert found.accuracy[i, layer, head] == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(found.accuracy.mean(0), found.scores.mean)


def test_scaled_probes_are_saved_for_unscaled_z() -> None:
    dataset = small(80)
    z = planted(dataset)[0] * np.linspace(0.1, 5, D, dtype=np.float32) + 2
    found = probe_activations(z, dataset, settings=Settings(seeds=(0,), scale=True), progress=False).directions
    said = z[:, *PLANTED] @ found.probe_weight[PLANTED] + found.probe_bias[PLANTED] > 0
    assert (said == dataset.labels).mean() > 0.85


def test_the_interval_resamples_groups_and_not_examples() -> None:
    """Copies of an example within its group add no information: the interval must not shrink."""
    dataset = small(60)
    z = planted(dataset, 1.0)[0]
    copies = Labelled(
        [f"{text} copy{k}" for text in dataset.texts for k in range(6)],
        np.repeat(dataset.labels, 6),
        np.repeat(dataset.groups, 6).tolist(),
        "copies",
    )
    settings = Settings(seeds=(0,), C=1e-3)
    one = probe_activations(z, dataset, settings=settings, progress=False).scores.interval
    six = probe_activations(np.repeat(z, 6, axis=0), copies, settings=settings, progress=False).scores.interval
    assert (six[1] - six[0]).mean() > 0.8 * (one[1] - one[0]).mean()


def test_a_result_survives_saving(result: ProbeResult, tmp_path) -> None:
    path = result.save(tmp_path)
    assert path == tmp_path / "probe_small.json"
    for back in (ProbeResult.load(tmp_path), ProbeResult.load(path)):
        assert back.summary() == result.summary() and back.dataset == "small"
        np.testing.assert_array_equal(back.accuracy, result.accuracy)
        np.testing.assert_array_equal(back.control_accuracy, result.control_accuracy)
        np.testing.assert_array_equal(back.directions.mass_mean, result.directions.mass_mean)
        assert back.to_frame().equals(result.to_frame())
    (tmp_path / "probe_small.safetensors").write_bytes(b"something else")
    with pytest.raises(HeadscopeError, match="directions"):
        ProbeResult.load(tmp_path)


def test_the_table_is_sorted_and_names_what_is_above_chance(result: ProbeResult) -> None:
    frame = result.to_frame()
    assert list(frame.columns) == "layer head accuracy ci_low ci_high control n above_chance".split()
    assert len(frame) == LAYERS * HEADS and frame["accuracy"].is_monotonic_decreasing
    assert int(frame["above_chance"].sum()) == len(result.above_chance())
    for row in frame.itertuples():
        assert row.control == result.control.mean[row.layer, row.head]


def test_head_outputs_are_the_inputs_of_the_output_projection(lm: LanguageModel) -> None:
    texts = small(20).texts
    z = head_outputs(lm, texts, positions=(-1, 0), batch_size=7, progress=False)
    assert z.shape == (len(texts), 2, 4, 2, 8) and z.dtype == np.float32
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for layer in lm.model.model.layers
    ]
    for index, text in enumerate(texts):
        seen.clear()
        lm([text])
        for layer, x in enumerate(seen):
            expected = x[0, [-1, 0]].reshape(2, 4, 8).transpose(0, 1)
            np.testing.assert_allclose(z[index, layer], expected.numpy(), atol=1e-5)
    for hook in hooks:
        hook.remove()


def test_an_interrupted_run_resumes_with_what_is_missing(lm: LanguageModel, tmp_path, monkeypatch) -> None:
    texts, real, ran = small(20).texts, activations._trace_batch, []

    def traced(lm, batch, positions):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(batch)
        return real(lm, batch, positions)

    monkeypatch.setattr(activations, "_trace_batch", traced)
    with pytest.raises(KeyboardInterrupt):
        head_outputs(lm, texts, batch_size=8, out=tmp_path, progress=False)
    again: list[list[str]] = []
    monkeypatch.setattr(activations, "_trace_batch", lambda *args: again.append(args[1]) or real(*args))
    resumed = head_outputs(lm, texts, batch_size=8, out=tmp_path, progress=False)
    assert len(ran) == 3 and len(again) == 2 and not {*ran[0], *ran[1], *ran[2]} & {*again[0], *again[1]}
    np.testing.assert_array_equal(resumed, head_outputs(lm, texts, batch_size=8, progress=False))
    with pytest.raises(HeadscopeError, match="other settings"):
        head_outputs(lm, texts, batch_size=4, out=tmp_path, progress=False)


def test_probe_heads_from_text_to_folder(lm: LanguageModel, tmp_path) -> None:
    """The last token is the same for both labels: only attention to the word before it can tell."""
    dataset = small()
    found = probe_heads(lm, dataset, seeds=(0, 1), scale=True, out=tmp_path, progress=False)
    assert found.scores.mean.shape == (2, 4) and found.directions.mass_mean.shape == (2, 4, 8)
    assert found.scores.provenance["model"]["name"] == "tiny"
    assert found.scores.provenance["dataset"]["sha256"] == dataset.sha256
    assert found.baselines["words"].shape == (2,)
    assert found.summary()["accuracy"] > 0.8
    assert ProbeResult.load(tmp_path).summary() == found.summary()
    both = probe_heads(lm, dataset, seeds=(0,), positions=(-2, -1), progress=False)
    assert both.directions.mass_mean.shape == (2, 4, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"validation": 1.0}, "validation"),
        ({"max_iter": 0}, "max_iter"),
        ({"positions": ()}, "position"),
        ({"positions": (-60,)}, "do not all exist"),
        ({"batch_size": 0}, "batch"),
    ],
)
def test_bad_settings_are_refused(lm: LanguageModel, change: dict, message: str) -> None:
    with pytest.raises(HeadscopeError, match=message):
        probe_heads(lm, small(10), progress=False, **change)


def test_bad_activations_are_refused() -> None:
    dataset = small(10)
    z = planted(dataset)[0]
    with pytest.raises(HeadscopeError, match="does not fit"):
        probe_activations(z[:-1], dataset, progress=False)
    z[0, 0, 0, 0] = np.nan
    with pytest.raises(HeadscopeError, match="not finite"):
        probe_activations(z, dataset, progress=False)


def test_probes_that_did_not_converge_are_counted(recwarn) -> None:
    dataset = small(30)
    made = probe_activations(planted(dataset)[0], dataset, settings=Settings(seeds=(0,), max_iter=1), progress=False)
    assert made.scores.provenance["unconverged"] > 0
    assert not [w for w in recwarn if "converge" in str(w.message)]


def test_importing_the_room_does_not_import_torch() -> None:
    code = "import sys, headscope.probes as p; dir(p); print('torch' in sys.modules, 'sklearn' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]


@pytest.mark.slow
def test_heads_of_smollm2_tell_true_answers_from_false_ones(smollm2, capsys) -> None:
    """A third of the set; the words are at chance, and the best head is far above what luck gives the best of 270."""
    whole = truth()
    rows = [i for i, group in enumerate(whole.group_index) if group % 3 == 0]
    dataset = Labelled(
        [whole.texts[i] for i in rows], whole.labels[rows], [whole.groups[i] for i in rows], "truth", whole.meaning
    )
    found = probe_heads(smollm2, dataset, seeds=(0, 1, 2), progress=False)
    summary = found.summary()
    with capsys.disabled():
        print("\nSmolLM2, truth:", summary)
    assert found.scores.mean.shape == (30, 9)
    assert abs(summary["baselines"]["words"] - 0.5) < 0.06 and abs(summary["control_mean"] - 0.5) < 0.03
    assert summary["accuracy"] > found.best_by_chance + 0.05 and summary["interval"][0] > 0.6
