"""DEQ is fixed_point as a module; fixed_point refuses unknown arguments."""

import pickle

import pytest
import torch
from torch import nn

import implicit
from implicit import DEQ, IFT, JFB, Anderson, Picard, Solution, StochasticJFB, Stop, fixed_point


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        with torch.no_grad():
            self.linear.weight.mul_(0.5)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


@pytest.fixture
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_deq_is_fixed_point_of_its_map(x):
    cell = Cell()
    stop = Stop(rtol=1e-6, max_evals=70)
    mine = DEQ(cell, solver=Picard(), grad=JFB(), stop=stop)(torch.zeros(3, 4), x)
    truth = fixed_point(cell, torch.zeros(3, 4), x, solver=Picard(), grad=JFB(), stop=stop)
    assert torch.equal(mine.value, truth.value) and torch.equal(mine.evals, truth.evals)


def test_parameters_are_those_of_the_map_and_nothing_is_kept(x):
    deq = DEQ(Cell())
    before = set(vars(deq)) | set(vars(deq.f))
    deq(torch.zeros(3, 4), x)
    assert [name for name, _ in deq.named_parameters()] == ["f.linear.weight", "f.linear.bias"]
    assert set(vars(deq)) | set(vars(deq.f)) == before


@pytest.mark.parametrize("training", [True, False])
def test_gradients_do_not_depend_on_the_mode(x, training):
    deq = DEQ(Cell(), grad=IFT()).train(training)
    deq(torch.zeros(3, 4), x).value.sum().backward()
    assert deq.f.linear.weight.grad.norm() > 0


def test_eval_stop_decides_in_evaluation_mode(x):
    deq = DEQ(Cell(), solver=Picard(), grad=JFB(), stop=Stop(max_evals=3), eval_stop=Stop(rtol=0, atol=0, max_evals=7))
    assert deq(torch.zeros(3, 4), x).evals.tolist() == [4, 4, 4]
    assert deq.eval()(torch.zeros(3, 4), x).evals.tolist() == [8, 8, 8]


def test_eval_stop_overrules_a_random_budget(x):
    stop = Stop(rtol=0, atol=0, max_evals=7)
    deq = DEQ(Cell(), grad=StochasticJFB(generator=torch.Generator().manual_seed(0)), eval_stop=stop).eval()
    assert {int(deq(torch.zeros(3, 4), x).evals[0]) for _ in range(5)} == {8}
    assert len({int(deq.train()(torch.zeros(3, 4), x).evals[0]) for _ in range(10)}) > 1


def test_deq_pickles(x):
    deq = DEQ(Cell(), solver=Anderson(memory=3), grad=IFT(), stop=Stop(rtol=1e-6))
    again = pickle.loads(pickle.dumps(deq))
    assert torch.equal(again(torch.zeros(3, 4), x).value, deq(torch.zeros(3, 4), x).value)
    assert again.solver == Anderson(memory=3)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"solver": Anderson}, r"Anderson\(\)"),
        ({"solver": "anderson"}, r"Anderson\(\)"),
        ({"grad": 3}, "grad"),
        ({"stop": 1e-3}, "stop"),
    ],
)
def test_wrong_kinds_of_option_are_refused(x, options, name):
    unchecked = getattr(fixed_point, "__wrapped__", fixed_point)  # as users run it: the tests check types on top
    with pytest.raises(TypeError, match=name):
        unchecked(Cell(), x, x, **options)


def test_misspelt_options_are_refused(x):
    with pytest.raises(TypeError):
        DEQ(Cell(), sovler=Picard())


def test_every_public_name_is_documented():
    for name in dir(implicit):
        thing = getattr(implicit, name)
        if not name.startswith("_") and callable(thing):
            assert thing.__doc__, name
    assert Solution.check.__doc__


def test_the_generator_of_draws_is_saved():
    one, other = (StochasticJFB(generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    here, there = (nn.Sequential(DEQ(nn.Linear(2, 2), grad=grad)) for grad in (one, other))
    one.draw()
    state = here.state_dict()
    ahead = [one.draw() for _ in range(5)]
    there.load_state_dict(state)
    assert [other.draw() for _ in range(5)] == ahead and len(set(ahead)) > 1
    del state["0.generator"]
    with pytest.raises(RuntimeError, match=r"0\.generator"):
        there.load_state_dict(state)
    assert there.load_state_dict(state, strict=False).missing_keys == ["0.generator"]
    assert "0.generator" not in nn.Sequential(DEQ(nn.Linear(2, 2))).state_dict()
