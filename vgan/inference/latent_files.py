"""Files of latents: .npy arrays of float32 with an image in a row, z and then its c."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgan.models.generator import GeneratorBase
from vgan.runtime.errors import UserError, first_line

MAX_LATENTS = 1_000_000  # of a file


def latents_npy(z: Tensor, c: Tensor) -> bytes:
    """Return the .npy file of z (N, z_dim) and c (N, label_dim), which `read_latents` reads."""
    buffer = io.BytesIO()
    np.save(buffer, torch.cat([z, c], dim=1).float().cpu().numpy())
    return buffer.getvalue()


def read_latents(names: Any, G: GeneratorBase) -> tuple[Tensor, Tensor | None]:
    """Return z (N, z_dim) and c (N, label_dim) of one .npy file or a list of them, on G's device.

    c is None where the files hold z alone. Raises UserError for what does not fit G.
    """
    files = names if isinstance(names, (list, tuple)) else [names]
    rows = [_read(str(name), G) for name in files]
    widths = {row.shape[1] for row in rows}
    if len(widths) != 1:
        rule = "must all hold classes, or none of them" if rows else "must name a .npy file"
        raise UserError(f"latent={names}: {rule}")
    values = torch.from_numpy(np.concatenate(rows)).to(next(G.parameters()).device)
    z, c = values[:, : G.z_dim], values[:, G.z_dim :]
    return z, c if c.shape[1] or not G.label_dim else None


def _read(name: str, G: GeneratorBase) -> np.ndarray:
    """Return the float32 rows of one file."""
    try:
        array = np.load(Path(name).expanduser(), mmap_mode="r", allow_pickle=False)
    except OSError as e:
        reason = e.strerror or first_line(e)
        raise UserError(f"latent={name}: cannot be read ({reason}); check the name") from e
    except (ValueError, EOFError, TypeError) as e:
        fix = "give a .npy file that vgan-invert wrote"
        raise UserError(f"latent={name}: not an array ({first_line(e)}); {fix}") from e
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise UserError(f"latent={name}: must hold one array of numbers, as vgan-invert writes it")
    rows = array[None] if array.ndim == 1 else array
    widths = sorted({G.z_dim, G.z_dim + G.label_dim})
    if rows.ndim != 2 or rows.shape[1] not in widths:
        needs = f"this model needs rows of {widths[0]} numbers (z)"
        if G.label_dim:
            needs += f" or {widths[1]} (z and c)"
        raise UserError(f"latent={name}: has shape {array.shape}; {needs}")
    if not 0 < len(rows) <= MAX_LATENTS:
        raise UserError(f"latent={name}: has {len(rows)} rows; must be from 1 to {MAX_LATENTS:,}")
    values = rows.astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"latent={name}: has numbers that are not finite; use an intact file")
    return values
