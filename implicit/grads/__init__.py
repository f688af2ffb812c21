"""Gradient estimators: what autograd sees of a solve. One estimator a file."""

from implicit.grads.base import AbstractGrad as AbstractGrad
from implicit.grads.ift import IFT as IFT
from implicit.grads.jfb import JFB as JFB
from implicit.grads.stochastic_jfb import StochasticJFB as StochasticJFB
from implicit.grads.unrolled import Unrolled as Unrolled
