# SPDX-License-Identifier: Apache-2.0
"""Muon for hidden matrices, Adam for the embedding and norms, and averaged weights.

Muon: momentum, then the update's singular values brought near one by five Newton-Schulz steps
(Jordan et al. 2024). Matrices of one shape go through it together.
"""
import torch

from network import EMBEDDING

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonal(update):
    """Matrices with the singular vectors of `update` and singular values near one."""
    x = update.bfloat16() if update.is_cuda else update
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-1, -2)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        y = x @ x.transpose(-1, -2)
        x = a * x + (b * y + c * (y @ y)) @ x
    return (x.transpose(-1, -2) if tall else x).float().contiguous()


class Optimizer:
    """Both optimizers over a dictionary of parameters."""

    def __init__(self, parameters, settings):
        self.parameters, self.settings = parameters, settings
        groups, others = {}, []
        for name, parameter in parameters.items():
            if parameter.ndim == 2 and name != EMBEDDING:
                groups.setdefault(tuple(parameter.shape), []).append(parameter)
            else:
                others.append(parameter)
        self.groups = [(group, torch.zeros(len(group), *shape, device=group[0].device))
                       for shape, group in groups.items()]
        self.adam = torch.optim.AdamW(others, lr=0.0, betas=tuple(settings["betas"]),
                                      weight_decay=0.0, fused=others[0].is_cuda)
        self.average = None

    @torch.no_grad()
    def step(self, learning_rate, adam_learning_rate):
        for group, momentum in self.groups:
            gradient = torch.stack([p.grad for p in group])
            momentum.lerp_(gradient, 1 - self.settings["momentum"])
            update = orthogonal(gradient.lerp_(momentum, self.settings["momentum"]))
            rows, columns = update.shape[-2:]
            torch._foreach_mul_(group, 1 - learning_rate * self.settings["weight_decay"])
            torch._foreach_add_(group, list(update.unbind(0)),
                                alpha=-learning_rate * max(1, rows / columns) ** 0.5)
        for settings in self.adam.param_groups:
            settings["lr"] = adam_learning_rate
        self.adam.step()
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def update_average(self, decay, steps):
        """Moves the averaged weights; `steps` since the average began shorten its memory."""
        if self.average is None:
            self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
            return
        decay = min(decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()),
                             1 - decay)

    def state(self):
        return {"momentum": [m for _, m in self.groups], "adam": self.adam.state_dict(),
                "average": self.average}

    @torch.no_grad()
    def load(self, state):
        for (_, momentum), saved in zip(self.groups, state["momentum"], strict=True):
            momentum.copy_(saved)
        self.adam.load_state_dict(state["adam"])
        if state["average"] is not None:
            self.average = {name: tensor.to(self.parameters[name].device)
                            for name, tensor in state["average"].items()}
