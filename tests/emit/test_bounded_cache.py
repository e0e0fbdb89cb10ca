"""A bounded cache drops the least recently used values."""

from snnfx.emit.bounded_cache import BoundedCache


def test_the_least_recently_used_value_is_dropped() -> None:
    cache: BoundedCache[str] = BoundedCache(2)
    cache.put("a", "A")
    cache.put("b", "B")
    assert cache.get("a") == "A"
    cache.put("c", "C")
    assert cache.get("b") is None
    assert cache.values() == ["A", "C"]


def test_a_value_is_made_once() -> None:
    cache: BoundedCache[list[int]] = BoundedCache(2)
    first = cache.get_or_make(1, list)
    assert cache.get_or_make(1, list) is first
