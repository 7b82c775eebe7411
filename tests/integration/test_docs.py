"""README.md and docs/: the site builds, every command is one, every TOML block is read by its record, and a marked set of blocks is really run.

A comment before a block says what it is. ``<!-- run -->``: its cellbench commands, or its Python, are executed in a folder that all such blocks share;
what follows the colon in ``<!-- run: --limit 2 -->`` is added to ``grid`` and ``search``. ``<!-- dataset -->``: a ``dataset.toml``.
``<!-- fragment -->``: a part of an experiment file.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_data import ROOT, enter, write_pair

from cellbench.cli.main import COMMANDS, read_arguments
from cellbench.config.base import checked
from cellbench.config.cards import KINDS, DatasetCard, read_card
from cellbench.config.experiment import Experiment, expand
from cellbench.config.loading import experiment_path, read_experiment
from cellbench.config.registry import Registry
from cellbench.config.search_space import Space
from cellbench.errors import CellbenchError
from cellbench.metrics.catalog import search_objectives
from cellbench.run import main

sys.path.insert(0, str(ROOT / "docs"))
import generate

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>.+?) -->\n+)?(?:^`(?P<path>[^`\n]+)`\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
LANGUAGES = {"bash", "toml", "python", "text"}
PROGRAMS = {"cd", "docker", "export", "git", "hf", "mlflow", "pytest", "source", "uv", "ray"}
"""Programs beside cellbench, make and pip that a page may call."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    mark: str
    path: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> Iterator[list[str]]:
        """The words of each command of a shell block."""
        for line in self.text.replace("\\\n", " ").splitlines():
            for command in re.split(r"\s&&\s", line):
                if words := shlex.split(command, comments=True):
                    yield words


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start("language")) + 1
            found.append(Block(page, line, *(match[name] or "" for name in ("mark", "path", "language", "text"))))
    return [one for one in found if one.language in languages]


def arguments(words: list[str]) -> list[str] | None:
    """The arguments of a cellbench command; None for another program."""
    if words[0] in ("cellbench", ".venv/bin/cellbench"):
        return words[1:]
    if words[:2] == ["python", "-m"] and words[2:3] in (["cellbench"], ["cellbench.run"]):
        return words[3:]
    return None


# --- what is only checked ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_has_a_language_that_is_checked(page: Path) -> None:
    fences = re.findall(r"^```(\S.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {one for one in fences if not one.startswith("{")} <= LANGUAGES


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_every_command_is_one(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    for words in block.commands:
        if (given := arguments(words)) is not None:
            check_call(given, capsys)
        elif words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets(), words
        elif words[:2] == ["pip", "install"]:
            extras = [extra for word in words for extra in re.findall(r"\[(\w+)\]", word)]
            assert set(extras) <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]), words
        else:
            assert words[0] in PROGRAMS, f"{words[0]}: unknown program"


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.toml")), ids=lambda path: path.name)
def test_an_experiment_says_how_it_is_run(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    calls = re.findall(r"^#.* cellbench ((?:grid|search)\b.*?)(?: +(?:\(|or ).*)?$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert calls
    for call in calls:
        check_call(shlex.split(call), capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_every_command_is_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_call(shlex.split(COMMANDS[command].example), capsys)


def targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def check_call(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The real parser takes the call, and the experiment, cards and settings that it names exist."""
    if {"-h", "--help", "--version"} & set(given) or not given:
        return
    try:
        _, options = read_arguments(given)
    except (CellbenchError, SystemExit) as error:
        pytest.fail(f"cellbench {shlex.join(given)}: {error} {capsys.readouterr().err}")
    command = given[0]
    if command in ("list", "show"):
        assert main(given) == 0
    if getattr(options, "registry", None) is not None:
        return  # the folder of the example is not here
    registry = Registry()
    if command == "grid" and options.file not in ("", "FILE", "my.toml"):
        read_experiment(options.file, options.changes)
    if command == "search" and options.file:
        tree = tomllib.loads(experiment_path(options.file).read_text(encoding="utf-8"))
        Space.of(tree, options.file, registry, search_objectives(registry))
    if getattr(options, "dataset", ""):
        registry.dataset(options.dataset)
    for name in options.names if command == "doctor" else options.backbone if command == "explore" else ():
        registry.backbone(name)


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_every_toml_block_is_read_by_its_record(block: Block, tmp_path: Path) -> None:
    registry = Registry()
    tree = tomllib.loads(block.text)
    if block.path:
        kind, name = Path(block.path).parts[-2:]
        (tmp_path / name).write_text(block.text, encoding="utf-8")
        read_card(tmp_path / name, KINDS[kind])
    elif block.mark == "dataset":
        checked(DatasetCard, {**tree, "id": "mine", "title": "", "path": ""}, str(block))
    elif "space" in tree:
        Space.of(tree, str(block), registry, search_objectives(registry))
    else:
        if block.mark == "fragment":
            tree = {
                "experiment": "mine",
                "dataset": "folder",
                "grid": {"backbone": ["filter-bank"], "head": registry.names("heads")},
            } | tree
        for run in expand(Experiment.of(tree, str(block)), str(block)):
            registry.complete(run)
            registry.dataset(tree["dataset"])


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_every_python_block_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "docs"], ids=lambda page: page.name)
def test_every_link_of_a_page_outside_the_site_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_make_help_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    assert set(re.findall(r'@echo "make ([\w-]+) ', text)) == targets() - {"help"}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


# --- the reference and the site ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", generate.RECORDS)
def test_every_key_of_a_toml_file_has_a_meaning(table: str) -> None:
    texts = generate.documented(generate.RECORDS[table][0])
    assert [key for key, _ in generate.fields(table) if not texts.get(key)] == []


def test_every_command_and_option_is_in_the_reference() -> None:
    text = generate.commands()
    for name, parser in generate.parsers().items():
        section = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
        flags = [flag for action in parser._actions if action.help != "==SUPPRESS==" for flag in action.option_strings]
        assert [flag for flag in flags if flag not in section] == ["-h", "--help"]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    call = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path / "site")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "settings.html").read_text(encoding="utf-8")
    assert "crops_per_image" in page
    assert "{generated}" not in page


# --- what is run ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of someone who follows the pages: images with masks to learn from, and images alone to count."""
    folder = tmp_path_factory.mktemp("reader")
    for seed in range(6):
        write_pair(folder / "MY_FOLDER" / "train", f"a{seed}.png", seed)
        write_pair(folder / "OTHER", f"o{seed}.png", 200 + seed, image="images", mask="masks")
    for seed in range(2):
        write_pair(folder / "MY_FOLDER" / "test", f"t{seed}.png", 100 + seed)
        write_pair(folder, f"p{seed}.png", 300 + seed, image="IMAGES", mask="unused")
    return folder


def marked() -> list[Block]:
    return [one for one in blocks("bash", "python") if one.mark.startswith("run")]


@pytest.mark.parametrize("block", marked(), ids=str)
def test_a_marked_block_runs(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(place, monkeypatch)
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), {})
        return
    more = shlex.split(block.mark.partition(":")[2])
    for words in block.commands:
        given = arguments(words)
        if given and given[0] != "ui":  # a server
            assert main([*given, *(more if given[0] in ("grid", "search") else [])]) == 0, words


def test_blocks_are_run_at_all() -> None:
    verbs = {given[0] for one in marked() if one.language == "bash" for words in one.commands if (given := arguments(words))}
    assert verbs >= {"grid", "predict", "check", "report", "evaluate", "export", "explore"}
