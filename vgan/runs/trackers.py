"""Experiment trackers: Weights & Biases, Trackio and MLflow.

A tracker gets the scalars and grids of TensorBoard, under the same names, against cur_nimg.
"""

import json
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vgan.config import TrackerConfig
from vgan.runtime.distributed import print0, rank
from vgan.runtime.errors import UserError, first_line
from vgan.runtime.extras import install_extra
from vgan.runtime.files import write_atomically
from vgan.runtime.nested import flatten

Values = Mapping[str, float | str]


class Tracker(Protocol):
    """A run in a tracker, which the constructor begins, or continues if it is given an id."""

    id: str

    def __init__(self, project: str, name: str, config: dict[str, Any], id: str | None) -> None: ...

    @staticmethod
    def prepare() -> tuple[type[Exception], ...]:
        """Import the library, log in, and return the errors that its calls may raise.

        Raises ImportError where it is not installed, UserError where it refuses the login.
        """
        ...

    def log(self, cur_nimg: int, values: Values) -> None:
        """Report scalars and texts."""
        ...

    def image(self, cur_nimg: int, name: str, grid: np.ndarray) -> None:
        """Report an image (H, W) or (H, W, 3) uint8."""
        ...

    def close(self) -> None:
        """Send what waits, and end the run."""
        ...


class WandbTracker:
    """A run in Weights & Biases."""

    @staticmethod
    def prepare() -> tuple[type[Exception], ...]:
        import wandb

        if wandb.setup().settings.mode not in ("offline", "disabled"):
            try:
                wandb.login()
            except wandb.Error as e:
                fix = "or set WANDB_MODE=offline, or give tracker=none"
                raise UserError(f"tracker=wandb: {first_line(e).rstrip('.')}; {fix}") from e
        return wandb.Error, OSError

    def __init__(self, project: str, name: str, config: dict[str, Any], id: str | None) -> None:
        import wandb

        self._wandb, self.id = wandb, id or secrets.token_hex(8)
        self._run = wandb.init(
            project=project,
            name=name,
            id=self.id,
            resume="allow",
            config=config,
            allow_val_change=True,
            settings=wandb.Settings(console="off"),
        )
        # W&B's own step cannot go back, as cur_nimg does after a roll-back or a kill.
        self._run.define_metric("cur_nimg")
        self._run.define_metric("*", step_metric="cur_nimg")

    def log(self, cur_nimg: int, values: Values) -> None:
        self._run.log({**values, "cur_nimg": cur_nimg})

    def image(self, cur_nimg: int, name: str, grid: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(Image.fromarray(grid)), "cur_nimg": cur_nimg})

    def close(self) -> None:
        self._run.finish()


class TrackioTracker:
    """A run in Trackio, which knows runs by their names."""

    @staticmethod
    def prepare() -> tuple[type[Exception], ...]:
        import trackio  # noqa: F401

        # Errors of the network come from whichever of these the Hub's client uses.
        clients = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
        return OSError, RuntimeError, ValueError, *(client.HTTPError for client in clients)

    def __init__(self, project: str, name: str, config: dict[str, Any], id: str | None) -> None:
        import trackio

        self._trackio, self.id = trackio, id or f"{name}-{secrets.token_hex(2)}"
        self._run = trackio.init(project=project, name=self.id, config=config, resume="allow")

    def log(self, cur_nimg: int, values: Values) -> None:
        self._run.log(dict(values), step=cur_nimg)

    def image(self, cur_nimg: int, name: str, grid: np.ndarray) -> None:
        self._run.log({name: self._trackio.Image(Image.fromarray(grid))}, step=cur_nimg)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """A run in MLflow."""

    @staticmethod
    def prepare() -> tuple[type[Exception], ...]:
        from mlflow.exceptions import MlflowException

        return MlflowException, OSError

    def __init__(self, project: str, name: str, config: dict[str, Any], id: str | None) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(project)
        self.id = mlflow.start_run(run_id=id, run_name=None if id else name).info.run_id
        if id is None:  # MLflow refuses to change a parameter
            mlflow.log_params(flatten(config))

    def log(self, cur_nimg: int, values: Values) -> None:
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        numbers = {name: float(value) for name, value in values.items() if name not in texts}
        self._mlflow.log_metrics(numbers, step=cur_nimg)
        self._mlflow.set_tags(texts)

    def image(self, cur_nimg: int, name: str, grid: np.ndarray) -> None:
        self._mlflow.log_image(Image.fromarray(grid), key=name, step=cur_nimg)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, type[Tracker]] = {
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
    "mlflow": MlflowTracker,
}


class Reporter:
    """The tracker of a run, if it has one. Its first failure prints a warning and ends its use."""

    def __init__(
        self, name: str, tracker: Tracker | None = None, errors: tuple[type[Exception], ...] = ()
    ) -> None:
        self._name, self._tracker, self._errors = name, tracker, errors

    def log(self, cur_nimg: int, values: Values) -> None:
        """Report scalars and texts."""
        self._try(lambda tracker: tracker.log(cur_nimg, values))

    def image(self, cur_nimg: int, name: str, grid: np.ndarray) -> None:
        """Report an image (H, W) or (H, W, 3) uint8."""
        self._try(lambda tracker: tracker.image(cur_nimg, name, grid))

    def close(self) -> None:
        """Send what waits, and end the run in the tracker."""
        self._try(lambda tracker: tracker.close())

    def _try(self, call: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            call(self._tracker)
        except self._errors as e:
            self._tracker = None
            print0(f"\n{_failure(self._name, e)}; training continues without it")


def require_tracker(cfg: TrackerConfig) -> None:
    """Raise UserError unless the tracker is installed and, where it needs that, logged in."""
    if cfg.name != "none" and rank() == 0:
        _prepare(cfg.name)


def start_tracker(
    cfg: TrackerConfig, run_dir: Path, config: dict[str, Any], cur_nimg: int
) -> Reporter:
    """Begin a run in the tracker on rank 0, or continue the one that tracker.json names.

    Raises UserError where it cannot be begun. A run of vgan that is resumed, at cur_nimg images,
    goes on without it instead.
    """
    if cfg.name == "none" or rank() != 0:
        return Reporter(cfg.name)
    errors = _prepare(cfg.name)
    path = run_dir / "tracker.json"
    ids, name = _read_ids(path), run_dir.resolve().name
    try:
        tracker = TRACKERS[cfg.name](cfg.project, name, config, ids.get(cfg.name))
    except errors as e:
        failure = _failure(cfg.name, e)
        if cur_nimg == 0:
            raise UserError(f"{failure}; give tracker=none to train without it") from e
        print0(f"{failure}; training continues without it")
        return Reporter(cfg.name)
    write_atomically(path, json.dumps({**ids, cfg.name: tracker.id}).encode())
    return Reporter(cfg.name, tracker, errors)


def _prepare(name: str) -> tuple[type[Exception], ...]:
    try:
        return TRACKERS[name].prepare()
    except ImportError as e:
        fix = f"{install_extra(name)}, or give tracker=none"
        raise UserError(f"tracker={name}: cannot be imported ({first_line(e)}); {fix}") from e


def _read_ids(path: Path) -> dict[str, str]:
    """Return the id of the run in each tracker. Raises UserError for a damaged file."""
    if not path.is_file():
        return {}
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): str(id) for name, id in ids.items()}
    except (ValueError, AttributeError) as e:
        fix = "delete it to begin a new run in the tracker"
        raise UserError(f"{path}: cannot be read ({first_line(e)}); {fix}") from e


def _failure(name: str, e: Exception) -> str:
    return f"tracker={name}: {first_line(e)}"
