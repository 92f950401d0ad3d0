"""Random vectors of the same norm as a control: the same heads, the same lengths, other directions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interventions import AblateHeads, AddToHeads, AffineHeads, TextLoss, apply, evaluate
from headscope.interventions.evaluation.evaluate import plan
from headscope.interventions.head_tables import random_like

HEADS, WIDTH = [(0, 1), (1, 2)], 8
TASK = TextLoss(passages=2, length=8, text=" ".join(["w1 w2 w5"] * 8))


def vectors(count: int = 2) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shape", [(2, WIDTH), (2, 4, WIDTH)])
def test_norms_stay_and_directions_do_not(shape: tuple[int, ...]) -> None:
    held = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 50.0]).view(
        2, *[1] * (len(shape) - 1)
    )
    edit = AddToHeads(HEADS, held, sigma=torch.ones(shape[:-1]), strength=3.0, during="decode")
    made = edit.with_random_vectors(np.random.default_rng(0))
    assert isinstance(made, AddToHeads) and made.vectors.dtype == held.dtype
    torch.testing.assert_close(made.vectors.norm(dim=-1), held.norm(dim=-1))
    assert (torch.nn.functional.cosine_similarity(made.vectors, held, dim=-1).abs() < 0.99).all()
    own, other = edit.describe(), made.describe()
    assert {key for key in own if own[key] != other[key]} == {"vectors"}
    assert (
        made == edit.with_random_vectors(np.random.default_rng(0)) != edit.with_random_vectors(np.random.default_rng(1))
    )


def test_directions_are_uniform_on_the_sphere() -> None:
    """Of 4,000 in 8 dimensions the mean of u is 0 and of u u' is 1 / 8: standard errors are sqrt(1 / 8 / 4000) = 0.0056
    and at most sqrt(2 / 80 / 4000) = 0.0025."""
    u = random_like(torch.full((4000, WIDTH), 1.0).double(), np.random.default_rng(0)) / WIDTH**0.5
    assert u.mean(0).abs().max() < 4.5 * 0.0056
    assert (u.T @ u / 4000 - torch.eye(WIDTH) / WIDTH).abs().max() < 4.5 * 0.0025


def test_zeros_stay_and_what_is_no_vector_too() -> None:
    assert not random_like(torch.zeros(2, WIDTH), np.random.default_rng(0)).any()
    half = AffineHeads(HEADS, A=0.1 * vectors(), v=vectors())
    made = half.with_random_vectors(np.random.default_rng(0))
    assert isinstance(made, AffineHeads) and made.A is half.A and made.v is not None and not made.v.equal(vectors())
    scaling, zero, ablation = AffineHeads(HEADS, A=vectors()), AddToHeads(HEADS, 0 * vectors()), AblateHeads(HEADS)
    assert [one.adds_vectors for one in (half, scaling, zero, ablation)] == [True, False, False, False]
    assert ablation.with_random_vectors(np.random.default_rng(0)) == ablation


def test_parts_have_directions_of_their_own() -> None:
    both = AddToHeads(HEADS, vectors()) + AblateHeads([(0, 3)]) + AddToHeads(HEADS, vectors(), during="decode")
    assert both.adds_vectors
    first, ablation, last = both.with_random_vectors(np.random.default_rng(0)).parts
    assert ablation == both.parts[1] and isinstance(first, AddToHeads) and isinstance(last, AddToHeads)
    assert not first.vectors.equal(last.vectors)


def test_they_are_conditions_of_a_kind_of_their_own(llama: LanguageModel) -> None:
    edits = [AddToHeads(HEADS, vectors(), strength=2.0), AblateHeads(HEADS)]
    result = evaluate(llama, [TASK], edits, controls=3, vectors=2, progress=False)
    found = result.contrasts()
    assert list(found["control"]) == ["random heads", "random vectors", "random heads"]
    assert list(found["controls"]) == [3, 2, 3]
    names = [name for name in result.scores("text_loss") if name.startswith("random vectors")]
    assert names == [f"random vectors for {edits[0].name} (seed {seed})" for seed in (0, 1)]
    trial = TASK.trials(llama)[0]
    for seed, name in enumerate(names):
        with apply(llama, edits[0].with_random_vectors(np.random.default_rng(seed))):
            expected = TASK.run(llama, trial)["score"]
        assert result.scores("text_loss").loc[0, name] == expected
    assert found.loc[1, "random"] == pytest.approx(result.scores("text_loss")[names].to_numpy().mean())


def test_how_many(llama: LanguageModel) -> None:
    edit = AddToHeads(HEADS, vectors())

    def kinds(controls: int, drawn: int | None) -> list[str]:
        return [one.control for one in plan(llama, [edit], controls, 0, drawn)[2:]]

    assert kinds(2, None) == ["random heads"] * 2 + ["random vectors"] * 2
    assert kinds(2, 0) == ["random heads"] * 2 and kinds(0, 2) == ["random vectors"] * 2
    for drawn in (None, 0):
        with pytest.raises(HeadscopeError, match="set controls to at least 1"):
            plan(llama, [edit], 0, 0, drawn)
    every = AddToHeads([(0, head) for head in range(4)], vectors(4))  # no head is left for a control
    assert len(plan(llama, [every], 0, 0, 3)) == 5
