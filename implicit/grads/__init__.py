"""Gradient estimators: what autograd sees of a solve. One estimator a file."""

from implicit.grads.base import AbstractGrad as AbstractGrad
from implicit.grads.ift import IFT as IFT
from implicit.grads.jfb import JFB as JFB
from implicit.grads.neumann import Neumann as Neumann
from implicit.grads.phantom import Phantom as Phantom
from implicit.grads.reversible import Reversible as Reversible
from implicit.grads.shine import SHINE as SHINE
from implicit.grads.stochastic_jfb import StochasticJFB as StochasticJFB
from implicit.grads.unrolled import Unrolled as Unrolled
from implicit.linear.gmres import GMRES as GMRES
