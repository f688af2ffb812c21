"""The diffusers pipeline gives the images of the sampler, before and after saving, and from the saved folder only."""

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from apps.diffusion import sample as sample_command
from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.config.sampling import SamplingOptions
from apps.diffusion.files.images import read
from apps.diffusion.models import FPDM, DiT
from apps.diffusion.pipeline import FixedPointPipeline
from apps.diffusion.sampling.sampler import Solve
from apps.diffusion.sampling.warm_start import Reuse
from apps.diffusion.schedulers.noise_schedule import make_scheduler
from apps.diffusion.schedulers.timesteps import timesteps
from implicit import Anderson, Stop
from tests.apps.diffusion.helpers import image_files
from tests.apps.diffusion.helpers.small_models import randomized, sample_by
from tests.apps.diffusion.helpers.training_runs import barely_trained

SMALL = {"input_size": 4, "hidden_size": 16, "num_heads": 2, "num_classes": 5}


def network(kind="fpdm", **options):
    return randomized(FPDM(**{**SMALL, **options}) if kind == "fpdm" else DiT(depth=2, **{**SMALL, **options})).eval()


def pipeline(kind="fpdm", vae=True, **options) -> Any:
    pipe = FixedPointPipeline(
        network(kind, **options), make_scheduler("ddpm"), image_files.tiny_vae() if vae else None, steps=3
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    sampling = SamplingOptions(steps=2, iterations=(3,), sampler="ddpm")
    return barely_trained(tmp_path_factory.mktemp("run"), sampling=sampling)


@pytest.mark.parametrize("kind", ["fpdm", "dit"])
def test_saved_and_loaded_gives_the_same_bits(tmp_path, kind):
    pipe = pipeline(kind)
    call = {"class_labels": [0, 4, 2], "generator": 7, "output_type": "pt", "reproducible": True}
    first = pipe(**call).images
    assert first.shape == (3, 3, 16, 16) and 0 <= first.min() < first.max() <= 1
    pipe.save_pretrained(tmp_path)
    suffixes = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert suffixes == {".json", ".safetensors", ".py", ".md"}
    again: Any = FixedPointPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.model) is type(pipe.model) and again.config["steps"] == 3
    assert torch.equal(again(**call).images, first)


def test_it_samples_as_the_sampler_does():
    pipe = pipeline()
    walk = timesteps(4)
    options = {"iterations": (4, 3, 2, 1), "solver": Anderson(memory=2)}
    expected = sample_by(
        pipe.model,
        range(3),
        [2, 2, 2],
        seed=11,
        scheduler=make_scheduler("ddpm"),
        timesteps=walk,
        solve=Solve(reuse=Reuse(), **options),
    )
    call = {"num_images": 3, "num_inference_steps": 4, "generator": 11, "reuse": True, "reproducible": True, **options}
    found = pipe(2, output_type="latent", **call)
    assert torch.equal(found.images, expected.samples) and found.seed == 11
    assert torch.equal(found.effort.evaluations, torch.tensor([[4, 3, 2, 1]] * 3))
    with torch.no_grad():
        vae: Any = image_files.tiny_vae()
        decoded = vae.decode(expected.samples / 0.5 + 0.25).sample
    pixels = pipe(2, output_type="pt", **call)
    torch.testing.assert_close(pixels.images, (decoded.clamp(-1, 1) + 1) / 2, rtol=1e-4, atol=1e-5)


def test_every_choice_has_an_effect():
    pipe = pipeline()

    def images(**options):
        call = {"class_labels": [1, 2], "generator": 0, "output_type": "latent", "reproducible": True}
        return pipe(**{**call, **options}).images

    plain = images()
    assert torch.equal(plain, images()) and torch.equal(plain, images(timesteps=timesteps(3)))
    for options in (
        {"class_labels": [1, 3]},
        {"generator": 1},
        {"num_inference_steps": 4},
        {"timesteps": [999, 500, 3]},
        {"guidance_scale": 3.0},
        {"iterations": 1},
        {"stop": Stop(rtol=1e-1, atol=0.0, max_evals=30)},
        {"solver": Anderson()},
        {"reuse": True},
        {"reuse": Reuse(share=0.5)},
        {"reuse": "history", "solver": Anderson()},
        {"parallel": "picard", "parallel_rtol": 0.1},
    ):
        assert not torch.equal(plain, images(**options)), options
    assert not torch.equal(images(guidance_scale=3.0), images(guidance_scale=3.0, guidance_channels=2))
    exact = images(parallel=True, parallel_rtol=1e-6)
    torch.testing.assert_close(exact, plain, rtol=1e-2, atol=1e-2)
    measured = pipe([1, 2], generator=0, iterations=3, allocation="measured", output_type="latent")
    assert 3 <= sum(measured.effort.evaluations[0].tolist()) <= 9


def test_a_generator_advances_and_a_seed_repeats():
    pipe = pipeline()

    def images(generator, chunk=2):
        return pipe([1], generator=generator, output_type="latent", chunk=chunk, reproducible=True)

    source = torch.Generator().manual_seed(3)
    first, second = images(source), images(source)
    assert not torch.equal(first.images, second.images)
    assert torch.equal(images(torch.Generator().manual_seed(3)).images, first.images)
    assert torch.equal(images(first.seed).images, first.images)
    fresh = images(None)
    assert fresh.seed != images(None).seed and torch.equal(images(fresh.seed).images, fresh.images)
    torch.testing.assert_close(images(first.seed, chunk=1).images, first.images, rtol=1e-3, atol=1e-4)


def test_a_run_gives_the_images_of_the_sample_command(run, tmp_path):
    assert sample_command.main([str(run), "--num", "5", "--seed", "4", "--out", str(tmp_path / "files")]) == 0
    pipe: Any = FixedPointPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(range(5), generator=4, reproducible=True).images
    for i, image in enumerate(images):
        assert np.array_equal(np.asarray(image), np.asarray(read(tmp_path / "files" / f"{i:05d}-class-{i}.png")))
    pipe.save_pretrained(tmp_path / "saved")
    again: Any = FixedPointPipeline.from_pretrained(tmp_path / "saved")
    assert (again.config["steps"], again.config["iterations"], again.vae) == (2, 3, None)
    assert [np.asarray(p).tobytes() for p in again(range(5), generator=4, reproducible=True).images] == [
        np.asarray(p).tobytes() for p in images
    ]
    last = FixedPointPipeline.from_run(run, weights="model", sampler="ddim")
    assert type(last.scheduler).__name__ == "DDIMScheduler"
    state = checkpoint.newest(run)
    for name, value in last.model.state_dict().items():
        assert torch.equal(value, state.model[name])


def test_a_vae_by_its_folder(tmp_path):
    pipeline(vae=False).save_pretrained(tmp_path / "saved")
    image_files.tiny_vae().save_pretrained(tmp_path / "vae")
    pipe: Any = FixedPointPipeline.from_pretrained(tmp_path / "saved", vae=tmp_path / "vae")
    expected = pipeline()([1], generator=0, output_type="pt", reproducible=True).images
    assert torch.equal(pipe([1], generator=0, output_type="pt", reproducible=True).images, expected)
    other = FixedPointPipeline.from_pretrained(tmp_path / "saved", scheduler=make_scheduler("ddim"))
    assert type(other.scheduler).__name__ == "DDIMScheduler"
    with pytest.raises(ValueError, match="AutoencoderKL"):
        FixedPointPipeline.from_pretrained(tmp_path / "saved", vae=tmp_path / "nowhere")


def test_an_unconditional_network_takes_a_number(tmp_path):
    pipe = pipeline(num_classes=0)
    assert len(pipe(num_images=3, generator=0).images) == 3 and len(pipe(generator=0).images) == 1
    with pytest.raises(ValueError, match="class_labels"):
        pipe([1])
    with pytest.raises(ValueError, match="guidance"):
        pipe(guidance_scale=2.0)


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("fpdm", {}, "class_labels"),
        ("fpdm", {"class_labels": [0, 6]}, "class_labels"),
        ("fpdm", {"class_labels": []}, "class_labels"),
        ("fpdm", {"class_labels": [0, 1], "num_images": 3}, "num_images"),
        ("fpdm", {"class_labels": 0, "num_images": 0}, "num_images"),
        ("fpdm", {"class_labels": 0, "output_type": "jpg"}, "output_type"),
        ("fpdm", {"class_labels": 0, "generator": -1}, "generator"),
        ("fpdm", {"class_labels": 0, "generator": [torch.Generator()]}, "generator"),
        ("fpdm", {"class_labels": 0, "num_inference_steps": 1001}, "1001"),
        ("fpdm", {"class_labels": 0, "iterations": [1, 2]}, "iterations"),
        ("dit", {"class_labels": 0, "iterations": 3}, "iterations"),
        ("dit", {"class_labels": 0, "reuse": True}, "reuse"),
    ],
)
def test_what_does_not_fit_is_refused(kind, options, name):
    with pytest.raises(ValueError, match=name):
        pipeline(kind)(**options)


def test_latents_without_a_vae_are_not_shown():
    pipe = pipeline(vae=False)
    with pytest.raises(ValueError, match="vae"):
        pipe([0], generator=0)
    assert pipe([0], generator=0, output_type="latent", return_dict=False)[0].shape == (1, 4, 4, 4)


def test_what_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        FixedPointPipeline.from_pretrained(tmp_path)
    for text in ("{", "[]", '{"model": ["a", "UNet"], "scheduler": ["diffusers", "DDIMScheduler"]}'):
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match="model_index"):
            FixedPointPipeline.from_pretrained(tmp_path)
    pipeline().save_pretrained(tmp_path / "saved")
    image_files.truncate(tmp_path / "saved" / "model" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="diffusion_pytorch_model"):
        FixedPointPipeline.from_pretrained(tmp_path / "saved")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        FixedPointPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["fpdm", "dit"])
@pytest.mark.parametrize("change", ["missing", "unknown", "misshapen"])
def test_weights_that_are_not_the_networks_are_refused(tmp_path, kind, change):
    pipe = pipeline(kind, vae=False)
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "final_layer.linear.bias"
    if change == "unknown":
        tensors["mine"] = torch.zeros(1)
    elif change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    where = "mine" if change == "unknown" else name
    with pytest.raises(ValueError, match=where):
        FixedPointPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=where):
        type(pipe.model).from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"timesteps": []}, "timesteps"),
        ({"timesteps": [500, 100]}, "timesteps"),
        ({"timesteps": [999, 100], "num_inference_steps": 2}, "num_inference_steps"),
        ({"allocation": "bogus", "iterations": 4}, "allocation"),
        ({"allocation": "increasing", "iterations": [4, 4, 4]}, "allocation"),
        ({"class_labels": [1.7]}, "class_labels"),
        ({"class_labels": True}, "class_labels"),
        ({"chunk": 0}, "chunk"),
        ({"iterations": 0}, "iterations"),
        ({"macs": float("nan")}, "macs"),
        ({"macs": float("inf")}, "macs"),
        ({"block_passes": 31.5}, "block_passes"),
        ({"guidance_scale": "2"}, "guidance_scale"),
        ({"macs": True}, "macs"),
        ({"sampler": "unipc", "parallel": "picard"}, "parallel"),
        ({"stop": Stop(), "iterations": 3}, "stop"),
        ({"stop": Stop(), "seconds": 1.0, "allocation": "measured"}, "seconds"),
        ({"stop": Stop(), "allocation": "increasing"}, "allocation"),
    ],
)
def test_a_call_is_as_strict_as_the_command(options, name):
    with pytest.raises(ValueError, match=name):
        pipeline(vae=False)(**{"class_labels": 0, "generator": 0, "output_type": "latent", **options})


def test_whole_numbers_of_numpy_and_torch_are_whole_numbers():
    pipe = pipeline(vae=False)

    def images(label, walk, iterations, seed: Any = 0):
        return pipe(label, timesteps=walk, iterations=iterations, generator=seed, output_type="latent").images

    plain = images(3, [999, 400, 30], [4, 3, 2])
    whole = (torch.tensor([999, 400, 30]), np.array([4, 3, 2]), np.int64(0))
    for label in (np.int64(3), torch.tensor(3), torch.tensor([3]), np.array([3])):
        assert torch.equal(images(label, *whole), plain)
    shared = pipe(3, iterations=2, allocation="increasing", generator=0, output_type="latent").effort.evaluations
    assert shared.tolist() == [[1, 2, 3]]
    guided = [pipe(3, guidance_scale=s, generator=0, output_type="latent").images for s in (2.0, np.float32(2), 2)]
    assert torch.equal(guided[0], guided[1]) and torch.equal(guided[0], guided[2])


def test_budgets_and_the_pipelines_own_choices(tmp_path):
    pipe = pipeline()
    spent = pipe([0, 1], generator=0, block_passes=31, allocation="increasing", output_type="latent").effort
    assert spent.block_passes.tolist() == [31, 31] and spent.evaluations[0].tolist() == [5, 8, 12]
    model: Any = pipe.model
    spent = pipe([0], generator=0, macs=3.0 * model.macs(4), output_type="latent").effort
    assert spent.evaluations.tolist() == [[4, 4, 4]]
    with pytest.raises(ValueError, match=r"iterations\b.*\bblock_passes"):
        pipe([0], iterations=3, block_passes=31)
    with pytest.raises(ValueError, match="macs"):
        pipeline("dit")([0], macs=1e9)
    own: Any = FixedPointPipeline(model, make_scheduler("ddpm"), None, 3, 2, guidance=3.0, reuse=True)
    own.set_progress_bar_config(disable=True)
    given = pipe([1], generator=0, iterations=2, guidance_scale=3.0, reuse=True, output_type="latent")
    own.save_pretrained(tmp_path)
    again: Any = FixedPointPipeline.from_pretrained(tmp_path)
    for same in (own, again):
        assert torch.equal(same([1], generator=0, output_type="latent").images, given.images)


@pytest.mark.parametrize("kind", ["fpdm", "dit"])
def test_one_image_costs_one_image_unless_it_is_to_be_reproducible(kind):
    pipe = pipeline(kind, vae=False)
    call = {"generator": 3, "output_type": "latent", "num_inference_steps": 2}
    one, whole = pipe([1], **call), pipe([1], **call, reproducible=True)
    per_image = int(one.effort.block_passes)
    assert (one.effort.computed, whole.effort.computed) == (per_image, 16 * per_image)
    torch.testing.assert_close(one.images, whole.images, rtol=1e-4, atol=1e-4)
    several = pipe([1, 0, 2], **call, chunk=2)
    assert several.effort.computed == 3 * per_image
    torch.testing.assert_close(several.images[:1], one.images, rtol=1e-4, atol=1e-4)
