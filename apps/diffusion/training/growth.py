"""Iterations that grow with training: S-JFB's N and M rise while a share g of the training passes.

    N_s = round(r N),   M_s = max(1, round(r M)),   r = min(1, s / g)        s the share of the training that is done

Early steps are then short and many; the fixed point is needed once the network is good. Bai et al. 2019 (DEQ, arXiv
1909.01377) begin with a shallow unrolled network; McLeish et al. 2025 (arXiv 2511.07384) raise the recurrences of a
language model over training.
"""

from dataclasses import replace

from implicit import StochasticJFB


def grown(grad: StochasticJFB, done: float, growth: float) -> StochasticJFB:
    """The estimator with N_s and M_s.

    Args:
        grad: with the final N and M.
        done: s, in [0, 1].
        growth: g; 0 is no growth.
    """
    ratio = min(1.0, done / growth) if growth else 1.0
    return replace(grad, N=round(ratio * grad.N), M=max(1, round(ratio * grad.M)))
