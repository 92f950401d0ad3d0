"""Where a prompt ends is said by the innermost block, and by nobody after it."""

from __future__ import annotations

import pytest

from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts import prompt_boundary
from headscope.interp.prompts.boundary import Boundary, known_boundary


def test_the_innermost_block_is_known_and_nothing_after_it() -> None:
    with prompt_boundary(5):
        with pytest.raises(KeyboardInterrupt), prompt_boundary([3, 4], padded=True):
            assert known_boundary() == Boundary((3, 4), padded=True)
            raise KeyboardInterrupt
        assert known_boundary() == Boundary((5,))
    assert known_boundary() is None


@pytest.mark.parametrize("length", [0, -1, [], [3, 0]])
def test_prompts_without_a_token_are_refused(length: object) -> None:
    with pytest.raises(HeadscopeError, match="at least one token"), prompt_boundary(length):  # type: ignore[arg-type]
        raise AssertionError("entered")
