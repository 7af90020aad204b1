"""pytorch-fid's network in plain PyTorch, for comparisons; names as in its weights file."""

import torch
import torch.nn.functional as F
from torch import nn


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs, outputs, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def largest(x):
    return F.max_pool2d(x, 3, 1, 1)


def halve(x):
    return F.max_pool2d(x, 3, 2)


class Block(nn.Module):
    """Branches side by side; `chains` lists the names of each branch's convolutions.

    A pair of names at the end of a chain is a fork. The pool is a branch too: as it is if the block
    has no branch_pool.
    """

    def __init__(self, chains, pool, convolutions):
        super().__init__()
        self.chains = chains
        self.pool = pool
        for name, convolution in convolutions.items():
            self.add_module(name, convolution)

    def forward(self, x):
        branches = [y for chain in self.chains for y in self._run(chain, x)]
        pooled = self.pool(x)
        branches.append(self.branch_pool(pooled) if hasattr(self, "branch_pool") else pooled)
        return torch.cat(branches, 1)

    def _run(self, chain, x):
        for name in chain:
            if isinstance(name, tuple):
                return [getattr(self, part)(x) for part in name]
            x = getattr(self, name)(x)
        return [x]


ROW = {"kernel": (1, 7), "padding": (0, 3)}
COLUMN = {"kernel": (7, 1), "padding": (3, 0)}
SQUARE = {"kernel": 3, "padding": 1}
DOUBLE = ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]


def mixed35(inputs, pool):
    return Block(
        [["branch1x1"], ["branch5x5_1", "branch5x5_2"], DOUBLE],
        average,
        {
            "branch1x1": Conv(inputs, 64, 1),
            "branch5x5_1": Conv(inputs, 48, 1),
            "branch5x5_2": Conv(48, 64, 5, padding=2),
            "branch3x3dbl_1": Conv(inputs, 64, 1),
            "branch3x3dbl_2": Conv(64, 96, **SQUARE),
            "branch3x3dbl_3": Conv(96, 96, **SQUARE),
            "branch_pool": Conv(inputs, pool, 1),
        },
    )


def reduce35():
    return Block(
        [["branch3x3"], DOUBLE],
        halve,
        {
            "branch3x3": Conv(288, 384, 3, 2),
            "branch3x3dbl_1": Conv(288, 64, 1),
            "branch3x3dbl_2": Conv(64, 96, **SQUARE),
            "branch3x3dbl_3": Conv(96, 96, 3, 2),
        },
    )


def mixed17(n):
    once = ["branch7x7_1", "branch7x7_2", "branch7x7_3"]
    twice = [f"branch7x7dbl_{i}" for i in range(1, 6)]
    return Block(
        [["branch1x1"], once, twice],
        average,
        {
            "branch1x1": Conv(768, 192, 1),
            once[0]: Conv(768, n, 1),
            once[1]: Conv(n, n, **ROW),
            once[2]: Conv(n, 192, **COLUMN),
            twice[0]: Conv(768, n, 1),
            twice[1]: Conv(n, n, **COLUMN),
            twice[2]: Conv(n, n, **ROW),
            twice[3]: Conv(n, n, **COLUMN),
            twice[4]: Conv(n, 192, **ROW),
            "branch_pool": Conv(768, 192, 1),
        },
    )


def reduce17():
    once = ["branch3x3_1", "branch3x3_2"]
    twice = [f"branch7x7x3_{i}" for i in range(1, 5)]
    return Block(
        [once, twice],
        halve,
        {
            once[0]: Conv(768, 192, 1),
            once[1]: Conv(192, 320, 3, 2),
            twice[0]: Conv(768, 192, 1),
            twice[1]: Conv(192, 192, **ROW),
            twice[2]: Conv(192, 192, **COLUMN),
            twice[3]: Conv(192, 192, 3, 2),
        },
    )


def mixed8(inputs, pool):
    def fork(name):
        return {
            f"{name}a": Conv(384, 384, (1, 3), padding=(0, 1)),
            f"{name}b": Conv(384, 384, (3, 1), padding=(1, 0)),
        }

    return Block(
        [
            ["branch1x1"],
            ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
            ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")],
        ],
        pool,
        {
            "branch1x1": Conv(inputs, 320, 1),
            "branch3x3_1": Conv(inputs, 384, 1),
            **fork("branch3x3_2"),
            "branch3x3dbl_1": Conv(inputs, 448, 1),
            "branch3x3dbl_2": Conv(448, 384, **SQUARE),
            **fork("branch3x3dbl_3"),
            "branch_pool": Conv(inputs, 192, 1),
        },
    )


class Inception(nn.Module):
    """Images [b, 3, h, w] of 0 to 1 -> pool features [b, 2048], by pytorch-fid's resize."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, **SQUARE)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = mixed35(192, 32)
        self.Mixed_5c = mixed35(256, 64)
        self.Mixed_5d = mixed35(288, 64)
        self.Mixed_6a = reduce35()
        self.Mixed_6b = mixed17(128)
        self.Mixed_6c = mixed17(160)
        self.Mixed_6d = mixed17(160)
        self.Mixed_6e = mixed17(192)
        self.Mixed_7a = reduce17()
        self.Mixed_7b = mixed8(1280, average)
        self.Mixed_7c = mixed8(2048, largest)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))
