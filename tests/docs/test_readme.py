"""Each sentence of the README's promises is held by tests, which are named here and exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PROMISES = re.findall(r"^\* (.*)$", README.split("## What you can rely on")[1].split("\n## ")[0], re.M)
HELD_BY = {
    "`CONVERGED` and `residual` are true": (
        "implicit/test_claims.py::test_residual_is_that_of_the_value_whether_or_not_it_converged",
        "implicit/test_problem_set.py::test_no_false_claim_on_any_problem",
        "implicit/grads/test_contracts.py::test_a_claim_is_true_of_the_value_after_tracked_steps",
    ),
    "Rows that f couples": (
        "implicit/test_claims.py::test_rows_that_reach_each_other_are_solved_as_one_system",
        "implicit/grads/test_reversible.py::test_samples_that_f_couples_are_solved_as_one_system",
    ),
    "At one batch size": (
        "implicit/test_batch_mates.py::test_mates_change_no_bit_at_one_batch_size",
        "implicit/test_batch_mates.py::test_mates_change_no_step_of_a_sample_that_is_reset",
        "implicit/test_batch_mates.py::test_mates_whose_f_is_nan_on_the_way_do_not_change_when_a_sample_is_read",
    ),
    "At another batch size": ("implicit/test_problem_set.py::test_an_answer_does_not_depend_on_batch_mates",),
    "A sample that fails and is left out": (
        "implicit/autodiff/test_failed_samples.py"
        "::test_the_gradient_of_shared_weights_is_that_beside_a_sample_that_does_not_fail",
        "implicit/test_gpu.py::test_a_failed_sample_reaches_no_gradient_of_a_fixed_count",
    ),
    "Failure is a value": (
        "implicit/test_iterate.py::test_nan_later_in_one_sample_ends_that_sample_alone",
        "implicit/test_iterate.py::test_a_tolerance_out_of_reach_ends_early_with_advice",
        "implicit/test_claims.py::test_noise_in_f_is_named",
    ),
    "`IFT` passes `gradcheck`": ("implicit/grads/test_ift_orders.py::test_finite_differences",),
    "Gradients pass through `torch.func`": (
        "implicit/autodiff/test_functorch.py::test_transform_equals_the_reference",
    ),
    "A map that has changed": (
        "implicit/grads/test_changing_maps.py::test_a_map_that_changes_before_the_backward_pass_is_refused",
        "implicit/grads/test_changing_maps.py::test_a_map_that_is_another_where_autograd_records_it_is_refused",
        "implicit/grads/test_changing_maps.py::test_a_write_that_pytorch_does_not_count_is_as_in_a_plain_loop",
        "implicit/grads/test_changing_maps.py::test_a_change_of_small_entries_is_seen_above_rounding_of_the_largest",
    ),
    "The value and the result are the same": (
        "implicit/grads/test_contracts.py::test_one_value_and_result_with_and_without_a_graph",
    ),
    "The memory between the passes": (
        "implicit/grads/test_saved_and_repeated.py::test_storage_does_not_grow_with_the_solve",
    ),
    "The tolerance does not depend": (
        "implicit/test_tolerance.py::test_rtol_alone_decides_at_every_size",
        "implicit/test_tolerance.py::test_small_leaves_meet_the_tolerance_of_their_own",
    ),
    "States are tensors or nested": (
        "implicit/test_properties.py::test_nested_equals_flat",
        "implicit/test_properties.py::test_complex_equals_two_reals",
        "implicit/test_properties.py::test_contractions_converge_in_every_dtype",
    ),
    "Nothing is stored on modules": (
        "implicit/test_deq.py::test_parameters_are_those_of_the_map_and_nothing_is_kept",
        "implicit/grads/test_saved_and_repeated.py::test_a_layer_twice_in_one_graph_and_two_backward_passes",
    ),
    "`import implicit` needs": (
        "test_release.py::test_the_wheel_holds_the_library_and_works_with_the_declared_dependencies",
        "implicit/test_api.py::test_the_import_adds_little_to_that_of_torch_and_leaves_the_compiler_out",
    ),
}


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_is_held_by_tests(promise):
    held = [tests for start, tests in HELD_BY.items() if promise.startswith(start)]
    assert len(held) == 1
    for name in held[0]:
        file, test = name.split("::")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), name


def test_every_entry_is_a_promise():
    assert len(PROMISES) == len(HELD_BY)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 110
