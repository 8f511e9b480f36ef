"""Comparison of the Triton backend with plain PyTorch, and data for it."""

from __future__ import annotations

import torch

X = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(9) % 4
