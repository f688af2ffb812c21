"""Classifier-free guidance, compared with the formula on two separate calls."""

import pytest
import torch

from apps.diffusion.models import FPDM, DiT
from apps.diffusion.sampling.guidance import Guidance
from tests.apps.diffusion.helpers.small_models import batch, randomized

TINY = {"input_size": 8, "hidden_size": 32, "num_heads": 4, "num_classes": 10}


def guided(model, guidance, x, t, y):
    return guidance.combine(model(*guidance.inputs(x, t, y, model.null_class)), x.shape[1])


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_guidance_is_the_formula_on_two_calls(scale, channels, learn_sigma):
    model = randomized(FPDM(**TINY, learn_sigma=learn_sigma)).double()
    x, t, y = batch(model, dtype=torch.float64)
    with_label, without = model(x, t, y), model(x, t, torch.full_like(y, 10))
    expected = with_label.clone()
    n = channels or 4
    expected[:, :n] = without[:, :n] + scale * (with_label[:, :n] - without[:, :n])
    result = guided(model, Guidance(scale=scale, channels=channels), x, t, y)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_scale_one_costs_nothing_and_changes_nothing():
    model = randomized(DiT(**TINY, depth=2))
    x, t, y = batch(model)
    guidance = Guidance()
    assert not guidance.doubles
    assert guidance.inputs(x, t, y, None) == (x, t, y)
    assert torch.equal(guided(model, guidance, x, t, y), model(x, t, y))


def test_more_channels_than_there_are_is_all_of_them():
    prediction = torch.randn(4, 2, 1, 1)
    expected = Guidance(scale=2.0).combine(prediction, 2)
    assert torch.equal(Guidance(scale=2.0, channels=3).combine(prediction, 2), expected)


def test_an_interval_guides_within_its_ends():
    guidance = Guidance(scale=3.0, channels=2, interval=(200, 800))
    for t, scale in ((199, 1.0), (200, 3.0), (500, 3.0), (800, 3.0), (801, 1.0)):
        assert guidance.at(t) == Guidance(scale=scale, channels=2)
    assert Guidance(scale=3.0).at(5) == Guidance(scale=3.0)
    for interval in ((-1, 5), (6, 5)):
        with pytest.raises(ValueError, match=r"Guidance\.interval"):
            Guidance(interval=interval)


def test_impossible_guidance_is_refused():
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"Guidance\.scale"):
            Guidance(scale=scale)
    with pytest.raises(ValueError, match=r"Guidance\.channels"):
        Guidance(channels=0)
    x, t, y = torch.randn(2, 1, 4, 4), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    for labels, null_class in ((None, 10), (y, None)):
        with pytest.raises(ValueError, match=r"Guidance\.scale"):
            Guidance(scale=2.0).inputs(x, t, labels, null_class)
