"""The order of a run's images; batches do not depend on the number of workers and processes."""

import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader

from apps.diffusion.data import BatchSampler, TensorDataset
from apps.diffusion.data.batch_sampler import order, training_batches
from apps.diffusion.data.dataset import index_and_epoch

IMAGES = TensorDataset(torch.linspace(-1, 1, 13 * 4).view(13, 1, 2, 2), torch.arange(13) % 3)


def take(count, start=0, rank=0, world=1, workers=0, seed=3):
    batches = training_batches(IMAGES, BatchSampler(13, 4, seed, start, rank, world), workers=workers)
    return [next(batches) for _ in range(count)]


def assert_equal(a, b):
    assert len(a) == len(b) and all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


def test_every_epoch_has_every_image_once():
    n = 13
    seen = order(n, seed=3, start=0, count=5 * n)
    epochs = [seen[k * n : (k + 1) * n] for k in range(5)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert order(n, seed=4, start=0, count=n) != epochs[0]


@pytest.mark.parametrize(("start", "count"), [(0, 1), (5, 20), (12, 1), (13, 40), (27, 0)])
def test_the_order_can_be_entered_anywhere(start, count):
    assert order(13, 3, start, count) == order(13, 3, 0, 100)[start : start + count]


def test_keys_are_the_order_with_the_epoch_of_each_image():
    batches = iter(BatchSampler(13, 4, seed=3))
    keys = [key for _ in range(9) for key in next(batches)]
    assert [i for i, _ in keys] == order(13, 3, 0, 36) and [e for _, e in keys] == [k // 13 for k in range(36)]
    # a plain loader takes the sampler
    plain = iter(DataLoader(IMAGES, batch_sampler=BatchSampler(13, 4, seed=3)))
    x, y = next(plain)
    assert torch.equal(x, IMAGES.x[[i for i, _ in keys[:4]]]) and y.tolist() == [i % 3 for i, _ in keys[:4]]


@pytest.mark.parametrize("start", [4, 12, 20])
def test_a_run_continues_with_the_batches_that_it_would_have_had(start):
    assert_equal(take(7)[start // 4 :], take(7 - start // 4, start=start))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batch_of_one_process(world):
    parts = [take(4, rank=rank, world=world) for rank in range(world)]
    joined = [[torch.cat(x) for x in zip(*each, strict=True)] for each in zip(*parts, strict=True)]
    assert_equal(joined, take(4))


def test_workers_change_no_bit_and_leave_the_global_generator():
    before = torch.get_rng_state()
    assert_equal(take(6, workers=2), take(6))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"batch": 0}, {"world": 3}, {"rank": 1}, {"start": -1}])
def test_impossible_batches_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BatchSampler(**{"n": 13, "batch": 4, **wrong})


class Damaged(TensorDataset):
    """Image 5 cannot be read, or ends the process."""

    how = ""

    def __getitem__(self, key):
        number, _ = index_and_epoch(key)
        if number == 5 and self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 5:
            raise {"ValueError": ValueError, "OSError": OSError}[self.how]("5.png is damaged; restore the file.")
        return super().__getitem__(key)


@pytest.mark.parametrize(
    ("how", "workers"), [("ValueError", 0), ("ValueError", 1), ("OSError", 0), ("OSError", 1), ("killed", 1)]
)
def test_the_error_of_a_worker_is_one_sentence(how, workers):
    images = Damaged(torch.zeros(8, 1, 2, 2))
    images.how = how
    loaded = training_batches(images, BatchSampler(8, 4), workers=workers)
    with pytest.raises((ValueError, OSError)) as error:
        for _ in range(4):
            next(loaded)
    assert len(str(error.value).splitlines()) == 1 and "Traceback" not in str(error.value)
    assert ("--data.workers" if how == "killed" else "5.png") in str(error.value)
