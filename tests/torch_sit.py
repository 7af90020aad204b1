"""SiT and one training step in plain PyTorch, to compare numbers and speed with.

Parameters are named as in the published files, so `convert.names.params_from_torch` turns them into
the same network in JAX. Images are [b, channels, size, size]. Only velocity prediction and the
Linear path are implemented.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def adaLN(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, outputs * width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width)
        self.adaLN_modulation = adaLN(width, 6)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(
            6, dim=1
        )
        x = x + gate1.unsqueeze(1) * self.attn(modulate(x, shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(x, shift2, scale2))


class PatchEmbedder(nn.Module):
    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer(
            "frequencies", torch.exp(-math.log(10_000) * torch.arange(128) / 128), persistent=False
        )

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = t.unsqueeze(1) * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(y)


class FinalLayer(nn.Module):
    def __init__(self, width: int, features: int):
        super().__init__()
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = adaLN(width, 2)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.linear(modulate(x, *self.adaLN_modulation(condition).chunk(2, dim=1)))


class SiT(nn.Module):
    """(x [b, channels, size, size], t [b], y [b]) -> velocity like x.

    All weights are random, including the gates.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        heads: int,
        patch: int,
        input_size: int,
        channels: int,
        classes: int,
        learn_sigma: bool = False,
    ):
        super().__init__()
        self.patch = patch
        self.grid = input_size // patch
        self.out_channels = channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbedder(channels, width, patch)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width)
        self.pos_embed = nn.Parameter(torch.randn(1, self.grid**2, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch**2 * self.out_channels)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        b, c = x.shape[:2]
        condition = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, condition)
        out = self.final_layer(x, condition).reshape(
            b, self.grid, self.grid, self.patch, self.patch, self.out_channels
        )
        side = self.grid * self.patch
        return out.permute(0, 5, 1, 3, 2, 4).reshape(b, self.out_channels, side, side)[:, :c]


class Trainer:
    """AdamW (learning rate 1e-4, no decay) and an EMA around a model."""

    def __init__(self, model: SiT, ema_decay: float = 0.9999, fused: bool = False):
        self.model, self.ema_decay = model, ema_decay
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.ema = [copy.deepcopy(p.data) for p in self.trained]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0, fused=fused)

    def step(
        self, x1: torch.Tensor, x0: torch.Tensor, t: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """Update once from data x1 and noise x0; return the loss before it."""
        t_bchw = t.reshape(-1, 1, 1, 1)
        loss = F.mse_loss(self.model(t_bchw * x1 + (1 - t_bchw) * x0, t, y), x1 - x0)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        torch._foreach_lerp_(self.ema, [p.data for p in self.trained], 1 - self.ema_decay)
        return loss.detach()
