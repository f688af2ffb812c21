"""Broyden, iterate by iterate, against dense updates of an explicit Jacobian or inverse."""

import pytest
import torch
from test_anderson import FREE, smooth, visited

from implicit import Broyden, Loop, Stop, iterate

F64 = torch.float64


def dense(f, z0, evals, bad):
    """Good: the Jacobian B of g = f - z is updated and solved with. Bad: its inverse is updated."""
    runs = []
    for b in range(len(z0)):

        def g(z, b=b):
            full = z0.clone()
            full[b] = z
            return f(full)[b] - z

        z, jac = z0[b], -torch.eye(z0.shape[1], dtype=F64)
        inverse, r, zs = jac.clone(), g(z), [z0[b]]
        for _ in range(evals - 1):
            s = -(inverse @ r) if bad else torch.linalg.solve(jac, -r)
            z = z + s
            zs.append(z)
            y, r = g(z) - r, g(z)
            if bad:
                inverse = inverse + torch.outer(s - inverse @ y, y) / (y @ y)
            else:
                jac = jac + torch.outer(y - jac @ s, s) / (s @ s)
        runs.append(torch.stack(zs))
    return torch.stack(runs, dim=1)


@pytest.mark.parametrize("bad", [False, True])
def test_every_iterate_is_the_dense_updates(bad):
    f, z0 = smooth()
    got = torch.stack(visited(f, z0, Broyden(40, bad=bad), 20))
    torch.testing.assert_close(got, dense(f, z0, 20, bad), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("evals", [4, 9, 12])
def test_the_newest_secant_equation_holds_after_the_memory_has_wrapped(bad, evals):
    f, z0 = smooth()
    zs = visited(f, z0, Broyden(4, bad=bad), evals)
    memory = iterate(f, z0, Broyden(4, bad=bad), Stop(max_evals=evals, **FREE), loop=Loop(keep_state=True)).state
    s = zs[-2] - zs[-3]
    y = (f(zs[-2]) - zs[-2]) - (f(zs[-3]) - zs[-3])
    assert memory.u.rows == min(4, memory.u.rows)
    for b in range(len(z0)):
        h = torch.eye(12, dtype=F64) + memory.u[b].T @ memory.v[b]
        torch.testing.assert_close(h @ y[b], -s[b], rtol=1e-10, atol=1e-12)


def test_the_inverse_estimate_is_transposed_exactly():
    f, z0 = smooth()
    memory = iterate(f, z0, Broyden(), Stop(max_evals=8, **FREE), loop=Loop(keep_state=True)).state
    g = torch.ones_like(z0)
    for b in range(len(z0)):
        h = torch.eye(12, dtype=F64) + memory.u[b].T @ memory.v[b]
        torch.testing.assert_close(Broyden().transposed(memory, g)[b], h.T @ g[b])


def test_memory_grows_with_the_steps_not_with_the_budget():
    f, z0 = smooth()
    rows = [
        iterate(f, z0, Broyden(100), Stop(max_evals=n, **FREE), loop=Loop(keep_state=True)).state.u.rows
        for n in (2, 5, 12, 20)
    ]
    assert rows == [0, 8, 16, 32]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"Broyden\.memory"):
        Broyden(0)
