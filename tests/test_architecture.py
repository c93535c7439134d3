"""The floors of the house: a file imports from lower floors only, and importing vgan changes nothing global."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "vgan"
FLOORS = [
    {"errors"},
    {"distributed"},
    {"config", "console", "device", "files", "images", "kernels", "randomness", "stopping"},
    {
        "augment",
        "charts",
        "controls",
        "data",
        "ema",
        "losses",
        "metrics",
        "models",
        "motion",
        "movies",
        "penalties",
        "reproduce",
        "schedules",
        "watchdog",
    },
    {"build", "checkpoint", "features", "play", "stats", "steps", "usage"},
    {"attention", "drawing", "parallel", "runlog", "static_page", "writer"},
    {"evaluate", "run"},
    {"resume", "trial", "watching"},
    {"datasets", "demo", "export", "report", "sample", "speed", "train"},
    {"doctor"},
    {"cli"},
]
GROUND = {"data": "source", "models": "layers"}  # the file of a folder that its neighbours may import
ALLOWED = {
    "hydra": {"build", "cli"},
    "omegaconf": {"config", "build", "cli", "datasets", "demo", "doctor", "evaluate", "export", "report", "sample", "train"},
    "tensorboard": {"stats"},
}


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports anywhere in it."""
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if __name__ ==")]  # a program's own door
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "vgan" else {str(node.module)}
    return names


def floor(part: str) -> int:
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


def test_imports_run_downward() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "__init__.py":
            continue
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        for name in imports(path):
            if not name.startswith("vgan."):
                continue
            other = tuple(name.split(".")[1:])
            if len(parts) == 2 and parts[0] == other[0]:
                assert other[1] == GROUND[parts[0]], f"{path.name} imports its neighbour {name}"
            else:
                assert floor(other[0]) < floor(parts[0]), f"{path.name} imports {name} from its own floor or above"


def test_libraries_stay_in_their_rooms() -> None:
    for path in PACKAGE.rglob("*.py"):
        for name in imports(path):
            for library, rooms in ALLOWED.items():
                assert library not in name.split(".") or path.stem in rooms, f"{path.name} imports {name}"


def test_import_is_cheap_and_changes_nothing() -> None:
    code = "import sys, vgan; assert 'torch' not in sys.modules; assert vgan.__version__; assert 'load_generator' in vgan.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_commands_start_without_the_compiler() -> None:
    """It takes 3 seconds to import; only compiled runs need it."""
    code = "import sys, vgan.train, vgan.sample; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_function_swallows_every_exception() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in ("Exception", "BaseException", "everything"), f"{path.name}:{node.lineno}"
