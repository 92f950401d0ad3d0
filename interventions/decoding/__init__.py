"""Ways of choosing tokens, by name. To add one: a file here, and a line in DECODINGS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headscope.interp.registry import Registry

if TYPE_CHECKING:
    from headscope.interventions.decoding.base import Decoding

DECODINGS: Registry[Decoding] = Registry(
    "decoding",
    "decodings",
    "headscope.interventions.decoding",
    {"sgrs": "sgrs:SaliencyRejection", "guidance": "guidance:Guidance"},
)
