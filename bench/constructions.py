"""Connects networks by subnetworks of closed form: the two conditions of the paper, constructed.

    python bench/constructions.py xor            # separable hidden layers: no training, seconds
    python bench/constructions.py labels         # 2,500 random labels, last two layers 4 √N wide

Both print the bound beside the larger loss of the two networks, which no path can go below, and the
seconds that `modeconn.connect` took. The networks are trained first, which is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time

import numpy as np
import torch
from torch import Tensor, nn

import modeconn as mc

Data = tuple[Tensor, Tensor]


def network(widths: list[int], seed: int) -> nn.Sequential:
    """Draws a fully connected ReLU network."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def trained(model: nn.Sequential, data: Data, steps: int, lr: float, batch: int) -> nn.Sequential:
    """Trains by Adam with a rate that falls to 0."""
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (batch,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def xor() -> tuple[list[nn.Sequential], Data, str]:
    """Returns networks whose inputs are not separable, and all of whose hidden layers are."""
    random = np.random.default_rng(0)
    points = random.uniform(-1, 1, (200, 2))
    points += 0.15 * np.sign(points)
    x = torch.from_numpy(points.astype(np.float32))
    y = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long()
    networks = [
        trained(network([2, 32, 32, 32, 32, 2], seed), (x, y), 1500, 3e-3, 200) for seed in (0, 1)
    ]
    return networks, (x, y), "separable"


def labels(samples: int, classes: int = 10) -> tuple[list[nn.Sequential], Data, str]:
    """Returns networks that have learned random labels, the last two layers 4 √N wide."""
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.normal(size=(samples, 20)).astype(np.float32))
    y = torch.from_numpy(random.integers(0, classes, samples))
    wide = 4 * math.ceil(math.sqrt(samples))
    widths = [20, 48, 48, wide, wide, classes]
    networks = [trained(network(widths, seed), (x, y), 1500, 2e-3, 400) for seed in (0, 1)]
    return networks, (x, y), "memorise"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=("xor", "labels"))
    parser.add_argument("--samples", type=int, default=2500, help="of the case labels")
    parser.add_argument("--subnetworks", help="another way than the closed form")
    args = parser.parse_args()
    networks, data, method = xor() if args.case == "xor" else labels(args.samples)
    a, b = networks
    began = time.perf_counter()
    found = mc.connect(a, a, b, data, subnetworks=args.subnetworks or method)
    seconds = time.perf_counter() - began
    certificate = found.certificate
    ends = max(certificate.losses[0], certificate.losses[-1])
    for record in found.details["found"]:
        text = f"S_{record['entry']} of {record['side']}: loss {record['loss']:.3g}"
        print(f"{text}, widths {record['widths']}")
    print(f"bound {certificate.bound:.8g}, larger end {ends:.8g}, {seconds:.1f} s")
    print(certificate.advice)


if __name__ == "__main__":
    main()
