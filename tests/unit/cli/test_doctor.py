"""``doctor`` lists what is available without network access, and detects wrong files, cards and outputs."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import parts
import pytest
import torch
from fake_hub import StandIn
from weight_files import PTH, REPO, SAFE, card, digest, empty_machine

from cellbench.cli import doctor
from cellbench.config.cards import BackboneCard
from cellbench.config.registry import Registry, shipped
from cellbench.diagnostics import head_cost, probe
from cellbench.models.backbones.build import open_backbone
from cellbench.models.backbones.weights import locate
from cellbench.run import main

VIT_TINY = "vit_tiny_patch16_224.safetensors"


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with empty_machine(tmp_path, monkeypatch) as state:
        yield state


def put(folder: Path, data: bytes, name: str = "net.pth") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return folder


def states(it: BackboneCard, folder: Path | None = None, deep: bool = False) -> tuple[str, str]:
    row = doctor.row(it, folder, deep)
    assert (row.here == "broken") == bool(row.problem)
    return row.here, row.hash


# --- a line of the table


def test_a_backbone_without_weights_needs_nothing(web: StandIn) -> None:
    assert states(card("none")) == ("needs nothing", "")


def test_missing_weights_would_be_downloaded_or_are_gated(web: StandIn) -> None:
    url = web.zenodo("Net.pth", PTH)
    assert states(card(url, sha256=digest(PTH))) == ("would download", "on the card")
    assert states(card(f"hf-hub:{REPO}")) == ("would download", "unknown")
    row = doctor.row(card(f"hf-hub:{REPO}", gated=True, page="https://huggingface.co/lab/net", params_m=21.6), None)
    assert (row.here, row.where, row.mib) == ("gated", "hf.co/lab/net", "~82")
    assert web.asked == []


def test_weights_of_a_package_are_in_it_or_it_is_named_with_its_command(
    web: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = card("package:net-weights", file="net_weights/net.pth", sha256=digest(PTH))
    row = doctor.row(it, None)
    assert (row.here, row.hash, row.where) == ("not installed", "on the card", "pip install net-weights")
    put(tmp_path / "site" / "net_weights", PTH)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert states(it) == ("in a package", "as on card")


def test_a_file_in_the_folder_is_compared_with_the_card_or_recorded(web: StandIn, tmp_path: Path) -> None:
    folder, source = put(tmp_path / "w", PTH), web.url + "/Net.pth"
    assert states(card(source, sha256=digest(PTH)), folder) == ("in the folder", "as on card")
    assert states(card(source), folder) == ("in the folder", "recorded")
    assert states(card(source, sha256=digest(SAFE)), folder) == ("broken", "WRONG")
    assert "is not the published file" in doctor.row(card(source, sha256=digest(SAFE)), folder).problem


def test_a_file_that_changed_since_its_first_use_is_wrong(web: StandIn, tmp_path: Path) -> None:
    folder = put(tmp_path / "w", PTH)
    assert states(card(web.url + "/Net.pth"), folder)[1] == "recorded"
    put(tmp_path / "w", PTH[:5000] + b"XXXX" + PTH[5004:])
    row = doctor.row(card(web.url + "/Net.pth"), folder)
    assert (row.here, row.hash) == ("broken", "WRONG")
    assert "has changed since it was first used" in row.problem


@pytest.mark.parametrize(("data", "says"), [(PTH[:9000], "truncated"), (b"<!DOCTYPE html><html>", "web page"), (b"", "empty")])
def test_a_damaged_file_is_reported(web: StandIn, tmp_path: Path, data: bytes, says: str) -> None:
    row = doctor.row(card(web.url + "/Net.pth"), put(tmp_path / "w", data))
    assert (row.here, row.hash) == ("broken", "")
    assert says in row.problem
    assert row.problem.startswith("net: ")


def test_a_large_file_is_read_for_deep_only_and_then_known(web: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "HASHED_BYTES", 1000)
    folder, it = put(tmp_path / "w", PTH), card(web.url + "/Net.pth", sha256=digest(SAFE))
    assert states(it, folder) == ("in the folder", "not read")
    assert states(it, folder, deep=True) == ("broken", "WRONG")
    assert states(it, folder) == ("broken", "WRONG")


def test_downloads_of_both_kinds_are_found_where_they_land(web: StandIn) -> None:
    zenodo, hub = card(web.zenodo("Net.pth", PTH), sha256=digest(PTH)), card(f"hf-hub:{REPO}", file="model.safetensors")
    web.hub(REPO, "model.safetensors", SAFE)
    paths = [locate(it, None) for it in (zenodo, hub)]
    web.asked.clear()
    assert states(zenodo) == ("downloaded", "as on card")
    assert states(hub) == ("in the hub cache", "recorded")
    assert states(card(zenodo.weights + "&v=2")) == ("would download", "unknown")  # another address, another file
    assert web.asked == []
    paths[1].write_bytes(SAFE[:-4] + b"XXXX")
    assert states(hub) == ("broken", "WRONG")


def test_a_card_with_an_invalid_source_is_reported(web: StandIn) -> None:
    row = doctor.row(card("ftp://nowhere"), None)
    assert row.here == "broken"
    assert "Expected 'hf-hub:OWNER/NAME'" in row.problem


# --- the table


def test_the_table_comes_without_torch_within_seconds_and_fits_the_terminal(tmp_path: Path) -> None:
    code = "import sys; from cellbench.run import main; code = main(['doctor']); assert 'torch' not in sys.modules; sys.exit(code)"
    nowhere = "http://127.0.0.1:9"  # the discard port: whoever asks the network is refused
    env = {**os.environ, "COLUMNS": "120", "HF_HOME": str(tmp_path), "HF_ENDPOINT": nowhere, "https_proxy": nowhere, "http_proxy": nowhere}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert time.monotonic() - start < 10  # 0.8 s on two free cores
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 120
    names = [line.split()[0] for line in lines if re.match(r"\S+ +(needs nothing|would download|gated|in the|in a|to be made)", line)]
    assert sorted(names) == Registry().names("backbones")
    assert "hf.co/MahmoodLab/uni" in done.stdout
    assert "hub: not logged in" in done.stdout


def test_a_card_that_cannot_be_read_is_one_line_and_exit_code_1(web: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = parts.backbone(tmp_path / "mine")
    (folder / "backbones" / "other.toml").write_text("# x\npatch = 3\n", encoding="utf-8")
    assert main(["doctor", "--registry", str(folder)]) == 1
    output = capsys.readouterr().out
    assert re.search(r"^other +broken", output, re.MULTILINE)
    assert re.search(r"^my-backbone +needs nothing", output, re.MULTILINE)
    assert "other.toml: 'builder' is missing." in output


# --- the self-test


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what else the self-test finds: it measures no speed, for seconds."""
    monkeypatch.setattr(probe, "_speed", lambda frozen: (1, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["filter-bank", "vit-tiny-random"])
def test_a_backbone_without_weights_passes_its_self_test_and_gives_the_output_on_its_card(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", name, "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "the output on the card, off by" in output
    assert "WRONG" not in output
    assert re.search(r"[1-9][\d,.]* tiles/s of 224 px", output)
    assert re.search(r"[1-9]\d* MiB more than before", output) or not sys.platform.startswith("linux")


@pytest.mark.slow
def test_the_real_vit_tiny_passes_its_self_test(shared: Path, unmeasured: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "vit-tiny-in1k", "--weights", str(shared / "weights"), "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert VIT_TINY in output
    assert output.count("; ok\n") == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("mean          = [0.5, 0.5, 0.5]", "mean          = [0.485, 0.456, 0.406]"), "not the card's, off by"),
        (("params_m      = 5.5", "params_m      = 5.9"), "5.524 M, 5.9 M on the card; WRONG"),
        (("seed = 0", "seed = 1"), "not the card's, off by"),
    ],
)
def test_a_backbone_that_is_not_what_its_card_says_fails(
    tmp_path: Path, unmeasured: None, capsys: pytest.CaptureFixture[str], changed: tuple[str, str], says: str
) -> None:
    text = (shipped("registry") / "backbones" / "vit-tiny-random.toml").read_text(encoding="utf-8")
    assert changed[0] in text
    (tmp_path / "mine" / "backbones").mkdir(parents=True)
    (tmp_path / "mine" / "backbones" / "other.toml").write_text(text.replace(*changed), encoding="utf-8")
    assert main(["doctor", "other", "--registry", str(tmp_path / "mine"), "--device", "cpu"]) == 1
    assert says in capsys.readouterr().out


@pytest.mark.slow
def test_a_backbone_without_a_known_output_is_given_one_to_put_on_its_card(
    tmp_path: Path, unmeasured: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = parts.backbone(tmp_path)
    assert main(["doctor", "my-backbone", "--registry", str(folder), "--device", "cpu"]) == 0
    (numbers,) = re.findall(r"none on the card; here (\[.*\])", capsys.readouterr().out)
    path = folder / "backbones" / "my-backbone.toml"
    path.write_text(f"{path.read_text()}probe = {numbers}\n", encoding="utf-8")
    assert main(["doctor", "my-backbone", "--registry", str(folder), "--device", "cpu"]) == 0
    assert "the output on the card, off by" in capsys.readouterr().out


@pytest.mark.slow
def test_missing_weights_are_one_line_with_the_remedy(
    web: StandIn, tmp_path: Path, unmeasured: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "uni"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        "cellbench: uni: its weights are not on this machine. Accept the licence at https://huggingface.co/MahmoodLab/uni"
    )
    assert err.count("\n") == 1
    assert main(["doctor", "filter-bank", "uni", "gpfm", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert "filter-bank on cpu" in out
    assert "uni: cannot be tested. its weights are not on this machine" in out
    assert err == "cellbench: 2 of 3 backbones cannot be tested; the reasons are above.\n"
    assert web.asked == []


def test_the_cost_of_named_heads_is_a_table_the_cheapest_first(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_cost, "MEASURED_S", 0.0)
    assert main(["doctor", "detail", "bilinear", "--device", "cpu"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:4]]
    assert [(name, params) for name, params, *_ in rows] == [("bilinear", "0.00"), ("detail", "0.21")]
    assert all(float(train) > float(score) > 0 for *_, train, score in rows)


def test_a_misspelt_name_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "filter-bank", "dinoblom-s"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no backbone or head called 'dinoblom-s'. Did you mean 'dinobloom-s'?" in err


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--weights", "--registry"):
        assert main(["doctor", option, str(tmp_path / "no")]) == 2
        assert "there is no such folder" in capsys.readouterr().err


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLBENCH_CACHE", str(tmp_path / "old"))
    put(tmp_path / "w", PTH, "dinobloom-b.pth")
    assert main(["doctor", "--weights", str(tmp_path / "w"), "--cache", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "hashes.json").is_file()
    assert not (tmp_path / "old").exists()


# --- the known output


def test_the_probe_changes_with_the_order_of_places_the_block_and_the_weights() -> None:
    backbone = open_backbone(Registry().backbone("vit-tiny-random"))
    known = torch.tensor(probe.fingerprint(backbone))
    assert known.numpy() == pytest.approx(Registry().backbone("vit-tiny-random").probe, abs=probe.TOLERANCE)
    plain = backbone.maps

    def off() -> float:
        return (torch.tensor(probe.fingerprint(backbone)) - known).abs().max().item()

    for wrong in (
        lambda x, indices: [m.transpose(2, 3) for m in plain(x, indices)],
        lambda x, indices: [m.flip(2) for m in plain(x, indices)],
        lambda x, indices: plain(x, (indices[0] - 1,)),
        lambda x, indices: plain(x.flip(1), indices),  # BGR
    ):
        backbone.maps = wrong
        assert off() > 10 * probe.TOLERANCE
    backbone.maps = plain
    with torch.no_grad():
        backbone.net.blocks[5].mlp.fc1.weight.mul_(1.1)
    assert off() > 10 * probe.TOLERANCE


def test_the_drawn_tile_is_in_range_and_no_two_quadrants_or_colours_are_alike() -> None:
    tile = probe.test_tile(224)
    assert tile.shape == (1, 3, 224, 224)
    assert tile.dtype == torch.float32
    assert tile.min() >= 0
    assert tile.max() <= 1
    corners = [corner for half in tile.chunk(2, 2) for corner in half.chunk(2, 3)]
    means = sorted(float(corner[:, colour].mean()) for corner in corners for colour in range(3))
    assert min(b - a for a, b in itertools.pairwise(means)) > 1e-3
