"""Attention."""

from vgan.models.layers import SelfAttention2d

__all__ = ["SelfAttention2d"]
