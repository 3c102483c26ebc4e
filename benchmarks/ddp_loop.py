"""A loop of PyTorch alone with the network and the data of a baked project; see `ranks.py`.

    python ddp_loop.py WIDTH BATCH_SIZE STEPS, in the project's folder, or by torchrun

Writes when each step began, and when the last was over, to the file that CLOCK names.
"""

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from my_project.data import Digits
from my_project.network import ConvNet

RANKS = {"RANK": 0, "WORLD_SIZE": 1}  # torchrun's variables, and their values without it


def main() -> None:
    width, batch_size, steps = map(int, sys.argv[1:])
    rank, ranks = (int(os.environ.get(name, default)) for name, default in RANKS.items())
    net: nn.Module = ConvNet(10, width)
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
        net = DistributedDataParallel(net)
    digits = Digits()
    digits.setup("fit")
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    indices = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(0))
    batches = indices[rank::ranks].split(batch_size)
    times = []
    for step in range(steps):
        times.append(time.time())
        images, labels = digits.train[batches[step % (len(batches) - 1)]]
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if rank == 0:
        Path(os.environ["CLOCK"]).write_text(" ".join(map(str, [*times, time.time()])))
    if ranks > 1:
        torch.distributed.barrier()
        os._exit(0)  # a group of gloo that lives, or has lived, can hang as Python ends


if __name__ == "__main__":
    main()
