"""Imports run down the list of folders, and importing vgan changes nothing global."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "vgan"
# From top to bottom: a file imports from its own folder and from those below it.
ORDER = ["__main__", "train", "cli", "help", "apps", "training", "evaluation", "inference", "runs"]
ORDER += ["models", "data", "validation", "config", "schema", "runtime"]
ALLOWED = {
    "hydra": {"cli", "help", "runtime"},
    "tensorboard": {"runs"},
    "starlette": {"apps"},
}


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_run_downward_without_cycles() -> None:
    files = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"]
    modules = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in files}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        folder = module.split(".")[0]
        names = imports(path)
        own = {n.removeprefix("vgan.") for n in names if n.startswith("vgan.")}
        graph[module] = {n if n in modules else n.rpartition(".")[0] for n in own} & modules.keys()
        for other in graph[module]:
            below = ORDER.index(folder) <= ORDER.index(other.split(".")[0])
            assert below, f"vgan.{module} imports vgan.{other} from above it"
        for library, folders in ALLOWED.items():
            used = any(library in name.split(".") for name in names)
            assert not used or folder in folders, f"vgan.{module} imports {library}"
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_import_is_cheap_and_changes_nothing() -> None:
    code = "import sys, vgan; assert 'torch' not in sys.modules; assert vgan.load_generator"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_commands_start_without_the_compiler() -> None:
    """It takes 3 seconds to import; only compiled runs need it."""
    code = "import sys, vgan.training.train, vgan.inference.sample; "
    code += "assert not {'torch._dynamo', 'torch.distributed.fsdp'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_function_swallows_every_exception() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in ("Exception", "BaseException", "everything"), path.name
