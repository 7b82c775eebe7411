"""Files: texts in the encodings of Windows' editors, and where the cache is."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from cellbench.errors import SystemFault
from cellbench.files import cache_dir, read_text, require_cache

TEXT = 'name = "Prüfung · 1"\r\nvalue = 3\r\n'
PLAIN = TEXT.replace(" ·", "")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (TEXT.encode(), TEXT),
        (codecs.BOM_UTF8 + TEXT.encode(), TEXT),
        (TEXT.encode("utf-16"), TEXT),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), TEXT),
        (TEXT.encode("utf-16-le"), TEXT),
        (TEXT.encode("utf-16-be"), TEXT),
        (TEXT.encode("cp1252"), TEXT),
        (PLAIN.encode("cp1252"), PLAIN),
        (b"", ""),
    ],
)
def test_a_text_is_the_same_in_every_encoding(data: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(data)
    assert read_text(tmp_path / "a.toml") == text


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"CELLBENCH_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/cellbench"),
        ({"XDG_CACHE_HOME": "not/absolute", "HOME": "/c"}, "/c/.cache/cellbench"),
        ({"HOME": "/c"}, "/c/.cache/cellbench"),
    ],
)
def test_the_cache_is_where_the_environment_says(given: dict[str, str], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CELLBENCH_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(place)


def test_a_cache_that_may_not_be_written_names_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / "cellbench").mkdir(parents=True)
    monkeypatch.delenv("CELLBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "cellbench").chmod(0o555)
    with pytest.raises(SystemFault, match="--cache DIR"):
        require_cache()
    (tmp_path / "home" / "cellbench").rmdir()
    (tmp_path / "home" / "cellbench").touch()
    with pytest.raises(SystemFault, match="a file stands where a folder is needed"):
        require_cache()
