"""A trainable penalty on the size of df/dz, to keep an equilibrium layer easy to solve.

Setting: J = df/dz at z, N numbers per sample. For random v of independent entries +-1 (mean 0, covariance I),

    E ||J^T v||^2 = tr(J J^T) = ||J||_F^2            (Hutchinson)

||J||_F / sqrt(N) is the root mean square of J's singular values. It bounds no single eigenvalue, but in practice the
spectral radius falls as this norm is penalized.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from implicit.argument_types import check_arguments
from implicit.autodiff.vjp import pullback
from implicit.evaluation import FlatMap
from implicit.pytree import Layout, Map, State


def jacobian_penalty(
    f: Map,
    z: State,
    *args: Any,
    generator: torch.Generator,
    probes: int = 1,
    batch_dims: int = 1,
) -> Float[Tensor, " B"]:
    """(B,) unbiased estimates of ||df/dz||_F^2 / N at z, differentiable.

    Add ``weight * jacobian_penalty(layer, solution.value, x, generator=rng).mean()`` to the loss. The gradient reaches
    the tensors that f closes over, `args`, and z if z requires gradients: pass ``solution.value.detach()`` to treat z
    as a constant (cheaper, and the usual choice), or the attached value to differentiate through the fixed point too,
    which needs an estimator that can be differentiated (`IFT`, `Unrolled`). Attention inside f runs PyTorch's math
    kernel, since the fused kernels have no second derivative. Cost: one evaluation of f and `probes` vector-Jacobian
    products, and about twice that in the backward pass. Under `torch.no_grad` the result has no graph.

    Source: Hutchinson, Commun. Stat. Simul. 18(3), 1989; Bai, Koltun and Kolter, "Stabilizing Equilibrium Models by
    Jacobian Regularization", ICML 2021, arXiv 2106.14342.

    Args:
        f: the map f(z, *args).
        z: the point, ``(B, *)`` tensors.
        args: passed on to f.
        generator: generator of the probes v, on any device; every sample has its own v.
        probes: number of probes per sample, >= 1; the variance falls as 1 / probes.
        batch_dims: 0 makes the whole state one system.

    Raises:
        ValueError: `fixed_point` would refuse f or z, or `probes` is out of range.
    """
    check_arguments(jacobian_penalty, {"f": f, "generator": generator, "probes": probes})
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}.")
    keep = torch.is_grad_enabled()
    layout = Layout.of(z, batch_dims)
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        x = layout.pack(z)
        # products are taken with respect to a new graph node x, whatever z itself depends on
        x = x.view_as(x) if x.requires_grad else x.clone().requires_grad_()
        y = FlatMap(f, args, layout)(x)
        act = pullback(y, x, create_graph=keep)
        total = x.new_zeros(x.shape[0])
        for _ in range(probes):
            coin = torch.randint(0, 2, x.shape, generator=generator, device=generator.device)
            v = (2 * coin - 1).to(y)
            total = total + act(v).square().sum(dim=1)
        total = total / (probes * x.shape[1])
    return total if keep else total.detach()
