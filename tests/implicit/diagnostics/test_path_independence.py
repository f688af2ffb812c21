import pytest
import torch

from implicit import Picard, Stop
from implicit.diagnostics import path_independence
from tests.layers import layer

F64 = torch.float64
TIGHT = Stop(rtol=1e-10, atol=0, max_evals=500)


def test_a_contraction_does_not_depend_on_the_path():
    f, x = layer("easy")
    found = path_independence(f, torch.zeros_like(x), x, stop=TIGHT)
    assert found.converged.all()
    torch.testing.assert_close(found.score, torch.ones(3, dtype=F64), rtol=0, atol=1e-12)
    assert (found.distance < 1e-8).all()


def test_a_transformer_block_may_have_two_answers():
    """Both are fixed points, so the score below 1 is the layer's, not the solver's."""
    f, x = layer("adaln")
    found = path_independence(f, torch.zeros_like(x), x, stop=TIGHT)
    assert found.converged.all()
    for solved in (found.first, found.second):
        torch.testing.assert_close(f(solved.value, x), solved.value, rtol=1e-7, atol=1e-8)
    assert 0.5 < found.score[1] < 0.9 and (found.score[[0, 2]] > 1 - 1e-12).all()


def bistable(z, x):
    """Two attractors: near (x, +w) and (x, -w), w = tanh(2 w) = 0.9575."""
    return torch.stack((x, torch.tanh(2 * z[:, 1])), dim=1)


def test_two_attractors_in_closed_form():
    w = 0.9575040240772687
    z0 = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, -1.0]], dtype=F64)
    x = torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    found = path_independence(bistable, z0, x, solver=Picard(), stop=TIGHT)
    # sample 0 starts where 2 ended (-w), sample 1 where 0 ended (+w), sample 2 where 1 ended (-w, as before)
    expected = [(1 - w * w) / (1 + w * w), (4 - w * w) / (4 + w * w), 1.0]
    assert found.score.tolist() == pytest.approx(expected, abs=1e-8)
    assert found.distance[0].item() == pytest.approx(2 * w / (1 + w * w) ** 0.5, rel=1e-8)
    assert found.converged.all()


def test_a_start_of_ones_own():
    z0, x = torch.tensor([[0.0, 1.0]], dtype=F64), torch.ones(1, dtype=F64)
    assert path_independence(bistable, z0, x, start=3 * z0, stop=TIGHT).score.item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="start="):
        path_independence(bistable, z0, x)


def test_solves_that_stop_short_are_reported():
    f, x = layer("hard")
    found = path_independence(f, torch.zeros_like(x), x, solver=Picard(), stop=Stop(rtol=1e-10, atol=0, max_evals=5))
    assert not found.converged.any()
    assert not found.score.requires_grad


def test_two_answers_of_zero_agree():
    found = path_independence(lambda z: 0 * z, torch.ones(2, 3))
    assert found.score.tolist() == [1, 1] and found.distance.tolist() == [0, 0]
