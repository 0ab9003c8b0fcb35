"""Kept rows in the prompt's place for the picture, under both ways of numbering."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.preprocessor import PreparedImage
from resprune.runtime.prompt.splice import KeptTokens, Picks, cut_picks, keep, keep_all, splice

IMAGE = 7


def kept(indices: list[int], num_tokens: int, base: float, counts: list[int] | None = None) -> KeptTokens:
    order = np.array(indices)
    rows = (base + np.sort(order))[:, None].astype(np.float32)
    picks = Picks(np.sort(order), order, np.array(counts or [1] * len(indices)))
    return KeptTokens(rows, picks, np.sort(order), (num_tokens,), (len(order),))


def image(num_tokens: int) -> PreparedImage:
    return PreparedImage.one_span({}, np.arange(num_tokens), num_tokens)


def embed(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.float32)[:, None]


@pytest.mark.parametrize(
    ("positions", "numbers"),
    [
        ("contiguous", [0, 1, 2, 3, 4, 5, 6, 7]),
        # 1 token, picture of 9 from 1, 2 tokens, picture of 5 from 12, 1 token after it
        ("original", [0, 1 + 3, 1 + 8, 10, 11, 12 + 0, 12 + 4, 17]),
    ],
)
def test_two_pictures(positions: str, numbers: list[int]) -> None:
    ids = [1, IMAGE, 2, 3, IMAGE, 4]
    pictures = [kept([8, 3], 9, 100), kept([0, 4], 5, 200)]
    result = splice([embed(ids)], [ids], [pictures], image_token_id=IMAGE, positions=positions)
    assert result.inputs_embeds[0, :, 0].tolist() == [1, 103, 108, 2, 3, 200, 204, 4]
    assert result.position_ids[0].tolist() == numbers
    assert result.attention_mask[0].tolist() == [1] * 8


def test_a_picture_at_either_end_of_the_prompt() -> None:
    ids = [IMAGE, 5, IMAGE]
    pictures = [kept([1], 3, 10), kept([2], 3, 20)]
    result = splice([embed(ids)], [ids], [pictures], image_token_id=IMAGE, positions="original")
    assert result.inputs_embeds[0, :, 0].tolist() == [11, 5, 22]
    assert result.position_ids[0].tolist() == [1, 3, 6]


def test_shorter_prompts_are_filled_up_on_the_left() -> None:
    ids = [[1, IMAGE, 2, 3], [IMAGE]]
    pictures = [[kept([0, 1], 4, 100)], [kept([1, 2], 4, 200)]]
    result = splice([embed(row) for row in ids], ids, pictures, image_token_id=IMAGE, positions="contiguous")
    assert result.inputs_embeds[:, :, 0].tolist() == [[1, 100, 101, 2, 3], [0, 0, 0, 201, 202]]
    assert result.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert result.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]


def test_the_mask_says_what_a_row_counts_for() -> None:
    """A kept token for those that are like it, text for itself, and the filling of a shorter prompt for nothing."""
    ids = [[1, IMAGE, 2, IMAGE], [IMAGE]]
    pictures = [[kept([3, 0], 4, 100, [1, 3]), kept([2, 1], 9, 200, [4, 5])], [kept([1], 4, 300, [4])]]
    result = splice([embed(row) for row in ids], ids, pictures, image_token_id=IMAGE, positions="original")
    assert result.attention_mask.tolist() == [[1, 1, 3, 1, 4, 5], [0, 0, 0, 0, 0, 4]]


def test_fewer_picks_are_the_first_ones() -> None:
    features = np.array([[10.0], [20.0], [30.0], [40.0]], np.float32)  # rows of tokens 1, 2, 3, 4
    whole = cut_picks(image(9), features, np.array([1, 2, 3, 4]), np.array([3, 1, 4, 2]), None)
    assert whole.rows[:, 0].tolist() == [10, 20, 30, 40]
    assert whole.picks.kept_counts.tolist() == [1, 1, 1, 1]
    counts = np.array([5, 0, 2, 2])  # of three picks: none is left for the fourth, token 2
    tens = PreparedImage.one_span({}, 10 * np.arange(9), 9)
    some = cut_picks(tens, features, np.array([1, 2, 3, 4]), np.array([3, 1, 4, 2]), 3, counts)
    assert some.picks.kept_counts.tolist() == [5, 2, 2]
    assert some.rows[:, 0].tolist() == [10, 30, 40]
    assert some.picks.kept_indices.tolist() == [1, 3, 4]
    assert some.picks.pick_order.tolist() == [3, 1, 4]
    assert some.offsets.tolist() == [10, 30, 40]
    assert some.advances == (9,)


@pytest.mark.parametrize(("tokens", "kept"), [(None, 5), (5, 5), (4, 4), (3, 1), (2, 1), (1, 1)])
def test_a_cut_is_behind_a_whole_group(tokens: int | None, kept: int) -> None:
    """Token 7 alone, 2 with 0 and 5 behind it, 4 alone, and a place that nothing fills."""
    attached_to = np.array([2, -1, -1, -1, -1, 2, -1, -1])
    attached = replace(image(8), attached_to=attached_to)
    indices, order = np.array([0, 2, 4, 5, 7, -1]), np.array([7, 2, 0, 5, 4, -1])
    result = cut_picks(attached, np.arange(6, dtype=np.float32)[:, None], indices, order, tokens)
    assert result.picks.pick_order.tolist() == order[:kept].tolist()
    assert result.rows[:, 0].tolist() == np.flatnonzero(np.isin(indices, order[:kept])).tolist()


def test_an_image_whose_first_group_has_no_room_keeps_nothing() -> None:
    attached = replace(image(3), attached_to=np.array([1, -1, -1]))
    nothing = cut_picks(attached, np.ones((2, 1), np.float32), np.array([0, 1]), np.array([1, 0]), 1)
    assert nothing.picks.kept_indices.tolist() == []
    result = splice(
        [embed([5, IMAGE, 6])], [[5, IMAGE, 6]], [[nothing]], image_token_id=IMAGE, positions="original"
    )
    assert result.inputs_embeds[0, :, 0].tolist() == [5, 6]
    assert result.position_ids.tolist() == [[0, 4]]


@pytest.mark.parametrize(
    "attached_to",
    [[-1, 0, 1], [1, 0, -1], [0, -1, -1], [5, -1, -1], [3, -1, -1], [-2, -1, -1], [1, -1], [[-1, 0, 0]]],
)
def test_tokens_attached_to_what_is_kept_by_no_pick_are_refused(attached_to: list[Any]) -> None:
    with pytest.raises(
        ValueError, match=r"each of the 3 tokens -1, or a token that is attached to none itself"
    ):
        replace(image(3), attached_to=np.array(attached_to))


@pytest.mark.parametrize("count", [2, 4])
def test_protected_says_something_of_each_token(count: int) -> None:
    with pytest.raises(ValueError, match="protected should say of each of the 3 tokens"):
        replace(image(3), protected=np.ones(count, bool))


def test_places_that_nothing_fills_are_left_out() -> None:
    features = np.array([[10.0], [20.0], [0.0]], np.float32)
    result = cut_picks(image(3), features, np.array([1, 2, -1]), np.array([2, 1, -1]), None)
    assert result.rows[:, 0].tolist() == [10, 20]
    assert result.picks.pick_order.tolist() == [2, 1]


def test_positions_of_three_axes() -> None:
    grid = np.array(
        [[0, 0, 0], [0, 1, 1], [1, 0, 1]]
    )  # time, height and width of tokens 1, 2 and 3 of a 2 x 2 grid
    picks = Picks(np.array([1, 2, 3]), np.array([3, 1, 2]), np.ones(3, np.int64))
    kept3 = KeptTokens(np.zeros((3, 1), np.float32), picks, grid, (2,), (3,))
    ids = [1, IMAGE, 2, 3]
    result = splice([embed(ids)], [ids], [[kept3]], image_token_id=IMAGE, positions="original")
    assert result.position_ids.shape == (3, 1, 6)
    assert result.position_ids[:, 0].tolist() == [
        [0, 1, 1, 1, 3, 4],
        [0, 1, 2, 2, 3, 4],
        [0, 2, 1, 2, 3, 4],
    ]
    assert result.following.tolist() == [[[5]], [[5]], [[5]]]
    assert result.ahead(0) == 5 - 6


def test_what_is_left_of_the_context_is_that_of_the_longest_prompt() -> None:
    ids = [[1, IMAGE, 2, 3], [IMAGE]]
    pictures = [[kept([0, 1], 4, 100)], [kept([1, 2], 9, 200)]]
    result = splice([embed(row) for row in ids], ids, pictures, image_token_id=IMAGE, positions="original")
    assert result.position_ids.max() == 6
    assert result.following.tolist() == [[7], [3]]
    assert [result.ahead(row) for row in (0, 1)] == [7 - 5, 3 - 2]
    assert [result.room(limit) for limit in (8, 10)] == [1, 3]
    with pytest.raises(ResPruneError, match="past the context: 7 tokens with its images, limit 7"):
        result.room(7)


def test_an_image_of_several_spans_with_text_between() -> None:
    """Tokens 0 to 2, a word, tokens 3 and 4, two words, tokens 5 to 8; the second span keeps nothing."""
    picture = PreparedImage({}, np.array([0, 1, 2, 0, 1, 0, 1, 2, 3]), (3, 2, 4), (3, 2, 4))
    features = np.arange(100, 109, dtype=np.float32)[:, None]
    tokens = keep(picture, features, np.array([8, 1, 5]), planes=[features + 100])
    assert tokens.spans == (1, 0, 2)
    ids = [1, IMAGE, 2, IMAGE, 3, 4, IMAGE, 5]
    for positions, numbers in (
        ("contiguous", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("original", [0, 2, 4, 7, 8, 9, 12, 13]),
    ):
        result = splice([embed(ids)], [ids], [[tokens]], image_token_id=IMAGE, positions=positions)
        assert result.inputs_embeds[0, :, 0].tolist() == [1, 101, 2, 3, 4, 105, 108, 5]
        assert result.position_ids[0].tolist() == numbers
        assert result.row_inputs["plane_embeds.0"][0, :, 0].tolist() == [0, 201, 0, 0, 0, 205, 208, 0]
        assert result.row_inputs["image_numbers"][0].tolist() == [0, 1, 0, 0, 0, 1, 1, 0]


def test_row_inputs_of_a_batch_are_filled_up_on_the_left() -> None:
    one, two = (keep_all(image(count), np.full((count, 1), 9, np.float32)) for count in (1, 2))
    ids = [[1, IMAGE, 2, IMAGE], [IMAGE]]
    result = splice(
        [embed(row) for row in ids], ids, [[one, two], [one]], image_token_id=IMAGE, positions="contiguous"
    )
    assert result.row_inputs["image_numbers"].tolist() == [[0, 1, 0, 2, 2], [0, 0, 0, 0, 1]]
