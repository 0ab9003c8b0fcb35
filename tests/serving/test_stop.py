"""Stop sequences: what comes in pieces is cut where the whole text is."""

from hypothesis import given
from hypothesis import strategies as st

from resprune.serving.stop import StopFilter

LETTERS = st.text("ab", max_size=12)


def filtered(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    stop = StopFilter(stops)
    text = "".join(stop.push(piece) for piece in pieces) + stop.finish()
    return text, stop.found


@given(st.lists(LETTERS, max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4))
def test_pieces_are_cut_as_the_whole(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert filtered(pieces, stops) == (whole[: min(places)] if places else whole, bool(places))


def test_text_is_passed_on_as_soon_as_it_is_certain() -> None:
    stop = StopFilter(["END"])
    assert [stop.push(piece) for piece in ("a b", "E", "N", "x E")] == ["a b", "", "", "ENx "]
    assert stop.finish() == "E"
    assert StopFilter([]).push("anything") == "anything"
