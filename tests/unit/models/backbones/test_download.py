"""Downloads are complete or absent, are resumed, happen once, and give the reason of a failure."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import MEMBER, PAGE, StandIn
from weight_files import PTH, REPO, SAFE, card, digest, empty_machine, refusal

from cellbench.models.backbones.weights import locate


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with empty_machine(tmp_path, monkeypatch) as state:
        yield state


def test_a_download_lands_whole_and_once(web: StandIn) -> None:
    it = card(web.zenodo("Net.pth", PTH), sha256=digest(PTH))
    path = locate(it, None)
    assert path.read_bytes() == PTH
    assert locate(it, None) == path
    assert web.gets("Net.pth") == [""]
    assert not [left for left in path.parent.iterdir() if left.suffix == ".part"]


def test_a_broken_download_is_resumed(web: StandIn) -> None:
    web.cut_at = [40_000]
    assert locate(card(web.zenodo("Net.pth", PTH), sha256=digest(PTH)), None).read_bytes() == PTH
    assert web.gets("Net.pth") == ["", "bytes=40000-"]


def test_a_download_that_keeps_breaking_is_resumed_by_the_next_call(web: StandIn) -> None:
    web.cut_at = [40_000, 10_000, 10_000]
    it = card(web.zenodo("Net.pth", PTH), sha256=digest(PTH))
    assert f"broke off after 60000 of {len(PTH)} bytes" in refusal(it)
    assert locate(it, None).read_bytes() == PTH
    assert web.gets("Net.pth")[-1] == "bytes=60000-"


def test_a_part_that_is_complete_or_too_long_does_no_harm(web: StandIn) -> None:
    it = card(web.zenodo("Net.pth", PTH), sha256=digest(PTH))
    path = locate(it, None)
    path.rename(path.with_name(path.name + ".part"))
    assert locate(it, None).read_bytes() == PTH
    path.unlink()
    path.with_name(path.name + ".part").write_bytes(PTH + b"more")
    assert locate(it, None).read_bytes() == PTH


def test_two_processes_download_a_file_once(web: StandIn, tmp_path: Path) -> None:
    url = web.zenodo("Net.pth", PTH)
    web.pause_s = 0.1
    code = (
        "import sys; from pathlib import Path; from cellbench.models.backbones import download, weight_files\n"
        "download.download_https(sys.argv[1], Path(sys.argv[2]), weight_files.check_whole, sys.argv[3])"
    )
    call = [sys.executable, "-c", code, url, str(tmp_path / "once" / "net.pth"), digest(PTH)]
    both = [subprocess.Popen(call) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert (tmp_path / "once" / "net.pth").read_bytes() == PTH
    assert len(web.gets("Net.pth")) == 1


def test_a_corrupted_download_is_refused_and_deleted(web: StandIn) -> None:
    bad = PTH[:5000] + b"XXXX" + PTH[5004:]
    assert "of another hash" in refusal(card(web.zenodo("Net.pth", bad, md5=""), sha256=digest(PTH)))
    # With no sha256 on the card, the md5 that Zenodo lists does the same.
    assert "of another hash" in refusal(card(web.zenodo("Net.pth", bad, md5=hashlib.md5(PTH).hexdigest())))
    assert locate(card(web.zenodo("Net.pth", PTH)), None).read_bytes() == PTH


def test_a_web_page_instead_of_a_file_is_refused(web: StandIn) -> None:
    line = refusal(card(web.zenodo("Net.pth", PAGE, md5="")))
    assert "is a web page, not weights" in line
    assert "put Net.pth (from " in line


def test_no_network_a_missing_file_and_a_login_have_different_messages(web: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no network: 127.0.0.1:9 cannot be reached" in refusal(card("http://127.0.0.1:9/Net.pth"))
    assert "does not exist any more (HTTP 404)" in refusal(card(f"{web.url}/gone/Net.pth"))
    url = web.zenodo("Net.pth", PTH)
    web.gated.add("/records/1/files/Net.pth")
    assert "needs a login (HTTP 401)" in refusal(card(url))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "no network: the hub cannot be reached" in refusal(card(f"hf-hub:{REPO}"))


# --- the hub


def test_a_gated_file_needs_a_login_and_then_access(web: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    web.hub(REPO, "pytorch_model.bin", PTH, gated=True)
    it = card(f"hf-hub:{REPO}", file="pytorch_model.bin", gated=True, page="https://huggingface.co/lab/net")
    line = refusal(it)
    assert "is gated and nobody is logged in here" in line
    assert "Accept the licence at https://huggingface.co/lab/net and log in" in line
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    assert "this account has not been granted access" in refusal(it)
    monkeypatch.setenv("HF_TOKEN", MEMBER)
    assert locate(it, None).read_bytes() == PTH


def test_a_broken_download_from_the_hub_is_resumed(web: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 16384)
    web.hub(REPO, "weights/net.safetensors", SAFE)
    web.cut_at = [40_000]
    it = card(f"hf-hub:{REPO}", file="weights/net.safetensors")
    assert locate(it, None).read_bytes() == SAFE
    assert web.gets("net.safetensors") == ["", "bytes=32768-"]
    assert locate(it, None, download=False).read_bytes() == SAFE


def test_the_hub_sending_something_else_is_noticed(web: StandIn) -> None:
    web.hub(REPO, "model.safetensors", SAFE)
    web.etags[f"/{REPO}/resolve/main/model.safetensors"] = "0" * 64
    assert "lab/net/model.safetensors gave a file of another hash" in refusal(card(f"hf-hub:{REPO}"))
    web.hub("lab/page", "model.safetensors", PAGE)
    assert "what lab/page/model.safetensors gave is a web page" in refusal(card("hf-hub:lab/page"))


def test_a_small_file_without_a_sha256_on_the_hub_is_accepted(web: StandIn) -> None:
    web.hub(REPO, "model.safetensors", SAFE)
    web.etags[f"/{REPO}/resolve/main/model.safetensors"] = "1" * 40
    assert locate(card(f"hf-hub:{REPO}"), None).read_bytes() == SAFE


def test_offline_mode_differs_from_a_lost_network(web: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(card(f"hf-hub:{REPO}"))


def test_finding_and_fetching_weights_needs_no_torch() -> None:
    code = "import sys, cellbench.models.backbones.build, cellbench.models.backbones.weights; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_hub_without_the_repository_or_the_file(web: StandIn) -> None:
    assert "does not exist on the hub" in refusal(card("hf-hub:no/body"))
    web.hub(REPO, "README.md", b"hello")
    assert f"{REPO} has no file model.safetensors or pytorch_model.bin" in refusal(card(f"hf-hub:{REPO}"))


def test_without_a_stated_name_safetensors_come_first(web: StandIn) -> None:
    web.hub(REPO, "pytorch_model.bin", PTH)
    assert locate(card(f"hf-hub:{REPO}"), None).read_bytes() == PTH
    web.hub("lab/both", "pytorch_model.bin", PTH)
    web.hub("lab/both", "model.safetensors", SAFE)
    assert locate(card("hf-hub:lab/both"), None).read_bytes() == SAFE


def test_a_hub_file_of_another_hash_and_a_damaged_cache_are_refused(web: StandIn) -> None:
    web.hub(REPO, "model.safetensors", SAFE)
    assert "the card says 0000000000000000" in refusal(card(f"hf-hub:{REPO}", sha256="0" * 64))
    blob = locate(card(f"hf-hub:{REPO}"), None)
    blob.write_bytes(SAFE[:-4] + b"\0\0\0\1")
    line = refusal(card(f"hf-hub:{REPO}"))
    assert "the hub says" in line
    assert str(blob) in line  # the file to delete, not the link to it
