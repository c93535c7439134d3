"""vgan: train generative adversarial networks end to end, on a laptop or a GPU."""

from typing import Any

__version__ = "0.2.0"
__all__ = ["__version__", "load_generator"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `import vgan` stays fast and does not import torch.
    if name == "load_generator":
        from vgan.inference.load import load_generator

        return load_generator
    raise AttributeError(f"module 'vgan' has no attribute {name!r}")
