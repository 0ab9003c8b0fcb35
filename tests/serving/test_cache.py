"""The cache of encoded images: bounded in bytes, one maker a key, and nothing kept of a failure."""

import threading
import time

import pytest

from resprune.serving.cache import ByteCache


def made(cache: ByteCache[bytes], key: str, size: int = 10) -> bool:
    """Whether the value had to be made."""
    calls = []
    cache.get(key, lambda: calls.append(1) or bytes(size))  # type: ignore[func-returns-value]
    return bool(calls)


def test_what_was_used_last_stays() -> None:
    cache: ByteCache[bytes] = ByteCache(30, len)
    assert [made(cache, key) for key in "abcabc"] == [True] * 3 + [False] * 3
    assert not made(cache, "a")
    assert made(cache, "d"), "b is the one that was not used for longest"
    assert [made(cache, key) for key in "acd"] == [False] * 3
    assert cache.nbytes == 30
    assert made(cache, "b")


def test_a_value_larger_than_the_cache_is_not_kept() -> None:
    cache: ByteCache[bytes] = ByteCache(30, len)
    assert made(cache, "a")
    assert [made(cache, "large", 31) for _ in range(2)] == [True, True]
    assert not made(cache, "a")
    nothing: ByteCache[bytes] = ByteCache(0, len)
    assert [made(nothing, "a") for _ in range(2)] == [True, True]
    assert nothing.nbytes == 0


def test_two_threads_make_one_value() -> None:
    cache: ByteCache[bytes] = ByteCache(30, len)
    calls: list[int] = []

    def make() -> bytes:
        calls.append(1)
        time.sleep(0.1)
        return b"value"

    got: list[bytes] = []
    threads = [threading.Thread(target=lambda: got.append(cache.get("a", make))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (got, len(calls)) == ([b"value"] * 5, 1)
    assert (cache.misses, cache.hits) == (1, 4)


def test_a_failure_is_told_to_all_and_not_kept() -> None:
    cache: ByteCache[bytes] = ByteCache(30, len)

    def fail() -> bytes:
        raise ValueError("broken")

    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            cache.get("a", fail)
    assert made(cache, "a")
