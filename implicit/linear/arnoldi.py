"""One step of Arnoldi's method: the part of a vector outside the span of an orthonormal basis.

Setting: V has orthonormal rows v_1 .. v_k for every sample. For w = A v_k,

    h_i = <v_i, w>,     h_{k+1} v_{k+1} = w - sum_i h_i v_i

(Arnoldi, "The principle of minimized iterations in the solution of the matrix eigenvalue problem", Quart. Appl.
Math. 9, 1951.) After a second pass the result is orthogonal up to rounding error, which a long basis needs.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from implicit.pytree import Flat, PerSample, norm
from implicit.solvers.history_buffer import HistoryBuffer


def orthogonalize(
    w: Flat, basis: HistoryBuffer, used: Bool[Tensor, "B K"] | None = None, passes: int = 2
) -> tuple[Float[Tensor, "B K"], Flat, PerSample]:
    """(h, w - sum_i h_i v_i, its norm); rows of the basis outside of `used` are left out."""
    h = None
    for _ in range(passes):
        more = basis.dot(w)
        if used is not None:
            more = more.masked_fill(~used.unsqueeze(1), 0)
        h, w = more if h is None else h + more, basis.add(w, more, -1)
    assert h is not None
    return h.squeeze(1), w, norm(w)
