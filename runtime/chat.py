"""A conversation about images, in which every question selects anew."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from resprune.runtime.answer import Answer
from resprune.runtime.budget import Tokens
from resprune.runtime.prompt.messages import Turn

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from resprune.runtime.pipeline import View
    from resprune.runtime.sampling import SamplingOptions


class Chat:
    """A conversation in which every question makes its own selection.

    The new selection changes rows near the head of the prompt, on which every later key and value depends. So the
    whole conversation is prefilled again with the rows this question keeps: prompt, positions and KV cache always
    belong together, and an answer is the one a fresh prompt of the whole conversation gets.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._turns: list[tuple[str, Answer]] = []

    @property
    def history(self) -> list[Turn]:
        """What has been said; the answer being read is finished first, and one that failed was never given."""
        turns: list[Turn] = []
        for question, answer in self._turns:
            with suppress(Exception):  # its reader is told
                turns.append(Turn(question, answer.text.strip()))
        return turns

    def ask(
        self,
        question: str,
        *,
        about: Sequence[str] | None = None,
        tokens: Tokens = None,
        plain_text: bool = False,
        stream: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """The next question; one that raises, now or while it is read, leaves the conversation as it was."""
        answer = self._view.ask(
            question,
            about=about,
            history=self.history,
            tokens=tokens,
            plain_text=plain_text,
            stream=stream,
            **sampling,
        )
        self._turns.append((question, answer))
        return answer
