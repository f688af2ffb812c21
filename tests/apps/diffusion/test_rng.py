"""Random numbers by position: Philox, compared with published test vectors, and the numbers made from its words."""

import numpy as np
import pytest
import torch
from scipy import stats

from apps.diffusion.rng import Stream, normal, philox, uniform

ONES = 0xFFFFFFFF
# counter, key and output of philox4x32-10 in the known-answer tests of Random123
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def test_philox_gives_the_published_words():
    for counter, key, words in KNOWN:
        assert philox(torch.tensor(counter)[:, None], key).flatten().tolist() == list(words)
    (a, _, wanted), (b, *_), _ = KNOWN
    together = philox(torch.tensor([a, b]).T.contiguous(), KNOWN[0][1])
    assert together[:, 0].tolist() == list(wanted)


def test_normal_and_uniform_numbers_have_their_distributions():
    positions = torch.arange(3000)
    z = normal(3, Stream.STEP, positions, (2, 3, 3)).flatten(1)
    u = uniform(3, Stream.STEP, positions, 2)
    assert z.dtype == u.dtype == torch.float32 and z.shape == (3000, 18)
    assert stats.kstest(z.double().flatten().numpy(), "norm").pvalue > 1e-3
    for column in u.T:
        assert 0 <= column.min() and column.max() < 1
        assert stats.kstest(column.double().numpy(), "uniform").pvalue > 1e-3
    # columns, neighboring positions and the two kinds are uncorrelated
    together = np.concatenate([z.numpy(), z.roll(1, 0).numpy(), u.numpy()], axis=1)
    off = np.corrcoef(together.T) - np.eye(together.shape[1])
    assert np.abs(off).max() < 5.5 / 3000**0.5


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 4, 4)])
def test_a_row_depends_on_seed_purpose_and_position_alone(shape):
    positions = torch.tensor([5, 2**40 + 1, 0, 77])
    rows = normal(1, Stream.STEP, positions, shape)
    assert rows.shape == (4, *shape)
    for k in range(4):
        assert torch.equal(normal(1, Stream.STEP, positions[k : k + 1], shape)[0], rows[k])
    longer = normal(1, Stream.STEP, positions, (64,))
    assert torch.equal(longer[:, : rows[0].numel()], rows.flatten(1))
    for other in (normal(2, Stream.STEP, positions, shape), normal(1, Stream.SOLVE, positions, shape)):
        assert not torch.isclose(other, rows).any()
    assert len({float(row.flatten()[0]) for row in rows}) == 4
