"""The explorer as an anywidget: questions come as custom messages, answers go back with their buffers."""

from __future__ import annotations

from typing import Any

import anywidget
import traitlets

from headscope.interp.errors import HeadscopeError
from headscope.interp.explorer.answers import Answers
from headscope.interp.explorer.assets import script, style


class ExplorerWidget(anywidget.AnyWidget):  # type: ignore[misc]
    """What a notebook shows. It answers ``{"id": ..., "ask": [question, ...]}``, a message a question, in their order.

    Args:
        answers: what it answers from.
        height: of the view in pixels.
    """

    _esm = script()
    _css = style()
    height = traitlets.Int(680).tag(sync=True)

    def __init__(self, answers: Answers, *, height: int = 680) -> None:
        super().__init__(height=height)
        self._answers = answers
        self.on_msg(self._asked)

    def _asked(self, _: Any, content: Any, buffers: Any) -> None:
        if not isinstance(content, dict) or not isinstance(content.get("ask"), list):
            return
        for question in content["ask"]:
            reply = {"id": content.get("id"), "question": question}
            try:
                facts, data = self._answers(str(question))
            except HeadscopeError as error:
                self.send({**reply, "error": str(error)})
            else:
                self.send({**reply, "facts": facts}, [data])
