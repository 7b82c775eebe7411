"""All cards are valid and name existing code; errors name the file; a user's folder takes precedence over the shipped one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cellbench.config.cards import KINDS, HeadCard, read_card
from cellbench.config.registry import Registry, code_digest, load, with_defaults
from cellbench.config.run import RunSpec
from cellbench.errors import CellbenchError

EVERY = [(kind, name) for kind in KINDS for name in Registry().names(kind)]
HEAD = '# A head\nbuilder = "bilinear"\n'


def written(folder: Path, text: str, name: str = "mine", kind: str = "heads") -> Path:
    path = folder / kind / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("kind", "name"), EVERY, ids=[f"{kind}-{name}" for kind, name in EVERY])
def test_every_shipped_card_is_read_and_has_a_title_an_id_and_code(kind: str, name: str) -> None:
    card = Registry().card(kind, name)
    assert card.id == name
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert len(card.title) > 10
    if card.builder:
        assert callable(load(card))


def test_the_cards_that_the_project_promises_are_there() -> None:
    registry = Registry()
    assert {"bilinear", "transposed-conv", "fpn", "detail"} <= set(registry.names("heads"))
    assert {"otsu", "unet"} <= set(registry.names("baselines"))
    assert {"smears", "bccd"} <= set(registry.names("datasets"))
    wanted = {"dinobloom-s", "dinobloom-b", "dinobloom-l", "uni", "vit-tiny-in1k", "dinov2-small", "filter-bank", "vit-tiny-random"}
    assert wanted <= set(registry.names("backbones"))


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in EVERY}))
def test_a_misspelt_card_names_the_nearest_known(kind: str) -> None:
    name = Registry().names(kind)[0]
    with pytest.raises(CellbenchError) as caught:
        Registry().card(kind, name[:-1] + "q")
    assert f"'{name[:-1]}q'" in str(caught.value)
    assert f"Did you mean '{name}'?" in str(caught.value)


@pytest.mark.parametrize("name", ["../heads/fpn", "", ".", "..", "fpn.toml", "heads/fpn", "x" * 300, "a\0b"])
def test_only_plain_names_reach_a_file(name: str) -> None:
    with pytest.raises(CellbenchError, match="no head called"):
        Registry().head(name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# A head\nbuilder = ", "cannot be read as a card"),
        ("# A head\n", "'builder' is missing"),
        (HEAD + "levls = 2", "Did you mean 'levels'"),
        (HEAD + "levels = 0", "levels = 0"),
        (HEAD + 'levels = "2"', "levels = '2'"),
        (HEAD + "pixels = 1", "pixels = 1"),
        (HEAD + 'id = "other"', "'id' is not a key"),
        (HEAD + "[options]\nwidth = [1]", "options.width"),
        (HEAD + "[options]\nwidth = inf", "options.width"),
    ],
)
def test_a_wrong_card_is_refused_by_its_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(CellbenchError) as caught:
        Registry(tmp_path).head("mine")
    assert str(path) in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_card_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CellbenchError, match="cannot be read as a card"):
        read_card(path, HeadCard)


def test_a_users_card_wins_over_the_shipped_one_and_adds_to_the_list(tmp_path: Path) -> None:
    written(tmp_path, "# Mine\n" + HEAD.split("\n", 1)[1], name="fpn")
    written(tmp_path, HEAD, name="novel")
    registry = Registry(tmp_path)
    assert registry.head("fpn").title == "Mine"
    assert registry.names("heads") == sorted({*Registry().names("heads"), "novel"})
    assert registry.head("bilinear") == Registry().head("bilinear")


def test_a_wrong_card_does_not_affect_others(tmp_path: Path) -> None:
    written(tmp_path, "nonsense")
    assert Registry(tmp_path).head("fpn") == Registry().head("fpn")


def test_a_registry_folder_that_holds_no_cards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CellbenchError, match=r"has none of backbones/, heads/"):
        Registry(tmp_path)
    with pytest.raises(CellbenchError, match="no such folder"):
        Registry(tmp_path / "missing")


def test_code_beside_a_card_is_found_and_imported_only_when_built(tmp_path: Path) -> None:
    written(tmp_path, '# Mine\nbuilder = "mine.py:build"\n')
    card = Registry(tmp_path).head("mine")  # the file is not even there yet
    with pytest.raises(CellbenchError, match=r"mine\.toml.*there is no file"):
        load(card)
    (tmp_path / "heads" / "mine.py").write_text("def build():\n    return 'built'\n")
    assert load(card)() == "built"


@pytest.mark.parametrize(
    "builder",
    ["cellbench.models.heads.bilinear", "bilinaer", "cellbench.heads.bilinaer:Bilinear", "cellbench.models.heads.bilinear:Bilinaer"],
)
def test_a_builder_that_names_nothing_is_refused_by_its_card(tmp_path: Path, builder: str) -> None:
    written(tmp_path, f'# Mine\nbuilder = "{builder}"\n')
    with pytest.raises(CellbenchError, match=r"mine\.toml: builder = "):
        load(Registry(tmp_path).head("mine"))


def test_options_come_from_the_card_and_the_runs_own_lie_over_them() -> None:
    run = Registry().complete(RunSpec(backbone="uni", head="detail", options={"width": 32}))
    assert run.options == {**Registry().head("detail").options, "width": 32}


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (RunSpec(backbone="uni", head="fpn", options={"widht": 3}), "[head.fpn]: no setting called 'widht'. Did you mean 'width'?"),
        (RunSpec(backbone="uni", head="fpn", options={"epohcs": 3}), "[head.fpn]: no setting called 'epohcs'. Did you mean 'epochs'?"),
        (RunSpec(backbone="uni", head="fpn", options={"width": "3"}), "[head.fpn] width = '3': a whole number is expected"),
        (RunSpec(backbone="uni", head="fpn", options={"width": 3.5}), "width = 3.5: a whole number is expected"),
        (RunSpec(backbone="uni", head="fpn", options={"width": True}), "width = True: a whole number is expected"),
        (RunSpec(baseline="otsu", options={"cells": 3}), "[baseline.otsu] cells = 3: a string is expected"),
        (RunSpec(backbone="unl", head="fpn"), "Did you mean 'uni'?"),
        (RunSpec(baseline="otsi"), "Did you mean 'otsu'?"),
        (RunSpec(backbone="uni", head="fpn", loss="0.5 ce + dcie"), "no loss called 'dcie'. Did you mean 'dice'?"),
        (RunSpec(backbone="uni", head="fpn", augmentations="0.3 blur"), "no augmentation called 'blur'."),
    ],
)
def test_a_part_or_option_that_no_card_has_is_refused(run: RunSpec, says: str) -> None:
    with pytest.raises(CellbenchError) as caught:
        Registry().complete(run)
    assert says in str(caught.value)


def test_a_whole_number_will_do_for_a_number_and_becomes_one() -> None:
    filled = with_defaults({"share": 0.5, "name": "a"}, {"share": 1}, "x")
    assert filled == {"share": 1.0, "name": "a"}
    assert isinstance(filled["share"], float)


def test_changed_code_of_ones_own_is_another_part(tmp_path):
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "mine.toml").write_text('# mine\nbuilder = "mine.py:Mine"\n')
    digests = []
    for text in ("class Mine: ...", "class Mine: pass"):
        (tmp_path / "heads" / "mine.py").write_text(text)
        digests.append(code_digest(Registry(tmp_path).head("mine")))
    assert digests[0] != digests[1]
    assert code_digest(Registry().head("fpn")) == ""


def test_a_builder_of_the_package_has_a_short_name_and_users_may_name_its_path(tmp_path):
    written(tmp_path, HEAD, name="short")
    written(tmp_path, '# A head\nbuilder = "cellbench.models.heads.bilinear:Bilinear"\n', name="long")
    registry = Registry(tmp_path)
    assert load(registry.head("short")) is load(registry.head("long"))


def test_settings_of_a_drawing_need_a_builder(tmp_path):
    written(tmp_path, "# Mine\n[draw]\nnum_train = 1\n", kind="datasets")
    with pytest.raises(CellbenchError, match="builder must name the function"):
        Registry(tmp_path).dataset("mine")
