"""A path of certified low loss between two networks, and its verification.

`mc.connect` builds a chain of segments on which the loss is bounded by its breakpoints, and
`mc.verify` recomputes the bound from these and the data alone.
"""

from __future__ import annotations

import torch

import modeconn as mc
from modeconn import models
from modeconn.training.train import train

SPEC = "mlp:64-40x2-10"


def main() -> None:
    data = mc.datasets.load("digits", limit=300)
    nets = []
    for seed in (1, 2):
        net = models.build(SPEC)
        models.initialise(net, torch.Generator().manual_seed(seed))
        train(net, data, lr=0.02, epochs=30, seed=seed)
        nets.append(net)

    line = mc.evaluate(nets[0], mc.Line(*nets), data, points=25)
    connection = mc.connect(nets[0], *nets, data, target=0.2)
    print(f"straight line: largest loss {line.loss.max():.3g}")
    print(connection)

    certificate = mc.verify(nets[0], connection, data)
    print(f"verified: loss at most {certificate.bound:.3g} on the whole path")
    result = connection.evaluate(nets[0], data)
    print(f"largest loss at {len(result.t)} points of it: {result.loss.max():.3g}")


if __name__ == "__main__":
    main()
