"""Putting interventions in force: ``with apply(model, edit)``, in the tower that they name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from headscope.interp.errors import HeadscopeError
from headscope.interp.results.headset import HeadSet
from headscope.interp.sites import attached
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.sizes import TowerSize, tower_size
from headscope.interp.sites.towers import TOWERS, tower_of
from headscope.interp.sites.unwrap import bare_model
from headscope.interp.tracing.generation import GenerationBoundary, watching_generate
from headscope.interventions.base import Intervention, parts_of
from headscope.interventions.files import require_model


def size(model: ModelLike, tower: str | None = None) -> tuple[int, int]:
    """Layers of a tower (None: the one that reads or writes text), and query heads of the layer that has most."""
    found = tower_size(model, tower)
    heads = found.most_heads
    if heads is None:
        heads = int(bare_model(model).config.get_text_config().num_attention_heads)
    return found.depth, heads


@contextmanager
def apply(
    model: ModelLike, *interventions: Intervention, tower: str | None = None, grad: bool = False
) -> Iterator[None]:
    """Put ``interventions`` in force, in order, for every forward pass and ``generate`` inside the block.

    Composes with ``trace`` (a tracer entered later sees the edited model) and with itself, so that each tower can have
    edits of its own. The model is as it was after the block, also after an exception.

    Args:
        model: load_model's result, a Hugging Face model, a TransformerBridge or an nnsight wrapper (around its
            ``trace`` and ``generate``).
        interventions: edits, e.g. ``AblateHeads``.
        tower: whose heads they name where a model has several towers, as in ``trace(tower=...)``: ``"language"``,
            ``"vision"``, ``"encoder"``, ``"cross"`` ... or a pattern of module names. None: the tower that reads or
            writes text.
        grad: gradients are off inside the block; True keeps what a backward pass through the model and the edits
            needs.

    Raises:
        HeadscopeError: an architecture that cannot be edited exactly; an edit made for another model; a head that does
            not exist, or whose layer makes no attention call; or, when the block ends, one whose layer attended in no
            finished forward pass.
    """
    found = tower_size(model, tower)
    for intervention in interventions:
        if not isinstance(intervention, Intervention):
            raise HeadscopeError(f"{intervention!r:.60} is no intervention: give one, such as AblateHeads('L18H6')")
        _check(intervention, found)
        for part in parts_of(intervention):
            require_model(part.made_for, model, part.name)
    _check_phases(interventions, found.tower if found.tower in TOWERS else tower_of(found.tower, bare_model(model)))
    with ExitStack() as stack:
        if any(intervention.bounded for intervention in interventions):
            stack.enter_context(watching_generate(model, GenerationBoundary(), recorded=False))
        for intervention in interventions:
            layers, in_force = intervention.named_layers(), intervention.in_force(model, tower)
            stack.enter_context(attached(model, in_force, tower=tower, layers=layers, grad=grad))
            stack.enter_context(in_force.around(model))
        yield


def _check_phases(interventions: Sequence[Intervention], tower: str) -> None:
    if tower in ("vision", "audio", "encoder", "connector") and any(edit.phased for edit in interventions):
        raise HeadscopeError(f"the {tower} tower reads its input at once and writes no text; use during='always'")


def _check(intervention: Intervention, found: TowerSize) -> None:
    """Refuse heads that are not there, before anything runs.

    Raises:
        HeadscopeError: names the first such head, or its layer.
    """
    if found.most_heads is not None:
        intervention.check(found.depth, found.most_heads)
    found.check_layers((intervention.heads or HeadSet(())).by_layer())
    for layer, head in intervention.heads or ():
        count = found.heads.get(layer)
        if count is not None and not 0 <= head < count:
            raise HeadscopeError(
                f"head L{layer}H{head} does not exist: layer {layer} of {found.tower!r} has heads 0-{count - 1}"
            )
