"""SOAP, a second-order optimizer for layers whose gradients are correlated."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SOAP(torch.optim.Optimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024).

    The gradient of a convolution or linear layer is seen as a matrix g (out, in k k). Running means
    of g g^T and g^T g have eigenvectors U and V. In their basis, g' = U^T g V, the entries are
    nearly uncorrelated, so that dividing each by its own root mean square, as Adam does, loses
    little:

        w <- w - lr U (g' / (sqrt(mean of g'^2) + eps)) V^T

    For a small network in small batches it learns more from an image than Adam, and its products
    cost little beside the convolutions (docs/log/settings.md). The eigenvectors follow by one step
    of orthogonal iteration every `basis_every` steps. Biases have no matrix and get Adam's step.
    The filters of a depthwise convolution (C, 1, k, k) share one basis of k k entries, since
    channels do not mix.

    params: float parameters or groups of them. betas: of the gradient, which must be 0 (GANs train
    without momentum, and moving a momentum to a new basis is not implemented), and of the squares.
    basis_beta: of the means of g g^T and g^T g. basis_every: in steps. max_size: a side of more
    rows gets no basis, since eigenvectors take its cube in operations.

    State of a matrix: the mean squares (out, in) and, for each side with a basis, two matrices
    (side, side).

    Raises ValueError for a first beta other than 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.0, 0.99),
        eps: float = 1e-8,
        basis_beta: float = 0.95,
        basis_every: int = 10,
        max_size: int = 1024,
    ) -> None:
        if betas[0] != 0:
            raise ValueError(f"beta1={betas[0]}: SOAP has no momentum; use 0")
        if basis_every < 1:
            raise ValueError(f"basis_every={basis_every}: must be at least 1")
        if not (eps >= 0 and 0 <= basis_beta < 1):
            raise ValueError(
                f"eps={eps}, basis_beta={basis_beta}: must not be negative, nor a beta 1"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "basis_beta": basis_beta})
        self._basis_every, self._max_size = basis_every, max_size

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; return the closure's loss, where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    updates.append((p, self._update(p, p.grad, group), group["lr"]))
        for p, update, lr in updates:  # last, so that no weight has changed if memory runs out
            p.sub_(update, alpha=lr)
        return loss

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        g = gradient.flatten(1) if gradient.ndim > 1 else gradient
        state = self.state[p]
        if not state:
            self._begin(state, p, g)
        state["step"] += 1
        t = int(state["step"])  # a tensor on the CPU, so nothing waits

        # Means are plain at first, then moving: no correction for starting at zero is needed.
        for side, dim in (("out", 0), ("in", 1)):
            if f"cov_{side}" in state:
                a, beta = (g, g.T)[dim], min(group["basis_beta"], 1 - 1 / t)
                state[f"cov_{side}"].addmm_(a, a.T, beta=beta, alpha=1 - beta)
                if t % self._basis_every == 0:
                    self._turn(state, side, dim)
        rotated = _rotate(g, state, back=False)
        beta2 = min(group["betas"][1], 1 - 1 / t)
        if t == self._basis_every:  # the first basis: the squares so far are of none
            beta2 = 0.0
        state["square"].lerp_(rotated.square(), 1 - beta2)
        update = rotated.div_(state["square"].sqrt().add_(group["eps"]))
        return _rotate(update, state, back=True).view_as(p)

    def _begin(self, state: dict[str, Any], p: Tensor, g: Tensor) -> None:
        state["step"] = torch.tensor(0.0)
        state["square"] = torch.zeros_like(g, memory_format=torch.contiguous_format)
        if g.ndim < 2:
            return
        channels_mix = p.ndim == 2 or p.shape[1] > 1 or p[0].numel() == 1
        for side, size, useful in (("out", g.shape[0], channels_mix), ("in", g.shape[1], True)):
            if useful and 1 < size <= self._max_size:
                state[f"cov_{side}"] = g.new_zeros(size, size)
                state[f"basis_{side}"] = torch.eye(size, dtype=g.dtype, device=g.device)

    def _turn(self, state: dict[str, Any], side: str, dim: int) -> None:
        """Bring a basis nearer to the eigenvectors, the largest eigenvalue first."""
        cov, basis = state[f"cov_{side}"], state[f"basis_{side}"]
        if int(state["step"]) == self._basis_every:  # the first time, of as many gradients
            finite = cov.nan_to_num(0, 0, 0)  # eigh raises otherwise; the loss tells the watchdog
            state[f"basis_{side}"] = torch.linalg.eigh(finite)[1].flip(1).contiguous()
            return
        moved = cov @ basis
        order = (basis * moved).sum(0).argsort(descending=True)
        state[f"basis_{side}"] = torch.linalg.qr(moved[:, order])[0].contiguous()
        state["square"] = state["square"].index_select(dim, order)  # they move with their vectors


def _rotate(x: Tensor, state: dict[str, Any], back: bool) -> Tensor:
    """Return a matrix in the eigenbasis, or `back` in the basis of the weights; a copy."""
    out, inner = state.get("basis_out"), state.get("basis_in")
    if out is not None:
        x = (out if back else out.T) @ x
    if inner is not None:
        x = x @ (inner.T if back else inner)
    return x.clone() if out is None and inner is None else x
