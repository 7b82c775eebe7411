"""Weight files are found in the stated order and checked; errors give the reason and the remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import PAGE, StandIn
from weight_files import PTH, REPO, SAFE, STATE, card, digest, empty_machine, refusal, torch_bytes

from cellbench.errors import CellbenchError, WeightsUnavailable
from cellbench.models.backbones.weight_files import read_state
from cellbench.models.backbones.weights import locate


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with empty_machine(tmp_path, monkeypatch) as state:
        yield state


def test_own_folder_comes_before_the_hub_cache_and_that_before_the_source(web: StandIn, tmp_path: Path) -> None:
    web.hub(REPO, "model.safetensors", SAFE)
    it = card(f"hf-hub:{REPO}")
    fetched = locate(it, None)
    assert len(web.gets("model.safetensors")) == 1
    asked = len(web.asked)
    assert locate(it, None) == fetched
    assert locate(it, None, download=False) == fetched
    assert len(web.asked) == asked  # from the cache, without the network
    (tmp_path / "net.pth").write_bytes(PTH)
    assert locate(it, tmp_path) == tmp_path / "net.pth"


@pytest.mark.parametrize("name", ["net.safetensors", "net.bin", "Published.pth", "net/Published.pth", "net/pytorch_model.bin"])
def test_own_folder_may_use_the_id_or_the_published_name(web: StandIn, tmp_path: Path, name: str) -> None:
    path = tmp_path / "own" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(PTH)
    assert locate(card("https://nowhere.invalid/Published.pth?download=1"), tmp_path / "own") == path


def with_header(table: object) -> bytes:
    """A safetensors file of four bytes of data."""
    head = json.dumps(table).encode()
    return len(head).to_bytes(8, "little") + head + bytes(4)


X = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "table", [{"x": X | {"dtype": "F31"}}, {"x": {"shape": [1], "data_offsets": [0, 4]}}, {"__metadata__": [1], "x": X}]
)
def test_a_header_that_only_the_reader_finds_wrong_is_damage(tmp_path: Path, table: object) -> None:
    (tmp_path / "x.safetensors").write_bytes(with_header(table))
    with pytest.raises(WeightsUnavailable, match=r"x\.safetensors: is damaged \("):
        read_state(tmp_path / "x.safetensors")


@pytest.fixture
def package(web: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed package ``net_weights`` whose code must not run; the name that pip takes is ``net-weights``."""
    folder = tmp_path / "site" / "net_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('the package was imported')")
    (folder / "models" / "net.pth").write_bytes(PTH)
    monkeypatch.syspath_prepend(folder.parent)
    return folder


PACKED = card("package:net-weights", file="net_weights/models/net.pth", sha256=digest(PTH))


def test_a_package_is_searched_without_importing_it_and_after_the_own_folder(package: Path, tmp_path: Path) -> None:
    assert locate(PACKED, None, download=False) == package / "models" / "net.pth"
    (tmp_path / "net.pth").write_bytes(PTH)
    assert locate(PACKED, tmp_path, download=False) == tmp_path / "net.pth"


def test_a_package_that_is_not_installed_is_named_with_its_command(web: StandIn) -> None:
    assert "the Python package net-weights, which is not installed. Run `pip install net-weights`." in refusal(PACKED, None)
    assert not web.asked


def test_a_package_without_the_file_or_with_another_one_is_refused(package: Path) -> None:
    (package / "models" / "net.pth").write_bytes(PTH[:5000] + b"XXXX" + PTH[5004:])
    assert "Run `pip install --force-reinstall net-weights`, or use it on purpose" in refusal(PACKED, None)
    (package / "models" / "net.pth").unlink()
    assert "the installed Python package net-weights has no file net_weights/models/net.pth" in refusal(PACKED, None)


def test_a_package_card_needs_the_path_of_its_file(web: StandIn) -> None:
    with pytest.raises(CellbenchError, match="expected 'MODULE/PATH' in that package"):
        locate(card("package:net-weights", file="net.pth"), None)


def test_a_generic_file_name_is_not_taken_for_a_card(web: StandIn, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(PTH)
    refusal(card(f"hf-hub:{REPO}", file="pytorch_model.bin"), tmp_path, download=False)


def test_the_environment_names_the_folder_too(web: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.pth").write_bytes(PTH)
    monkeypatch.setenv("CELLBENCH_WEIGHTS", str(tmp_path))
    assert locate(card(f"hf-hub:{REPO}"), None) == tmp_path / "net.pth"
    with pytest.raises(CellbenchError, match="no such folder"):
        locate(card(f"hf-hub:{REPO}"), tmp_path / "missing")


def test_weights_that_are_nowhere_say_where_to_put_them(web: StandIn, tmp_path: Path) -> None:
    line = refusal(card(f"hf-hub:{REPO}", file="pytorch_model.bin", gated=True), tmp_path, download=False)
    assert f"Accept the licence at https://huggingface.co/{REPO}" in line
    assert f"put pytorch_model.bin at {tmp_path / 'net.bin'}" in line
    assert not web.asked


def test_an_alternative_in_the_hub_cache_is_used(web: StandIn, tmp_path: Path) -> None:
    web.hub("port/net", "model.safetensors", SAFE)
    locate(card("hf-hub:port/net"), None)
    it = card("https://nowhere.invalid/Net.pth", sha256="0" * 64, alternatives=("hf-hub:port/net/model.safetensors",))
    assert read_state(locate(it, None, download=False)).keys() == STATE.keys()


def test_both_formats_read_to_the_same_tensors(web: StandIn, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(PTH)
    (tmp_path / "b").write_bytes(SAFE)  # the hub's cache keeps files without an ending
    nested, flat = read_state(tmp_path / "a.pth"), read_state(tmp_path / "b")
    assert {f"teacher.backbone.{key}" for key in flat} == nested.keys()
    assert all(torch.equal(nested[f"teacher.backbone.{key}"], STATE[key]) and torch.equal(flat[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("net.pth", PAGE, "is a web page, not weights"),
        ("net.safetensors", b"\n <HTML>" + PAGE, "is a web page, not weights"),
        ("net.pth", b"", "the file is empty"),
        ("net.pth", PTH[:-1000], "is truncated: it ends after"),
        ("net.safetensors", SAFE[:-1000], f"is truncated: it ends after {len(SAFE) - 1000} of {len(SAFE)} bytes"),
        ("net.safetensors", SAFE[:40], "is truncated"),
        ("net.safetensors", SAFE + b"tail", "4 bytes follow the last tensor"),
        ("net.safetensors", with_header({"x": {"dtype": "F32", "shape": [1], "data_offsets": []}}), "header cannot be read"),
        ("net.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        ("net.pth", b"not weights at all", "is neither a torch file nor safetensors"),
    ],
)
def test_each_kind_of_bad_file_has_a_message_of_its_own(web: StandIn, tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert message in refusal(card(f"hf-hub:{REPO}"), tmp_path)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code in a weights file was run')",)


def test_a_pickle_that_would_run_code_is_refused_unrun(web: StandIn, tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(torch_bytes({"state_dict": STATE, "bomb": Bomb()}))
    with pytest.raises(WeightsUnavailable, match="running code; cellbench never does"):
        read_state(locate(card(f"hf-hub:{REPO}"), tmp_path))


def test_a_wrong_hash_names_both_and_another_format_is_not_held_to_it(web: StandIn, tmp_path: Path) -> None:
    it = card("https://nowhere.invalid/Net.pth", sha256=digest(PTH))
    (tmp_path / "net.pth").write_bytes(PTH[:5000] + b"XXXX" + PTH[5004:])
    assert f"the card says {digest(PTH)[:16]}" in refusal(it, tmp_path)
    (tmp_path / "net.safetensors").write_bytes(SAFE)
    assert locate(it, tmp_path).name == "net.safetensors"


def test_the_hash_seen_first_is_the_one_trusted(web: StandIn, tmp_path: Path) -> None:
    it, path, kept = card(f"hf-hub:{REPO}"), tmp_path / "net.pth", tmp_path / "cache" / "weights" / "known_hashes.json"
    path.write_bytes(PTH)
    locate(it, tmp_path)
    assert json.loads(kept.read_text()) == {"net folder net.pth": digest(PTH)}
    path.write_bytes(torch_bytes(STATE))
    line = refusal(it, tmp_path)
    assert "has changed since it was first used" in line
    assert f"delete the line 'net folder net.pth' in {kept}" in line
    kept.unlink()
    assert locate(it, tmp_path) == path


def test_a_card_without_weights_or_with_a_strange_source_is_a_mistake_in_the_card(web: StandIn) -> None:
    with pytest.raises(CellbenchError, match="has no weights file"):
        locate(card("none"), None)
    with pytest.raises(CellbenchError, match="Expected 'hf-hub:OWNER/NAME'"):
        locate(card("ftp://somewhere/net.pth"), None)
