"""Answers survive an interruption, and are not mixed with those to something else."""

import pytest

from resprune.evaluation.answers import Answers, Run, output
from resprune.runtime.errors import ResPruneError

SETTINGS = {"model": "m", "positions": "original", "data": {"one": "1", "two": "2"}}
RUN = Run("one", "resprune", "8", 0)


def test_what_was_added_is_there_again(tmp_path):
    first = Answers(tmp_path / "new" / "out", SETTINGS)
    first.add(RUN, {3: "röt", 5: "two"})
    first.add(RUN._replace(data="two"), {3: "other"})
    del first  # which was never closed, as when a process dies
    again = Answers(tmp_path / "new" / "out", SETTINGS)
    assert again.missing(RUN, [3, 4, 5]) == [4]
    again.add(RUN, {4: ""})
    assert again.of(RUN, [5, 4, 3]) == ["two", "", "röt"]
    again.close()
    assert Answers(tmp_path / "new" / "out", SETTINGS).of(RUN._replace(data="two"), [3]) == ["other"]


def test_half_a_line_is_dropped(tmp_path):
    answers = Answers(tmp_path, SETTINGS)
    answers.add(RUN, {1: "a"})
    answers.add(RUN, {2: "b"})
    answers.close()
    path = tmp_path / "answers-one.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    again = Answers(tmp_path, SETTINGS)
    assert again.missing(RUN, [1, 2]) == [2]
    again.add(RUN, {2: "c"})
    again.close()
    assert Answers(tmp_path, SETTINGS).of(RUN, [1, 2]) == ["a", "c"]


def test_a_run_that_was_cut_off_in_its_first_line_begins_anew(tmp_path):
    (tmp_path / "answers-one.jsonl").write_text('{"model": ')
    Answers(tmp_path, SETTINGS).add(RUN, {1: "a"})
    assert Answers(tmp_path, SETTINGS).of(RUN, [1]) == ["a"]


def test_another_data_set_may_be_added_later(tmp_path):
    Answers(tmp_path, SETTINGS | {"data": {"one": "1"}}).add(RUN, {1: "a"})
    assert Answers(tmp_path, SETTINGS).missing(RUN, [1]) == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (SETTINGS | {"model": "n"}, "model"),
        (SETTINGS | {"model": "n", "positions": "contiguous"}, "model, positions"),
        (SETTINGS | {"data": {"one": "1", "two": "3"}}, "data"),
    ],
)
def test_answers_of_something_else_are_refused(tmp_path, settings, named):
    answers = Answers(tmp_path, SETTINGS)
    for data in SETTINGS["data"]:
        answers.add(RUN._replace(data=data), {1: "a"})
    answers.close()
    with pytest.raises(ResPruneError, match=f"answers of another {named}; give another --out"):
        Answers(tmp_path, settings)


def test_nothing_is_left_of_a_run_that_did_not_begin(tmp_path):
    with output(tmp_path / "out"):
        Answers(tmp_path / "out", SETTINGS).close()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with output(tmp_path / "out"):
        pass
    (tmp_path / "out").rmdir()
    answers = Answers(tmp_path, SETTINGS | {"data": {"two": "2"}})
    answers.add(RUN._replace(data="two"), {1: "a"})
    answers.close()
    with pytest.raises(ResPruneError, match=r"answers-two.jsonl holds answers of another data"):
        Answers(tmp_path, SETTINGS | {"data": {"one": "1", "two": "3"}})
    assert [path.name for path in tmp_path.iterdir()] == ["answers-two.jsonl"]


@pytest.mark.parametrize(
    "line", ["7\n", "nonsense\n", '{"selector": "x"}\n', '{"model": "m"}\n[]\n', "\ud800\n"]
)
def test_a_damaged_file_is_named(tmp_path, line):
    answers = Answers(tmp_path, SETTINGS)
    answers.add(RUN, {1: "a"})
    answers.close()
    path = tmp_path / "answers-one.jsonl"
    path.write_bytes(path.read_bytes() + line.encode(errors="surrogatepass"))
    damaged = path.read_bytes()
    with pytest.raises(ResPruneError, match=r"answers-one.jsonl is damaged"):
        Answers(tmp_path, SETTINGS)
    assert path.read_bytes() == damaged


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResPruneError, match="cannot be written"):
        Answers(tmp_path / "file", SETTINGS)
    with pytest.raises(ResPruneError, match="cannot be written"), output(tmp_path / "file"):
        pass
    assert (tmp_path / "file").is_file()


def test_a_second_run_is_refused_while_the_first_writes(tmp_path):
    first = Answers(tmp_path, SETTINGS)
    first.add(RUN, {1: "a"})
    with pytest.raises(ResPruneError, match=r"another run writes .*answers-one.jsonl; wait for it"):
        Answers(tmp_path, SETTINGS)
    first.add(RUN, {2: "b"})
    first.close()
    assert Answers(tmp_path, SETTINGS).of(RUN, [1, 2]) == ["a", "b"]


@pytest.fixture
def full_disk():
    """Files that are open take ten more bytes."""
    resource = pytest.importorskip("resource", reason="POSIX alone limits the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(path):
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))

    limit.lift = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    yield limit
    limit.lift()


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(tmp_path, full_disk):
    answers = Answers(tmp_path, SETTINGS)
    answers.add(RUN, {1: "a"})
    full_disk(tmp_path / "answers-one.jsonl")
    with pytest.raises(
        ResPruneError, match=r"answers-one.jsonl cannot be written \(File too large\); make room"
    ):
        answers.add(RUN, {2: "b" * 99})
    answers.close()
    full_disk.lift()
    again = Answers(tmp_path, SETTINGS)
    assert again.missing(RUN, [1, 2]) == [2]
    again.add(RUN, {2: "c"})
    again.close()
    assert Answers(tmp_path, SETTINGS).of(RUN, [1, 2]) == ["a", "c"]
