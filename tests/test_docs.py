"""What the pages say: commands are accepted, the first ones really run, links lead somewhere, snippets work, tables are true."""

import itertools
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from test_architecture import FLOORS
from test_cli import QUICK, TINY, Cli

from vgan import cli, config

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
SCRIPTS = set(
    re.findall(r"^(vgan-\w+) = ", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
)
KEYS = runpy.run_path(str(ROOT / "scripts" / "list_keys.py"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+")
FILES = re.compile(r"# ([\w/]+\.(?:py|yaml))\n")  # the first line of a block that is a file


def prose(text: str) -> str:
    return INDENTED.sub("", FENCE.sub("", text))


def lines_of(text: str) -> list[str]:
    """Shell lines of code blocks, with those that end in a backslash joined."""
    blocks = [body for kind, body in FENCE.findall(text) if kind in ("", "sh", "bash")]
    return re.sub(
        r"\\\n\s*", " ", "\n".join([*blocks, *INDENTED.findall(FENCE.sub("", text))])
    ).splitlines()


def mentioned(text: str) -> list[str]:
    """Commands within sentences, which may leave out what must be given."""
    return re.findall(r"`((?:uv run )?vgan-\w+ [^`]+)`", re.sub(r"\s+", " ", prose(text)))


def commands_in(lines: list[str]) -> list[list[str]]:
    """Words of every command of vgan's, without what is put before it."""
    found = []
    for command in itertools.chain.from_iterable(line.split(" && ") for line in lines):
        words = [word for word in shlex.split(command, comments=True) if word != "..."]
        while words and (
            words[:2] == ["uv", "run"]
            or re.fullmatch(r"[A-Z]+=.*", words[0])
            or words[0] == "--with"
        ):
            words = words[1 if "=" in words[0] else 2 :]
        program = words[0] if words else ""
        if program.startswith(("vgan-", "torchrun")) or (
            program.startswith("python") and "scripts/" in words[1]
        ):
            found.append(words)
    return found


def section(title: str) -> list[list[str]]:
    """The commands of a section of README.md."""
    return commands_in(
        lines_of(TEXTS["README.md"].partition(f"## {title}")[2].partition("\n## ")[0])
    )


COMMANDS = [
    (page, words, True) for page, text in TEXTS.items() for words in commands_in(lines_of(text))
]
COMMANDS += [
    (page, words, False) for page, text in TEXTS.items() for words in commands_in(mentioned(text))
]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that pages tell to write."""
    folder = tmp_path_factory.mktemp("workshop")
    for text in TEXTS.values():
        for _, body in FENCE.findall(text):
            if named := FILES.match(body):
                (folder / named[1]).parent.mkdir(parents=True, exist_ok=True)
                (folder / named[1]).write_text(body.removeprefix(named[0]), encoding="utf-8")
    return folder


def overrides_of(words: list[str]) -> tuple[str, list[str]]:
    """The command that must accept them, and KEY=VALUE words. Programs and options that are not there fail here."""
    program, rest = words[0], words[1:]
    if program == "torchrun":
        assert rest[rest.index("-m") + 1] == "vgan.training.train"
        return "vgan-train", rest[rest.index("-m") + 2 :]
    if program.startswith("python"):
        source = (ROOT / rest[0]).read_text(encoding="utf-8")
        options = [word for word in rest if word.startswith("--")]
        assert all(f'"{option.partition("=")[0]}"' in source for option in options), (
            f"{rest[0]} has no such option: {options}"
        )
        return "vgan-train", [word for word in rest[1:] if re.match(r"[+~]*[\w./]+=", word)]
    assert program in SCRIPTS, f"{program}: no such command"
    assert callable(getattr(cli, f"{program.removeprefix('vgan-')}_main"))
    if program == "vgan-data" and rest and re.fullmatch(r"\w+", rest[0]):
        rest = [f"do={rest[0]}", *rest[1:]]
    return program, rest


def compositions(program: str, words: list[str], folder: Path) -> Iterator[Any]:
    """What each job of a command would be started with."""
    own = [
        f"hydra.searchpath=[file://{folder / w.partition('=')[2]}]"
        for w in words
        if w.startswith("--config-dir=")
    ]
    words = [
        w
        for w in words
        if w not in ("-m", "--help", "--cfg", "job") and not w.startswith(("--config-dir", "hydra"))
    ]
    parsed = OverridesParser.create().parse_overrides(words)
    choices = [
        [f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in parsed
    ]
    with initialize_config_dir(str(config.CONFIG_DIR), version_base="1.3"):
        for job in itertools.product(*choices):
            yield compose(KEYS["commands"]()[program][0], [*own, *map(str, job)])


@pytest.mark.parametrize(
    ("page", "words", "whole"),
    COMMANDS,
    ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else str(x),
)
def test_every_command_is_accepted(
    page: str, words: list[str], whole: bool, workshop: Path
) -> None:
    program, given = overrides_of(words)
    name, schema = KEYS["commands"]()[program]
    check = (
        config.validate
        if name == "train"
        else getattr(config, f"validate_{name}", lambda cfg: None)
    )
    for cfg in compositions(program, given, workshop):
        check(cfg)
        mine = OmegaConf.masked_copy(cfg, [f.name for f in fields(schema)])
        OmegaConf.to_container(
            mine, resolve=True, throw_on_missing=whole and "--help" not in given
        )  # what must be given is


def test_commands_were_found_on_the_pages_that_have_them() -> None:
    counts = {page: sum(page == other for other, _, whole in COMMANDS if whole) for page in TEXTS}
    assert counts["README.md"] > 25
    assert (
        min(
            counts[page]
            for page in (
                "own-pictures.md",
                "recipes.md",
                "configuration.md",
                "quality.md",
                "performance.md",
            )
        )
        > 4
    )
    told = {words[0] for _, words, _ in COMMANDS}
    assert told >= SCRIPTS, f"no page shows {SCRIPTS - told}"
    assert "pip install uv && uv run pytest" in TEXTS["README.md"]


# --- what runs ------------------------------------------------------------------------------------------------------

SMALL = {
    "vgan-train": TINY,
    "vgan-sample": ["n=null", "frames=2", "device=cpu"],
    "vgan-eval": [word for word in QUICK if not word.startswith("features=")],
    "vgan-report": [],
    "vgan-data": ["data.resolution=16", "data.size=64"],
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(monkeypatch, capsys)


def obey(run: Cli, words: list[str]) -> str:
    """Give a page's command, made small; its output."""
    code, out, err = run(
        getattr(cli, f"{words[0].removeprefix('vgan-')}_main"), *words[1:], *SMALL[words[0]]
    )
    assert code == 0, err
    return out


def test_the_first_five_minutes(run: Cli, tmp_path: Path) -> None:
    train, sample, report, evaluate, data = (
        words for words in section("Five minutes") if words[0] in SCRIPTS
    )
    assert (train[0], evaluate[0]) == ("vgan-train", "vgan-eval")
    assert "Done: 32 images" in obey(run, train)
    for words in (sample, report, data):
        obey(run, words)
    for name in (
        "grid.png",
        "contact.png",
        "outputs/shapes-attn-xs/report.html",
        "outputs/shapes-attn-xs/fakes-000000032.png",
    ):
        assert (tmp_path / name).stat().st_size > 500


def test_their_evaluation(run: Cli, tmp_path: Path) -> None:
    train, evaluate = (
        words for words in section("Five minutes") if words[0] in ("vgan-train", "vgan-eval")
    )
    obey(run, train)
    assert "64 training pictures of 16 px" in obey(run, evaluate)
    assert "protocol" in (tmp_path / "outputs" / "shapes-attn-xs" / "metrics.jsonl").read_text(
        encoding="utf-8"
    )


def test_films_and_sheets_of_the_readme(run: Cli, tmp_path: Path) -> None:
    obey(run, ["vgan-train"])
    given = [words for words in section("Drawing") if "ckpt=outputs/shapes-attn-xs" in words]
    names = [next(word[4:] for word in words if word.startswith("out=")) for words in given]
    assert names == ["film.webp", "attention.png", "patches.png", "classes.png"]
    for words in given:
        small = SMALL["vgan-sample"][1 if any(word.startswith("n=") for word in words) else 0 :]
        code, _, err = run.sample(*words[1:], *small)
        assert code == 0, err
    assert all((tmp_path / name).stat().st_size > 500 for name in names)


def test_parts_of_ones_own_plug_in(
    run: Cli, workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's network, data set, optimizer and features; then its lines that load what came of it."""
    monkeypatch.chdir(workshop)
    monkeypatch.syspath_prepend(str(workshop))
    words = next(
        words
        for words in commands_in(lines_of(TEXTS["configuration.md"]))
        if "model=tower" in words
    )
    small = [w for w in TINY if w != "data=shapes"]
    code, out, err = run.train(*words[1:], *small, "eval_kimg=0.032", "eval.n=20")
    assert code == 0, err
    assert "stripes: 64 images of 16 px, 1 channels" in out
    assert "fid" in out
    code, _, err = run.sample("ckpt=outputs/stripes-tower-xs", "device=cpu")
    assert "a checkpoint may name vgan's own classes only" in err  # as the page says
    exec_snippet(
        next(body for body in snippets("configuration.md") if "outputs/stripes-tower-xs" in body)
    )


def snippets(page: str) -> list[str]:
    return [
        body
        for kind, body in FENCE.findall(TEXTS[page])
        if kind == "python" and not FILES.match(body)
    ]


def exec_snippet(body: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(body, "snippet", "exec"), names)
    return names


def test_snippets_run(run: Cli) -> None:
    run.train(*TINY, "run_dir=outputs/mine")
    (body,) = snippets("README.md")
    assert exec_snippet(body)["images"].shape == (16, 3, 16, 16)
    others = [
        page for page in TEXTS if page not in ("README.md", "configuration.md") and snippets(page)
    ]
    assert others == [], "give these pages' snippets a test"


# --- what is said ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[page])):
        if re.match(r"https?:", target):
            continue
        place, _, anchor = target.partition("#")
        path = PAGES[page].parent / place if place else PAGES[page]
        assert path.exists(), f"{page}: {target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in [
                re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings
            ], f"{page}: {target}"


def test_every_page_and_picture_is_in_use_and_light() -> None:
    for page in PAGES.values():
        if page.name != "README.md":
            assert f"(docs/{page.name})" in TEXTS["README.md"], (
                f"README.md does not list {page.name}"
            )
    shown = {
        os.path.basename(target)
        for text in TEXTS.values()
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    }
    for picture in (ROOT / "docs" / "img").iterdir():
        assert picture.name in shown, f"{picture.name} is on no page"
        assert picture.stat().st_size < 300_000, f"{picture.name} is too heavy"


def test_the_tables_of_keys_say_what_the_schemas_say() -> None:
    page = TEXTS["configuration.md"]
    assert KEYS["written"](page) == page, (
        "uv run python scripts/list_keys.py brings docs/configuration.md up to date"
    )
    for _, schema in KEYS["commands"]().values():
        for key, text in config.explained_keys(schema):
            assert f"| `{key}` |" in page
            assert text.replace("|", "\\|") in page


def test_the_page_of_floors_is_the_house() -> None:
    rows = re.findall(r"^\|[^|]*\| ((?:`\w+` ?)+)\|", TEXTS["architecture.md"], re.M)
    assert [set(re.findall(r"\w+", row)) for row in rows] == FLOORS, (
        "name every file of FLOORS in docs/architecture.md"
    )


def test_every_preset_has_its_recipe() -> None:
    for path in (config.CONFIG_DIR / "experiment").glob("*.yaml"):
        assert f"| `{path.stem}` |" in TEXTS["recipes.md"], (
            f"recipes.md does not tell of experiment={path.stem}"
        )
        assert f"experiment={path.stem}" in TEXTS["recipes.md"]


def test_pages_keep_house_rules() -> None:
    for page, text in TEXTS.items():
        assert not re.search(r"/(?:tmp|root|home|work)/|\bpypi\.", text), (
            f"{page} names a machine's own path"
        )
    assert sys.version_info >= (3, 10)  # as README.md says
