"""Outputs and targets of each kind of loss."""

from __future__ import annotations

import torch

G = torch.Generator().manual_seed(0)
OUTPUTS, LABELS = torch.randn(23, 7, generator=G), torch.randint(0, 7, (23,), generator=G)
PIXELS, CLASSES = torch.randn(6, 4, 5, 3, generator=G), torch.randint(0, 4, (6, 5, 3), generator=G)
NUMBERS, TARGETS = torch.randn(9, 2, 3, generator=G), torch.rand(9, 2, 3, generator=G)
WEIGHT = torch.rand(7, generator=G) + 0.1
