"""FPDM: the fixed-point layer, compared with its equation written without optimization."""

import copy

import pytest
import torch
import torch.nn.functional as F

from apps.diffusion.models import FPDM
from implicit import IFT, JFB, Anderson, Broyden, StochasticJFB, Stop, Unrolled
from tests.apps.diffusion.helpers.small_models import batch, randomized, saved_bytes

TINY = {"input_size": 8, "hidden_size": 32, "num_heads": 4, "num_classes": 10}


def tiny(seed=0, **change):
    return randomized(FPDM(**TINY | change), seed)


def contraction(**change):
    """A model whose layer is a contraction, so that there is a fixed point to find."""
    model = tiny(**change)
    with torch.no_grad():
        model.block_fixed_point_projection_fc2.weight.mul_(0.4)
    return model


def plain_iteration(model, z, x, c):
    """f(z) as the paper has it: concatenate, MLP, block; nothing computed beforehand."""
    h = model.block_fixed_point_projection_fc1(torch.cat([z, model.block_pre_projection(x)], dim=-1))
    return model.block_fixed_point(model.block_fixed_point_projection_fc2(F.gelu(h, approximate="tanh")), c)


def plain_forward(model, x, t, y, *, free=0, tracked=1, start=None):
    """The whole model, `free` iterations without a graph and `tracked` with one."""
    h = model.x_embedder(x) + model.pos_embed
    t_emb = model.t_embedder(t)
    c = t_emb if y is None else t_emb + model.y_embedder(y)
    outer = c if y is None or model.condition_on_time else model.y_embedder(y)
    for block in model.blocks_pre:
        h = block(h, outer)
    z = h if start is None else start
    with torch.no_grad():
        for _ in range(free):
            z = plain_iteration(model, z, h, c)
    for _ in range(tracked):
        z = plain_iteration(model, z, h, c)
    for block in model.blocks_post:
        z = block(z, outer)
    return model.output(z, outer)


@pytest.mark.parametrize("condition_on_time", [False, True])
@pytest.mark.parametrize("num_classes", [10, 0])
@pytest.mark.parametrize("k", [1, 4])
def test_k_iterations_are_the_equation_applied_k_times(condition_on_time, num_classes, k):
    model = tiny(condition_on_time=condition_on_time, num_classes=num_classes, pre=2).double()
    x, t, y = batch(model, dtype=torch.float64)
    y = y if num_classes else None
    with torch.no_grad():
        hoisted, solution = model(x, t, y, iterations=k, return_solution=True)
        torch.testing.assert_close(hoisted, plain_forward(model, x, t, y, free=k, tracked=0), rtol=1e-10, atol=1e-10)
    assert solution.evals.tolist() == [k] * 3
    assert solution.value.shape == (3, model.tokens, 32)


def test_hoisting_differs_by_rounding_alone_in_float32():
    model = tiny(hidden_size=128)
    inputs = batch(model)
    with torch.no_grad():
        gap = (model(*inputs, iterations=10) - plain_forward(model, *inputs, free=10)).abs().max()
        gap10 = (model(*inputs, iterations=10) - plain_forward(model, *inputs, free=10, tracked=0)).abs().max()
    assert gap10 < 2e-5 < gap


def test_exactly_k_evaluations_and_one_preparation():
    model = tiny()
    seen = {"block": 0, "pre": 0, "modulation": 0}

    def count(name):
        return lambda *_: seen.__setitem__(name, seen[name] + 1)

    model.block_fixed_point.attn.register_forward_hook(count("block"))
    model.block_pre_projection.register_forward_hook(count("pre"))
    model.block_fixed_point.adaLN_modulation.register_forward_hook(count("modulation"))
    with torch.no_grad():
        model(*batch(model), iterations=7)
        assert seen == {"block": 7, "pre": 1, "modulation": 1}
        model(*batch(model))
    assert seen == {"block": 17, "pre": 2, "modulation": 2}


def test_the_time_reaches_the_outer_layers_only_if_configured():
    x, t, y = batch(tiny())
    seen = []
    for model in (tiny(), tiny(condition_on_time=True), tiny(num_classes=0)):
        outer = []
        for block in (model.blocks_pre[0], model.blocks_post[0], model.final_layer):
            block.register_forward_pre_hook(lambda _, inputs, outer=outer: outer.append(inputs[1]))
        labels = (y,) if model.num_classes else ()
        model(x, t, *labels)
        model(x, t + 1, *labels)
        seen.append([bool((a != b).any()) for a, b in zip(outer[:3], outer[3:], strict=True)])
    assert seen == [[False] * 3, [True] * 3, [True] * 3]


def assert_equal_gradients(model, *outputs, **tolerance):
    """The gradients of the squares of the first output, a function, after a comparison with those of the second."""
    found = []
    for output in outputs:
        model.zero_grad()
        output().square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*found, **{"rtol": 1e-9, "atol": 1e-9, **tolerance})
    return found[0]


def test_gradients_without_an_estimator_are_those_of_the_iterations():
    model = tiny().double()
    inputs = batch(model, dtype=torch.float64)
    assert_equal_gradients(
        model, lambda: model(*inputs, iterations=3), lambda: plain_forward(model, *inputs, tracked=3)
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_s_jfb_is_the_algorithm_written_out_and_reaches_the_pre_layers(seed):
    model = tiny().double()
    inputs = batch(model, dtype=torch.float64)
    estimator = StochasticJFB(4, 3, torch.Generator().manual_seed(seed))
    n, m = StochasticJFB(4, 3, torch.Generator().manual_seed(seed)).draw()
    ours = assert_equal_gradients(
        model, lambda: model(*inputs, grad=estimator), lambda: plain_forward(model, *inputs, free=n, tracked=m)
    )
    assert ours["blocks_pre.0.attn.qkv.weight"].abs().max() > 1e-3


def test_jfb_reaches_the_pre_layers_through_the_injection_alone():
    model = tiny().double()
    inputs = batch(model, dtype=torch.float64)
    ours = assert_equal_gradients(
        model,
        lambda: model(*inputs, grad=JFB(), iterations=5),
        lambda: plain_forward(model, *inputs, free=5, tracked=1),
    )
    assert ours["x_embedder.proj.weight"].abs().max() > 1e-3


def test_ift_agrees_with_unrolling_to_convergence():
    model = contraction().double()
    inputs = batch(model, dtype=torch.float64)
    tight = Stop(rtol=1e-13, atol=0, max_evals=200)

    def output(grad):
        out, solution = model(*inputs, grad=grad, stop=tight, return_solution=True)
        assert solution.converged.all()
        return out

    assert_equal_gradients(model, lambda: output(IFT(stop=tight)), lambda: output(Unrolled()), rtol=1e-7, atol=1e-8)


def test_free_iterations_store_nothing():
    model = tiny()
    inputs = batch(model)
    few, _ = saved_bytes(lambda: model(*inputs, iterations=1, grad=JFB()))
    many, _ = saved_bytes(lambda: model(*inputs, iterations=30, grad=JFB()))
    assert few == many


@pytest.mark.parametrize("solver", [Anderson(), Broyden()])
def test_other_solvers_find_the_same_point_and_each_sample_stops_by_itself(solver):
    model = contraction().double()
    inputs = batch(model, dtype=torch.float64)
    stop = Stop(rtol=1e-11, atol=0, max_evals=300)
    with torch.no_grad():
        naive, slow = model(*inputs, stop=stop, return_solution=True)
        out, fast = model(*inputs, stop=stop, solver=solver, return_solution=True)
        alone, one = model(*(v[1:2] for v in inputs), stop=stop, solver=solver, return_solution=True)
    assert slow.converged.all() and fast.converged.all()
    assert fast.evals.sum() < slow.evals.sum()
    torch.testing.assert_close(out, naive, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(alone, out[1:2], rtol=1e-8, atol=1e-8)
    assert one.evals[0] == fast.evals[1]


def test_starts():
    model = tiny().double()
    inputs = batch(model, dtype=torch.float64)
    with torch.no_grad():
        straight, _ = model(*inputs, iterations=5, return_solution=True)
        _, first = model(*inputs, iterations=2, return_solution=True)
        torch.testing.assert_close(model(*inputs, iterations=3, start=first.value), straight)
        seen = []
        model(*inputs, iterations=3, start=lambda fresh: seen.append(fresh) or first.value)
        torch.testing.assert_close(model(*inputs, iterations=3, start=seen[0]), model(*inputs, iterations=3))
    with pytest.raises(ValueError, match="start"):
        model(*inputs, start=first.value[:2])


def test_samples_are_independent():
    model = tiny().double()
    x, t, y = batch(model, dtype=torch.float64)
    out = model(x, t, y)
    torch.testing.assert_close(model(x.flip(0), t.flip(0), y.flip(0)).flip(0), out)
    torch.testing.assert_close(model(x[:1], t[:1], y[:1]), out[:1])


@pytest.mark.parametrize("grad", [Unrolled(), JFB(), IFT(), "s-jfb"])
def test_gradient_checkpointing_changes_memory_and_nothing_else(grad):
    model = contraction()
    inputs = batch(model)

    def gradients():
        model.zero_grad()
        chosen = StochasticJFB(3, 8, torch.Generator().manual_seed(4)) if grad == "s-jfb" else grad
        stored, out = saved_bytes(lambda: model(*inputs, grad=chosen, iterations=8))
        out.square().mean().backward()
        return stored, [p.grad.clone() for p in model.parameters()]

    plain, expected = gradients()
    model.enable_gradient_checkpointing()
    less, same = gradients()
    for a, b in zip(expected, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert less < plain


def test_checkpointed_iterations_store_one_state_each():
    model = tiny()
    model.enable_gradient_checkpointing()
    inputs = batch(model)
    two, _ = saved_bytes(lambda: model(*inputs, iterations=2))
    twelve, _ = saved_bytes(lambda: model(*inputs, iterations=12))
    state = 3 * model.tokens * 32 * 4
    assert 10 * state <= twelve - two < 10.1 * state  # the loop keeps a flag per sample besides


def test_autocast_keeps_the_state_in_full_precision():
    model = tiny()
    inputs = batch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, solution = model(*inputs, iterations=4, grad=JFB(), return_solution=True)
        out.float().square().mean().backward()
        injected, modulation = model.prepare(solution.value.detach(), torch.randn(3, 32))
        assert model.iteration(solution.value.detach(), injected, modulation).dtype == torch.float32
    assert solution.value.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    exact = model(*inputs, iterations=5)
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1 * float(exact.detach().abs().max()))


@pytest.mark.parametrize(
    ("change", "word"), [({"pre": -1}, "pre"), ({"post": -1}, "post"), ({"iterations": 0}, "iterations")]
)
def test_impossible_architectures_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        FPDM(**TINY | change)


def test_calls_that_do_not_fit_are_refused():
    model = tiny()
    inputs = batch(model)
    with pytest.raises(ValueError, match="iterations"):
        model(*inputs, iterations=3, stop=Stop())
    with pytest.raises(ValueError, match="iterations=0"):
        model(*inputs, iterations=0)
    with pytest.raises(ValueError, match=r"^y\b"):
        model(*inputs[:2], inputs[2] + 11)
    with pytest.raises(ValueError, match=r"^y\b"):
        model(*inputs[:2])


def test_no_explicit_layers_at_all_is_a_model_too():
    model = tiny(pre=0, post=0)
    assert model(*batch(model)).shape == (3, 4, 8, 8)
    assert model.block_passes(4) == 4


def test_save_and_load_give_the_same_model(tmp_path):
    model = tiny(pre=2, iterations=4, condition_on_time=True, num_classes=3)
    model.save_pretrained(tmp_path)
    again = FPDM.from_pretrained(tmp_path)
    assert again.iterations == 4 and again.condition_on_time
    assert torch.equal(model(*batch(model)), again(*batch(model)))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of the compiler itself
def test_compiled_iteration_keeps_names_and_numbers_at_every_length():
    model = tiny().double()
    inputs = batch(model, dtype=torch.float64)
    names, before = list(model.state_dict()), [model(*inputs, iterations=k) for k in (1, 5)]
    torch.compiler.reset()
    model.compile_blocks(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for k, expected in zip((1, 5), before, strict=True):
            torch.testing.assert_close(model(*inputs, iterations=k), expected)
    assert list(model.state_dict()) == names
    copied = copy.deepcopy(model)
    assert copied._compiled is None
    torch.testing.assert_close(copied(*inputs, iterations=5), before[1])
