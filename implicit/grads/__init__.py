"""Gradient estimators, which define the derivatives of a solve. Each file has one estimator."""

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
