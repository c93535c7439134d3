"""Frozen ImageNet classifiers of torchvision, as feature networks."""

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vgan.runtime.errors import UserError, first_line

# Of each backbone the layers of `features` after which maps are taken: 1/4 to 1/32 of the width.
TAPS = {
    "mobilenet_v2": (3, 6, 13, 17),
    "efficientnet_b0": (2, 3, 5, 7),
    "convnext_tiny": (1, 3, 5, 7),
}
_UNREADABLE = (
    OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError,
)  # fmt: skip
_FIX = "give a .pth or .safetensors file of torchvision's weights"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for values in [0, 1]


class Backbone(nn.Module):
    """The convolutional layers of a torchvision classifier: images -> maps of the layers `taps`.

    taps: layers of torchvision's `features`; by default four, of 1/4 to 1/32 of the width. Always
    in evaluation mode. `fold` turns its weights into buffers that no state_dict contains.
    """

    def __init__(self, name: str, taps: Sequence[int] | None = None) -> None:
        super().__init__()
        if name not in TAPS:
            raise ValueError(f"backbone={name}: unknown; use one of {', '.join(TAPS)}")
        # Imported here because it brings torch's compiler along, which takes seconds.
        import torchvision

        self.name = name
        network = torchvision.models.get_model(name, weights=None)
        self.taps = tuple(taps or TAPS[name])
        self.features = network.features[: self.taps[-1] + 1]
        self.channels = [last_channels(self.features[i]) for i in self.taps]
        mean, std = torch.tensor(_MEAN), torch.tensor(_STD)
        self.register_buffer("gain", (0.5 / std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("offset", ((0.5 - mean) / std).view(1, 3, 1, 1), persistent=False)

    gain: Tensor
    offset: Tensor

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return maps (N, C, H, W) of `taps` from images (N, 3, H, W) in [-1, 1]."""
        x = x * self.gain + self.offset
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                maps.append(x)
        return maps

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(False)

    def load(self, weights: str, key: str) -> str:
        """Load torchvision's weights ('auto'), or those of a file; return their digest.

        The digest is the first 16 digits of a SHA-256. Raises UserError, which names `key`, if the
        weights cannot be had or do not fit.
        """
        where = f"{key}={weights}"
        if weights == "auto":
            state = _download(self.name, key)
        else:
            state = _read(Path(weights).expanduser(), where)
        prefix = "features."
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        own = self.features.state_dict()
        wrong = [k for k in own if k not in state or state[k].shape != own[k].shape]
        if wrong:
            fix = f"give torchvision's weights of {self.name}"
            raise UserError(f"{where}: does not fit {self.name} (features.{wrong[0]}); {fix}")
        self.features.load_state_dict({k: state[k] for k in own})
        self.eval()
        digest = hashlib.sha256()
        for name, value in sorted(self.features.state_dict().items()):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def fold(self) -> "Backbone":
        """Fold batch normalisation into the convolutions and freeze the weights; return self."""
        for module in list(self.features.modules()):
            if not isinstance(module, nn.Sequential):
                continue
            for i in range(len(module) - 1):
                conv, norm = module[i], module[i + 1]
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    module[i], module[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
        for module in self.features.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)
            module._non_persistent_buffers_set |= set(module._buffers)
        return self


def last_channels(layer: nn.Module) -> int:
    """Return the output channels of a layer: those of its last convolution or linear layer."""
    convs = [m for m in layer.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    weight = convs[-1].weight
    return weight.shape[0]


def _download(name: str, key: str) -> dict[str, Tensor]:
    import torchvision

    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except _UNREADABLE as e:  # no network, another digest, a damaged file in the cache
        problem = f"{weights.url} cannot be had ({first_line(e)})"
        raise UserError(f"{key}=auto: {problem}; give the file as {key}=PATH") from e
    return state


def _read(path: Path, where: str) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:  # its message is a page of advice
        raise UserError(f"{where}: not a file of weights; {_FIX}") from e
    except _UNREADABLE as e:
        raise UserError(f"{where}: cannot be read ({first_line(e)}); {_FIX}") from e
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{where}: holds no weights; {_FIX}")
    return state
