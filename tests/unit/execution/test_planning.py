"""Fingerprints cover everything that can change a run's numbers (cards, their code, the precision), and no descriptions."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import parts
import pytest

from cellbench.config.experiment import Experiment
from cellbench.config.registry import Registry, load
from cellbench.execution.planning import ResolvedRun, resolve_runs

HEAD = """# {title}
builder = "{builder}"
levels = {levels}
pixels = {pixels}
{more}
"""
BACKBONE = """# {title}
builder = "cellbench.models.backbones.filter_bank:filter_bank"
weights = "none"
patch_px = {patch_px}
dim = 36
depth = 1
mean = {mean}
std = {std}
{more}
[arch]
sigmas_px = {sigmas_px}
"""
BASELINE = """# {title}
builder = "{builder}"
trained = {trained}
{more}
"""
PLAIN = {
    "heads": (HEAD, {"title": "A", "builder": "cellbench.models.heads.bilinear:Bilinear", "levels": 1, "pixels": "false", "more": ""}),
    "backbones": (
        BACKBONE,
        {"title": "A", "patch_px": 8, "mean": "[0.5, 0.5, 0.5]", "std": "[0.5, 0.5, 0.5]", "sigmas_px": "[1.0, 2.0]", "more": ""},
    ),
    "baselines": (BASELINE, {"title": "A", "builder": "cellbench.models.baselines.otsu:otsu", "trained": "false", "more": ""}),
}


def card(registry: Path, kind: str, name: str = "mine", **changes: object) -> None:
    text, facts = PLAIN[kind]
    (registry / kind).mkdir(parents=True, exist_ok=True)
    (registry / kind / f"{name}.toml").write_text(text.format(**{**facts, **changes}), encoding="utf-8")


def resolved(
    registry: Path, precision: str = "fp32", head: str = "mine", backbone: str = "mine", baseline: str = "mine"
) -> list[ResolvedRun]:
    """A run of this head on this backbone, and one of this baseline."""
    tree = {"experiment": "e", "dataset": "folder", "baselines": [baseline], "grid": {"backbone": [backbone], "head": [head]}}
    experiment = Experiment.of({**tree, "run": {"tile_px": 64}}, "e.toml")
    runs = resolve_runs(experiment, Registry(registry), [SimpleNamespace(digest="d")], None, "e.toml", precision=precision)
    assert not any(one.unavailable for one in runs)
    return runs


def prints(registry: Path, precision: str = "fp32", **names: str) -> list[str]:
    """Their fingerprints."""
    return [one.fingerprint for one in resolved(registry, precision, **names)]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    for kind in PLAIN:
        card(tmp_path / "registry", kind)
    return tmp_path / "registry"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("heads", {"levels": 2}),
        ("heads", {"pixels": "true"}),
        ("heads", {"builder": "cellbench.models.heads.fpn:FPN"}),
        ("backbones", {"patch_px": 16}),
        ("backbones", {"mean": "[0.4, 0.5, 0.5]"}),
        ("backbones", {"std": "[0.4, 0.5, 0.5]"}),
        ("backbones", {"sigmas_px": "[1.0, 3.0]"}),
        ("backbones", {"more": "prefix_tokens = 1"}),
        ("baselines", {"trained": "true"}),
        ("baselines", {"builder": "cellbench.models.baselines.unet:UNet"}),
    ],
    ids=str,
)
def test_a_fact_on_a_card_that_changes_numbers_makes_another_run(registry: Path, kind: str, change: dict[str, object]) -> None:
    network, method = prints(registry)
    card(registry, kind, **change)
    changed = prints(registry)
    assert [changed[0] != network, changed[1] != method] == ([False, True] if kind == "baselines" else [True, False])


@pytest.mark.parametrize("kind", PLAIN)
def test_descriptions_on_a_card_do_not_change_the_fingerprint(registry: Path, kind: str) -> None:
    before, more = prints(registry), 'license = "MIT"\nsource = "a paper"\nnotes = "slow"'
    card(
        registry,
        kind,
        title="Another title",
        more=more + ("\ngated = true\npage = 'https://x.org'\nparams_m = 3.0" if kind == "backbones" else ""),
    )
    assert prints(registry) == before


def test_a_registry_elsewhere_makes_no_other_run(registry: Path, tmp_path: Path) -> None:
    assert prints(registry) == prints(registry.rename(tmp_path / "moved"))


def test_another_precision_is_another_run_where_a_network_computes(registry: Path) -> None:
    network, method = prints(registry, "fp32")
    assert prints(registry, "bf16")[0] != network
    assert prints(registry, "bf16")[1] == method
    card(registry, "baselines", trained="true", builder="cellbench.models.baselines.unet:UNet")
    assert prints(registry, "bf16")[1] != prints(registry, "fp32")[1]


def test_features_are_kept_under_the_same_facts(registry: Path) -> None:
    found = set()
    for change in ({}, {"patch_px": 16}, {"mean": "[0.4, 0.5, 0.5]"}, {"sigmas_px": "[1.0, 3.0]"}, {"more": "prefix_tokens = 1"}):
        card(registry, "backbones", **change)
        found.add(resolved(registry)[0].backbone_identity)
    assert len(found) == 5


# --- the code behind a card -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package of somebody's own, with a head in it."""
    folder = tmp_path / "lib" / "site-packages" / "lab_parts"
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "deep" / "__init__.py").write_text("from .heads import Mine\n")
    (folder / "deep" / "heads.py").write_text(
        "from cellbench.models.heads.bilinear import Bilinear\nfrom ..layers import SCALE\nfrom lab_parts import more\nimport other_library\n"
        "class Mine(Bilinear):\n    scale = SCALE\n"
    )
    (folder / "layers.py").write_text("SCALE = 1\n")
    (folder / "more.py").write_text("")
    (folder / "unrelated.py").write_text("")
    (folder.parent / "other_library.py").write_text("")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


@pytest.mark.parametrize(
    ("file", "other"),
    [
        ("deep/heads.py", True), ("layers.py", True), ("more.py", True), ("__init__.py", True), ("deep/__init__.py", True),
        ("unrelated.py", False), ("../other_library.py", False),
    ],
)  # fmt: skip
def test_a_changed_module_behind_an_installed_head_makes_another_run(registry: Path, package: Path, file: str, other: bool) -> None:
    card(registry, "heads", builder="lab_parts.deep.heads:Mine")
    before = prints(registry)
    with (package / file).open("a") as opened:
        opened.write("CHANGED = True\n")
    assert (prints(registry) != before) == other
    assert "lab_parts" not in sys.modules  # nothing is run to find out


def test_modules_beside_a_head_and_under_development_are_its_code_too(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts.head(registry)
    head = registry / "heads" / "my_head.py"
    head.write_text(
        f"import beside_it\nfrom lab_library.blocks import block\n{head.read_text().replace('from __future__ import annotations', '')}"
    )
    (registry / "heads" / "beside_it.py").write_text("")
    library = tmp_path / "src" / "lab_library"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text("")
    (library / "blocks.py").write_text("def block(): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    found = [prints(registry, head="my-head")]
    for file in (head, registry / "heads" / "beside_it.py", library / "blocks.py"):
        file.write_text(f"{file.read_text()}\nCHANGED = True\n")
        found.append(prints(registry, head="my-head"))
    assert len({network for network, _ in found}) == 4
    assert len({method for _, method in found}) == 1


def test_the_code_of_a_backbone_and_of_a_baseline_counts_too(registry: Path, package: Path) -> None:
    (package / "layers.py").write_text(
        "from cellbench.models.backbones.filter_bank import filter_bank\nfrom cellbench.models.baselines.otsu import otsu\n"
    )
    text = BACKBONE.replace("cellbench.models.backbones.filter_bank:", "lab_parts.layers:").format(**PLAIN["backbones"][1])
    (registry / "backbones" / "mine.toml").write_text(text)
    card(registry, "baselines", builder="lab_parts.layers:otsu")
    before = prints(registry)
    (package / "layers.py").write_text(f"{(package / 'layers.py').read_text()}CHANGED = True\n")
    assert all(a != b for a, b in zip(before, prints(registry), strict=True))


def test_a_builder_that_is_not_there_is_left_to_the_building(registry: Path) -> None:
    card(registry, "heads", builder="no_such_package.heads:Mine")
    assert len(prints(registry)) == 2
    with pytest.raises(Exception, match="cannot be imported"):
        load(Registry(registry).head("mine"))


def test_imported_modules_do_not_change_the_fingerprint(registry: Path, package: Path) -> None:
    card(registry, "heads", builder="lab_parts.deep.heads:Mine")
    before = prints(registry)
    importlib.import_module("lab_parts.deep.heads")
    assert prints(registry) == before
    for name in [name for name in sys.modules if name.startswith("lab_parts")]:
        del sys.modules[name]
