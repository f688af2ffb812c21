"""A process of several that sample into one folder; it imports little, because each process does."""

import os

import torch
import torch.distributed as dist

from apps.diffusion import sample


def one_of_two(rank, run, out, options):
    """As torchrun starts it; the barrier has both sample at the same time."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=2)
    dist.barrier()
    assert sample.main([str(run), *options, "--out", str(out)]) == 0
    dist.destroy_process_group()
