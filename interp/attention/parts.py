"""Parts of an attention call that are calls themselves: some of its examples and tokens, or one of its heads.

What an edit or a mask says of an example or of a head goes by its index in the whole call, so a part tells them that.
"""

from __future__ import annotations

from dataclasses import fields, replace

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.whole import run_of
from headscope.interp.errors import HeadscopeError
from headscope.kernels.score_edits import ScoreEdit


def cut(call: AttentionCall, examples: slice, rows: slice, keys: slice) -> AttentionCall:
    """Some examples, some of their query rows, and some of the keys; slices with both ends.

    Weights are those of the whole as long as no key that a row sees is left out.

    Raises:
        HeadscopeError: mass was moved between the keys of the whole.
    """
    if call.redistribution is not None:
        raise HeadscopeError(
            f"mass was moved between the keys of layer {call.layer} of {call.module}, so no part of them attends by "
            "itself: leave statistics of blocks out, or trace without that edit"
        )
    mask = call.mask.select_batch(examples.start, examples.stop)
    mask = replace(mask, query_offset=mask.query_offset + rows.start, key_offset=mask.key_offset + keys.start)

    def mine(x: Tensor | None, *places: slice) -> Tensor | None:
        return None if x is None else x[(examples if x.shape[0] > 1 else slice(None), slice(None), *places)]

    return call.with_(
        query=call.query[examples, :, rows],
        key=call.key[examples, :, keys],
        value=call.value[examples, :, keys],
        mask=mask,
        position_bias=mine(call.position_bias, rows, keys),
        key_bias=mine(call.key_bias, keys),
        score_edit=_of_part(call, examples, slice(0, call.query.shape[1])),
    )


def one_head(call: AttentionCall, head: int) -> AttentionCall:
    """One query head, with its key/value head."""
    return some_heads(call, slice(head, head + 1))


def some_heads(call: AttentionCall, heads: slice) -> AttentionCall:
    """A run of query heads (a slice with both ends), with the key/value heads that they read: whole groups, or heads of
    one group. A call that processes share is computed by this one alone then."""
    first, count = heads.start, heads.stop - heads.start
    group = call.query.shape[1] // call.key.shape[1]
    kv, kv_count = first // group, max(1, count // group)
    mask, rule = call.mask, call.mask.rule
    if rule is not None and first:
        mask = replace(mask, rule=lambda b, h, q, k: rule(b, h + first, q, k))

    def mine(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[1] == 1 else run_of(x, 1, first, count)

    return AttentionCall(
        **{each.name: getattr(call, each.name) for each in fields(AttentionCall)}
        | {
            "query": run_of(call.query, 1, first, count),
            "key": run_of(call.key, 1, kv, kv_count),
            "value": run_of(call.value, 1, kv, kv_count),
            "mask": mask,
            "sinks": None if call.sinks is None else run_of(call.sinks, 0, first, count),
            "position_bias": mine(call.position_bias),
            "key_bias": mine(call.key_bias),
            "score_edit": _of_part(call, slice(0, call.query.shape[0]), heads),
            "redistribution": None if call.redistribution is None else call.redistribution.of_heads(heads),
        }
    )


def _of_part(call: AttentionCall, examples: slice, heads: slice) -> ScoreEdit | None:
    """The score edit of ``call`` for some of its examples and heads."""
    return None if call.score_edit is None else call.score_edit.of_part(examples, heads)
