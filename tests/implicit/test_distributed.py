"""DistributedDataParallel over two gloo processes: the gradients of one process with the whole batch."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from implicit import (
    IFT,
    JFB,
    SHINE,
    AbstractGrad,
    AndersonGS,
    Broyden,
    Neumann,
    Phantom,
    Picard,
    Reversible,
    StochasticJFB,
    Stop,
    Unrolled,
    fixed_point,
)

RANKS = 2
STOP = Stop(rtol=1e-12, atol=0, max_evals=200)
ELEVEN = Stop(rtol=0, atol=0, max_evals=11)  # evaluations, of which segments and inverse estimates are made


class Net(nn.Module):
    """A block shared by all iterations, between a layer before and one after."""

    def __init__(self, grad: AbstractGrad, checkpointed: bool) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.before, self.block, self.after = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=rng, dtype=torch.float64))
        self.grad, self.checkpointed = grad, checkpointed

    def iteration(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.block(z) + x)

    def forward(self, x: Tensor) -> Tensor:
        def f(z: Tensor, x: Tensor) -> Tensor:
            if self.checkpointed and torch.is_grad_enabled():
                return checkpoint(self.iteration, z, x, use_reentrant=False)
            return self.iteration(z, x)

        x = self.before(x)
        short = isinstance(self.grad, Reversible | SHINE) or self.grad == Unrolled(4)
        solver = {SHINE: Broyden(), Unrolled: Picard()}.get(type(self.grad), AndersonGS())
        return self.after(fixed_point(f, x, x, grad=self.grad, solver=solver, stop=ELEVEN if short else STOP).value)


def stochastic(n: int, m: int) -> Callable[[], StochasticJFB]:
    """StochasticJFB whose first draw is (n, m), found by its seed."""

    def make() -> StochasticJFB:
        seeds = (torch.Generator().manual_seed(s) for s in range(1000))
        seed = next(g.initial_seed() for g in seeds if StochasticJFB(6, 4, g).draw() == (n, m))
        return StochasticJFB(6, 4, torch.Generator().manual_seed(seed))

    return make


CASES: dict[str, Callable[[], AbstractGrad]] = {
    "IFT": lambda: IFT(stop=Stop(rtol=1e-12, atol=0, max_evals=99)),
    "JFB": JFB,
    "StochasticJFB, n = 0": stochastic(0, 3),
    "StochasticJFB, n = 5": stochastic(5, 3),
    "Phantom": Phantom,
    "Neumann": Neumann,
    "SHINE": SHINE,
    "Reversible": Reversible,
    "Unrolled": Unrolled,
    "Unrolled, an evaluation at a time": lambda: Unrolled(True),
    "Unrolled, segments": lambda: Unrolled(4),
}


def inputs() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(net: nn.Module, x: Tensor, passes: int = 2) -> list[Tensor]:
    """Of the mean loss, for every pass (a second pass draws anew)."""
    found = []
    for _ in range(passes):
        net.zero_grad()
        net(x).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    share = inputs()[rank::RANKS]
    report = {}
    for name, make in CASES.items():
        for checkpointed in (False, True):
            report[name, checkpointed] = gradients(DistributedDataParallel(Net(make(), checkpointed)), share)
    grad = StochasticJFB(generator=torch.Generator().manual_seed(5))
    report["draws"] = [grad.draw() for _ in range(20)]
    torch.save(report, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    spawn(work, args=(folder,), nprocs=RANKS)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradients_of_one(reports, name, checkpointed):
    alone = gradients(Net(CASES[name](), False), inputs())
    assert len(alone[0]) == 3 * 42 and alone[0].norm() > 0.01
    for report in reports:
        for mine, true in zip(report[name, checkpointed], alone, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-11)


def test_all_ranks_draw_the_same(reports):
    one, two = (report["draws"] for report in reports)
    assert one == two and len(set(one)) > 10
