"""FPDM in DistributedDataParallel on two processes: a block is applied a random number of times with a graph."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from apps.diffusion.models import FPDM
from implicit import StochasticJFB
from tests.apps.diffusion.helpers.small_models import batch, randomized

TINY = {"input_size": 8, "hidden_size": 32, "num_heads": 4, "num_classes": 10}
DRAWS = ((0, 1), (0, 3), (4, 1), (4, 3))  # (N, M) with seeds below: free iterations none and some, tracked one and more


def estimator(case):
    return StochasticJFB(*DRAWS[case], torch.Generator().manual_seed(case))


def gradients(model, inputs):
    """For each case, the gradient of the mean squared output over this batch, as one vector."""
    found = []
    for case in range(len(DRAWS)):
        model.zero_grad()
        model(*inputs, grad=estimator(case)).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(found)


def worker(folder):
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for checkpointing in (False, True):
        model = randomized(FPDM(**TINY))
        if checkpointing:
            model.enable_gradient_checkpointing()
        inputs = tuple(v[rank::2] for v in batch(model, n=4))
        torch.save(gradients(DistributedDataParallel(model), inputs), f"{folder}/{checkpointing}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_find_the_gradient_of_the_whole_batch(forks, tmp_path):
    drawn = [estimator(case).draw() for case in range(len(DRAWS))]
    assert {n > 0 for n, _ in drawn} == {m > 1 for _, m in drawn} == {False, True}
    assert forks.run(f"{__name__}:worker", str(tmp_path), processes=2) == 0
    model = randomized(FPDM(**TINY))
    expected = gradients(model, batch(model, n=4))
    assert expected.norm(dim=1).min() > 0.1
    for checkpointing in (False, True):
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{checkpointing}-{rank}.pt")
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
