"""Muon in fp32, matrices of one shape orthogonalised together.

`torch.optim.Muon` iterates in bfloat16, which pays on a GPU; a CPU may have no usable bfloat16 product.
"""

from collections import defaultdict

import torch
from torch import Tensor
from torch.optim import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """Momentum, made orthogonal, as the update of a matrix (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                alike[param.shape].append(param)
            for (rows, columns), params in alike.items():
                updates = orthogonalise(torch.stack([self._momentum(param, group["momentum"]) for param in params]))
                step_size = group["lr"] * max(1.0, rows / columns) ** 0.5
                for param, update in zip(params, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=step_size)

    def _momentum(self, param: Tensor, momentum: float) -> Tensor:
        assert param.grad is not None
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        buffer: Tensor = state["momentum"].lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(buffer, momentum)  # Nesterov


def orthogonalise(x: Tensor, num_steps: int = 5) -> Tensor:
    """Matrices [N, rows, columns] → about U V^T of each one's singular value decomposition U S V^T."""
    a, b, c = NEWTON_SCHULZ
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
