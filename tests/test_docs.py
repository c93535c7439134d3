"""The pages: commands are accepted, the first ones run, links lead somewhere, snippets work."""

import functools
import itertools
import json
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from test_cli import TINY, Cli

from vgan import cli, schema
from vgan.runtime.renamed import upgrade_override
from vgan.validation import validate

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT, ROOT / "docs", ROOT / "docs" / "log")
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for folder in FOLDERS
    for path in sorted(folder.glob("*.md"))
    if path.name != "CHANGELOG.md"
}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
NOTEBOOK = "notebooks/train.ipynb"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+")
FILES = re.compile(r"# ([\w/]+\.(?:py|yaml))\n")  # the first line of a block that is a file


def prose(text: str) -> str:
    """Return a page without its code blocks."""
    return INDENTED.sub("", FENCE.sub("", text))


def lines_of(text: str) -> list[str]:
    """Return the shell lines of a page's code blocks; a backslash joins lines."""
    blocks = [body for kind, body in FENCE.findall(text) if kind in ("", "sh", "bash")]
    blocks += INDENTED.findall(FENCE.sub("", text))
    return re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines()


def mentioned(text: str) -> list[str]:
    """Return commands within sentences, which may leave out mandatory keys."""
    text = re.sub(r"\s+", " ", prose(text))
    return re.findall(r"`((?:uv run |uvx [^`]*)?vgan[- ]\w+ [^`]+)`", text)


def without_prefix(words: list[str]) -> list[str]:
    """Return a command without variables, uv run and containers; vgan train is vgan-train."""
    while words:
        if re.fullmatch(r"[A-Z]+=.*", words[0]):
            words = words[1:]
        elif words[:2] == ["uv", "run"] or words[0] in ("--with", "--from"):
            words = words[2:]
        elif words[0] == "uvx":
            words = words[1:]
        elif words[:2] == ["docker", "run"]:
            words = words[words.index("vgan") :]
        else:
            break
    if words[:1] == ["vgan"] and words[1:] and not words[1].startswith("--"):
        words = [f"vgan-{words[1]}", *words[2:]]
    return words


def commands_in(lines: list[str]) -> list[list[str]]:
    """Return the words of every command of vgan and of its scripts."""
    found = []
    for command in itertools.chain.from_iterable(line.split(" && ") for line in lines):
        words = without_prefix(shlex.split(command, comments=True))
        program = words[0] if words else ""
        is_script = program.startswith("python") and "scripts/" in words[1]
        if is_script or program.startswith(("vgan-", "torchrun")):
            found.append(words)
    return found


def section(title: str) -> list[list[str]]:
    """Return the commands of a section of README.md."""
    _, _, after = TEXTS["README.md"].partition(f"\n## {title}\n")
    return commands_in(lines_of("\n" + after.partition("\n## ")[0]))


def notebook_cells() -> list[str]:
    """Return the code cells of the notebook, without output in any of them."""
    content = json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    return ["".join(cell["source"]) for cell in cells]


def comparisons(page: str) -> list[list[str]]:
    """Return the commands of a page's tables, its shell function and variables expanded."""
    text = TEXTS[page]
    commands = re.findall(r"`ablate \w\S* ([^`]+)`", text)
    for name, value in re.findall(r'^    ([A-Z]+)="(.+)"$', text, re.MULTILINE):
        commands = [command.replace(f"${name}", value) for command in commands]
    always = re.search(r'(size=xs .*) "\$@"', text)
    assert commands
    assert always
    script = ["python", "scripts/ablate.py", *always[1].split()]
    return [[*script, *shlex.split(command)] for command in commands]


COMMANDS = [
    (page, words, True) for page, text in TEXTS.items() for words in commands_in(lines_of(text))
]
COMMANDS += [
    (page, words, False) for page, text in TEXTS.items() for words in commands_in(mentioned(text))
]
COMMANDS += [
    (page, words, True)
    for page in ("docs/results.md", "docs/log/settings.md")
    for words in comparisons(page)
]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages show."""
    folder = tmp_path_factory.mktemp("workshop")
    for text in TEXTS.values():
        for _, body in FENCE.findall(text):
            if named := FILES.match(body):
                path = folder / named[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(body.removeprefix(named[0]), encoding="utf-8")
    return folder


def overrides_of(words: list[str]) -> tuple[str, list[str]]:
    """Return the console script and its KEY=VALUE words; fail for unknown programs and options."""
    program, rest = words[0], words[1:]
    if program == "torchrun":
        assert "--no-python" in rest
        start = rest.index("vgan-train")
        return rest[start], rest[start + 1 :]
    if program.startswith("python"):
        source = (ROOT / rest[0]).read_text(encoding="utf-8")
        options = [word.partition("=")[0] for word in rest if word.startswith("--")]
        unknown = [option for option in options if f'"{option}"' not in source]
        assert not unknown, f"{rest[0]} has no option {unknown}"
        parts = " ".join(rest[1:]).split()  # of --variant too
        return "vgan-train", [word for word in parts if re.match(r"[+~]*[\w./]+=", word)]
    assert program in cli.COMMANDS, f"{program}: no such command"
    if program == "vgan-data" and rest and re.fullmatch(r"\w+", rest[0]):
        rest = [f"do={rest[0]}", *rest[1:]]
    return program, rest


def compositions(program: str, words: list[str], folder: Path) -> Iterator[Any]:
    """Yield the config of each job that a command starts."""
    dropped = ("-m", "--help", "--cfg", "job")
    own = [w.partition("=")[2] for w in words if w.startswith("--config-dir=")]
    search = [f"hydra.searchpath=[file://{folder / name}]" for name in own]
    words = [w for w in words if w not in dropped and not w.startswith(("--config-dir", "hydra"))]
    choices = []
    for o in OverridesParser.create().parse_overrides(words):
        if o.is_interval_sweep():
            value = o.value()
            choices.append([f"{o.key_or_group}={value.start}", f"{o.key_or_group}={value.end}"])
        elif o.is_sweep_override():
            choices.append([f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()])
        else:
            choices.append([o.input_line])
    for job in itertools.product(*choices):
        yield compose(cli.COMMANDS[program].config_name, [*search, *map(str, job)])


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_accepted(page: str, workshop: Path) -> None:
    cli.register_schemas()
    with initialize_config_dir(str(schema.CONFIG_DIR), version_base="1.3"):
        for _, words, whole in (command for command in COMMANDS if command[0] == page):
            check_command(tuple(words), whole, workshop)


@functools.cache  # pages share commands
def check_command(words: tuple[str, ...], whole: bool, workshop: Path) -> None:
    """Fail unless a command composes and its values are allowed; whole: it may lack no key."""
    program, overrides = overrides_of(list(words))
    old = [word for word in overrides if upgrade_override(word) != word]
    assert not old, f"{old}: renamed"
    for cfg in compositions(program, overrides, workshop):
        missing = OmegaConf.missing_keys(cfg)
        needs_all = whole and "--help" not in overrides
        assert not (missing and needs_all), f"{' '.join(words)}: lacks {missing}"
        for key in missing:
            OmegaConf.update(cfg, key, "x")
        validate(schema.typed(cfg))


def test_the_commands_of_the_notebook_are_accepted(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VGAN_SETTINGS", raising=False)
    cells = notebook_cells()
    names = exec_snippet(cells[0])  # the settings
    assert names["run_dir"] == Path("outputs/mine")
    lines = "\n".join(cells).splitlines()
    shell = [line[1:].format(**names) for line in lines if line.startswith("!")]
    commands = commands_in(shell)
    assert len(commands) == len(shell) > 3
    cli.register_schemas()
    with initialize_config_dir(str(schema.CONFIG_DIR), version_base="1.3"):
        for words in commands:
            check_command(tuple(words), True, workshop)
    compile("\n".join(line for line in lines if line[:1] not in "!%"), NOTEBOOK, "exec")


def test_the_pages_show_every_command() -> None:
    shown = {words[0] for _, words, _ in COMMANDS}
    assert shown >= cli.COMMANDS.keys()
    assert len(section("Quick start")) > 4  # the sections that tests run were found
    assert len(section("Sample")) > 4


# --- what runs -----------------------------------------------------------------------------------

SMALL = {
    "vgan-train": TINY,
    "vgan-sample": ["n=null", "frames=2", "device=cpu"],
    "vgan-report": [],
    "vgan-data": ["data.resolution=16", "data.size=64"],
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(monkeypatch, capsys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's first command ran, made small."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.argv", ["vgan-train", *section("Quick start")[0][1:], *TINY])
        cli.train_main()
    return folder


@pytest.fixture
def at_trained(run: Cli, trained: Path, tmp_path: Path) -> Cli:
    """The README's first run, copied into the current folder."""
    shutil.copytree(trained / "outputs", tmp_path / "outputs")
    return run


def obey(run: Cli, words: list[str], small: list[str]) -> str:
    """Run a page's command, made small; return its output."""
    main = getattr(cli, f"{words[0].removeprefix('vgan-')}_main")
    code, out, err = run(main, *words[1:], *small)
    assert code == 0, err
    return out


def test_the_quick_start_runs(at_trained: Cli, tmp_path: Path) -> None:
    train, *others = section("Quick start")
    assert train[0] == "vgan-train"
    evaluated = [words for words in others if words[0] == "vgan-eval"]
    for words in others:
        if words not in evaluated:
            obey(at_trained, words, SMALL[words[0]])
    for name in ("grid.png", "contact.png", "outputs/shapes-attn-xs/report.html"):
        assert (tmp_path / name).stat().st_size > 500
    grids = list((tmp_path / "outputs" / "shapes-attn-xs").glob("fakes-*.png"))
    assert len(grids) > 1


def test_the_quick_start_evaluates(at_trained: Cli, tmp_path: Path) -> None:
    evaluate = next(words for words in section("Quick start") if words[0] == "vgan-eval")
    small = ["features.train_kimg=0.1", "n=40", "batch_size=20", "device=cpu"]
    assert "fid" in obey(at_trained, evaluate, small)
    metrics = tmp_path / "outputs" / "shapes-attn-xs" / "metrics.jsonl"
    assert "protocol" in metrics.read_text(encoding="utf-8")


def test_the_films_and_maps_of_the_readme_are_drawn(at_trained: Cli, tmp_path: Path) -> None:
    given = [words for words in section("Sample") if "ckpt=outputs/shapes-attn-xs" in words]
    names = [next(word[4:] for word in words if word.startswith("out=")) for words in given]
    assert {Path(name).suffix for name in names} == {".webp", ".png"}
    for words in given:
        has_n = any(word.startswith("n=") for word in words)
        obey(at_trained, words, SMALL["vgan-sample"][0 if has_n else 1 :])
    assert all((tmp_path / name).stat().st_size > 500 for name in names)


def test_ones_own_classes_plug_in(
    run: Cli, workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's network, data set, optimizer and features; then its lines that load the result."""
    monkeypatch.chdir(workshop)
    monkeypatch.syspath_prepend(str(workshop))
    commands = commands_in(lines_of(TEXTS["docs/configuration.md"]))
    words = next(words for words in commands if "model=tower" in words)
    small = [w for w in TINY if w != "data=shapes"]
    out = obey(run, words, [*small, "eval_kimg=0.032", "eval.n=20"])
    assert "stripes" in out
    assert "fid" in out
    code, _, err = run.sample("ckpt=outputs/stripes-tower-xs", "device=cpu")
    assert code == 1  # as the page says
    assert "mine.Tower" in err
    bodies = snippets("docs/configuration.md")
    exec_snippet(next(body for body in bodies if "outputs/stripes-tower-xs" in body))


def snippets(page: str) -> list[str]:
    """Return the Python blocks of a page that are to be run."""
    blocks = FENCE.findall(TEXTS[page])
    return [body for kind, body in blocks if kind == "python" and not FILES.match(body)]


def exec_snippet(body: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(body, "snippet", "exec"), names)
    return names


def test_the_snippet_of_the_readme_runs(at_trained: Cli, tmp_path: Path) -> None:
    (tmp_path / "outputs" / "shapes-attn-xs").rename(tmp_path / "outputs" / "mine")
    (body,) = snippets("README.md")
    assert exec_snippet(body)["images"].shape == (16, 3, 16, 16)


def test_no_snippet_is_untested() -> None:
    tested = {"README.md", "docs/configuration.md", "CONTRIBUTING.md"}  # the last shows style only
    assert {page for page in TEXTS if snippets(page)} <= tested


# --- what is said --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_are_there(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[page])):
        if re.match(r"https?:", target):
            continue
        place, _, anchor = target.partition("#")
        path = PAGES[page].parent / place if place else PAGES[page]
        assert path.exists(), f"{page}: {target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, f"{page}: {target}"


def test_the_architecture_page_names_functions_that_exist() -> None:
    """A function named beside a linked file is defined in one of the files of its row."""
    for row in re.findall(r"^\|.*\]\(\.\./vgan.*\.py.*$", TEXTS["docs/architecture.md"], re.M):
        targets = re.findall(r"\]\(\.\./(vgan[^)]*\.py)\)", row)
        source = "".join((ROOT / target).read_text(encoding="utf-8") for target in targets)
        for name in re.findall(r"`([A-Z_]{4,}|[A-Za-z_]+\.\w+|[a-z]+_\w+)`", row):
            last = name.rpartition(".")[2]
            is_pattern = last in ("d_name", "g_name", "yaml")
            assert is_pattern or last in source, f"{name} is not in {targets}"


def test_the_tables_of_keys_are_current() -> None:
    page = TEXTS["docs/configuration.md"]
    fix = "uv run python scripts/list_keys.py brings docs/configuration.md up to date"
    assert runpy.run_path(str(ROOT / "scripts" / "list_keys.py"))["written"](page) == page, fix


def test_every_preset_has_its_recipe() -> None:
    for path in (schema.CONFIG_DIR / "experiment").glob("*.yaml"):
        assert f"experiment={path.stem}" in TEXTS["docs/recipes.md"]
