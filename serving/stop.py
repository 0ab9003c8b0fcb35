"""Stop sequences in a text that comes in pieces."""

from collections.abc import Sequence


class StopFilter:
    """Passes text on until a stop sequence begins; what may be the beginning of one waits.

    The text joined is what stands before the earliest stop sequence of the whole; of several that begin at one place
    it does not matter which. `found` tells whether there was one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that has become certain with `piece`."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        # A longer stop may still begin before the place where a shorter one is complete.
        open_at = self._open(text)
        if places and min(places) <= open_at:
            self.found, self._held = True, ""
            return text[: min(places)]
        self._held = text[open_at:]
        return text[:open_at]

    def finish(self) -> str:
        """What waited, now that nothing follows."""
        text, self._held = self._held, ""
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if self.found or not places:
            return text
        self.found = True
        return text[: min(places)]

    def _open(self, text: str) -> int:
        """Where the earliest stop sequence begins that the end of `text` cuts off; its length if there is none."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for start in range(max(0, len(text) - longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
