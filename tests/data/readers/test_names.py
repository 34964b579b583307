"""Names that are similar to a missing one."""

from mirror_modules.data.readers import names
from mirror_modules.data.readers.names import NameIndex


def test_similar_names_are_listed_for_the_first_misses_only(monkeypatch):
    monkeypatch.setattr(names, "_HINTS", 2)
    index = NameIndex(["red.png", "blue.png"])
    hints = [index.similar("rad.png") for _ in range(3)]
    assert hints == [" (similar: red.png)", " (similar: red.png)", ""]


def test_names_longer_than_those_of_files_are_not_normalized(monkeypatch):
    normalized = []
    monkeypatch.setattr(names, "_caseless", lambda name: normalized.append(name) or name.lower())
    index = NameIndex(["red.png", "b" * 300])
    assert index.similar("r" * 300) == ""
    assert index.similar("rad.png") == " (similar: red.png)"
    assert sorted(normalized) == ["rad.png", "red.png"]
