"""Properties that hold for every contraction, shape, dtype, nesting and order of the batch."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from implicit import Stop, fixed_point
from tests.helpers import F64, SOLVERS

QUICK = settings(max_examples=18, derandomize=True, deadline=None)

problems = st.tuples(
    st.sampled_from(SOLVERS),
    st.integers(1, 4),
    st.integers(2, 6),
    st.integers(0, 10_000),
    st.floats(0.1, 0.7),
)


def contraction(batch, n, seed, rate, dtype=F64):
    rng = torch.Generator().manual_seed(seed)
    w = rate * torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=F64))[0]
    x = torch.randn(batch, n, generator=rng, dtype=F64)
    return (
        lambda z, x: torch.tanh(z @ w.to(z.dtype)) + x.to(z.dtype),
        torch.zeros(batch, n, dtype=dtype),
        x.to(dtype),
    )


def solve(f, z0, *args, solver, rtol=1e-8):
    with torch.no_grad():
        return fixed_point(f, z0, *args, solver=solver, stop=Stop(rtol=rtol, atol=0, max_evals=200))


@QUICK
@given(problems, st.sampled_from([F64, torch.float32, torch.bfloat16]))
def test_contractions_converge_in_every_dtype(drawn, dtype):
    solver, *rest = drawn
    f, z0, x = contraction(*rest, dtype=dtype)
    rtol = {F64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    found = solve(f, z0, x, solver=solver, rtol=rtol).check()
    z, fz = found.value.double(), f(found.value, x).double()
    assert ((fz - z).norm(dim=1) <= 1.05 * rtol * fz.norm(dim=1)).all() and found.value.dtype == dtype


@QUICK
@given(problems, st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_answer(drawn, random):
    solver, *rest = drawn
    f, z0, x = contraction(*rest)
    order = list(range(len(x)))
    random.shuffle(order)
    one, two = solve(f, z0, x, solver=solver), solve(f, z0, x[order], solver=solver)
    assert torch.equal(one.evals[order], two.evals)
    torch.testing.assert_close(one.value[order], two.value, rtol=1e-9, atol=1e-10)


@QUICK
@given(problems, st.integers(1, 5))
def test_nested_equals_flat(drawn, cut):
    solver, batch, n, seed, rate = drawn
    f, z0, x = contraction(batch, n, seed, rate)
    cut = min(cut, n - 1)

    def nested(z, x):
        out = f(torch.cat((z["a"].flatten(1), z["rest"][0]), dim=1), x)
        return {"rest": [out[:, cut:]], "a": out[:, :cut].unsqueeze(2)}

    flat = solve(f, z0, x, solver=solver)
    both = solve(nested, {"a": z0[:, :cut].unsqueeze(2), "rest": [z0[:, cut:]]}, x, solver=solver)
    assert torch.equal(flat.evals, both.evals)
    again = torch.cat((both.value["a"].flatten(1), both.value["rest"][0]), dim=1)
    torch.testing.assert_close(again, flat.value, rtol=1e-10, atol=1e-12)


@QUICK
@given(problems, st.integers(-13, 13))
def test_scaling_the_unknown_scales_the_answer_at_the_same_count(drawn, power):
    solver, *rest = drawn
    f, z0, x = contraction(*rest)
    c = 2.0**power
    one = solve(f, z0, x, solver=solver)
    two = solve(lambda z, x: c * f(z / c, x), z0 * c, x, solver=solver)
    assert torch.equal(one.evals, two.evals)
    torch.testing.assert_close(two.value / c, one.value, rtol=1e-12, atol=1e-13)


@QUICK
@given(problems)
def test_complex_equals_two_reals(drawn):
    solver, *rest = drawn
    f, z0, x = contraction(*rest)

    def g(z, x):
        real = f(z.real, x)
        return torch.complex(real, 0.5 * z.imag + 1)

    found = solve(g, torch.complex(z0, z0), x, solver=solver).check()
    torch.testing.assert_close(found.value.imag, torch.full_like(z0, 2.0), rtol=1e-6, atol=1e-6)
