"""Sizes of feature maps: how many stages lie between the coarsest map and the image."""

from collections.abc import Sequence

from vgan.runtime.images import Resolution, count_halvings, height_width, parse_resolution

CHECKPOINTING_PX = 512  # from here on activations are recomputed by default


def count_stages(
    img_resolution: int | Sequence[int], img_channels: int, widths: Sequence[int], patch_size: int
) -> int:
    """Return the number of stages from `coarsest_size` to img_resolution / patch_size.

    Raises ValueError where the sizes do not fit together.
    """
    try:
        side = min(height_width(parse_resolution(img_resolution)))
    except ValueError as e:
        raise ValueError(f"img_resolution={img_resolution}: {e}") from e
    if img_channels not in (1, 3, 4):
        raise ValueError(f"img_channels={img_channels}: must be 1 (grey), 3 (RGB) or 4 (RGBA)")
    if patch_size not in (1, 2, 4, 8):
        raise ValueError(f"patch_size={patch_size}: must be 1, 2, 4 or 8")
    stages = count_halvings(side // patch_size) + 1
    if stages < 1:
        raise ValueError(f"patch_size={patch_size}: too large for {side} px")
    missing = stages - len(widths)
    if missing > 0:
        raise ValueError(
            f"widths={list(widths)}: {side // patch_size} px needs {stages} of them, "
            f"from 4 px up; add {missing}"
        )
    return stages


def coarsest_size(img_resolution: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width of the coarsest feature map, 4 x 4 where sides are powers of two.

    The shorter side has 4 to 7 px: [64, 96] gives (4, 6).
    """
    height, width = height_width(parse_resolution(img_resolution))
    step = 2 ** count_halvings(min(height, width))
    return height // step, width // step


def default_patch_size(img_resolution: int | Sequence[int]) -> int:
    """Return the patch size at which the finest map has 16 to 31 px, or the largest, 8."""
    side = min(height_width(parse_resolution(img_resolution)))
    return 2 ** min(3, count_halvings(side) - 2)


def needs_checkpointing(gradient_checkpointing: bool | None, resolution: Resolution) -> bool:
    """Return whether to recompute activations; None: from CHECKPOINTING_PX on."""
    if gradient_checkpointing is None:
        return max(height_width(resolution)) >= CHECKPOINTING_PX
    return gradient_checkpointing
