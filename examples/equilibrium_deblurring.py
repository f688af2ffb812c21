"""Deblurring digits by an equilibrium model with a learned prior, compared with an unrolled model.

Given y = A x + noise, A a Gaussian blur, the iteration alternates a gradient step on the data with a learned map R:

    f(z, y) = R(z - A^T (A z - y)),    R(v) = v / 2 + W_2 gelu(W_1 v + b_1) + b_2

The equilibrium model is trained at z* = f(z*, y), with the exact gradient. Its twin has the same parameters and is
trained through 10 iterations. With more iterations at test time the reconstruction of the first model does not change,
and that of the second model changes, since it was trained for 10 iterations.
Gilton, Ongie and Willett, "Deep Equilibrium Architectures for Inverse Problems in Imaging", IEEE TCI 2021, arXiv
2102.07944. The linear reference is (A^T A + lambda I)^-1 A^T y at the best lambda.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from implicit import DEQ, IFT, AndersonGS, Picard, Stop, Unrolled, fixed_point
from implicit.diagnostics import jacobian_penalty

DEPTHS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100)


class Reconstruction(nn.Module):
    """f(z, y) above, on images (B, 64)."""

    blur: Tensor

    def __init__(self, blur: Tensor, hidden: int = 128) -> None:
        super().__init__()
        self.register_buffer("blur", blur)
        self.prior = nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 64))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        v = z - (z @ self.blur.T - y) @ self.blur
        return v / 2 + self.prior(v)


def gaussian_blur(width: float) -> Tensor:
    """A (64, 64), which blurs the rows and the columns of an 8 x 8 image by a normalized Gaussian."""
    at = torch.arange(8.0)
    line = torch.exp(-((at[:, None] - at) ** 2) / (2 * width**2))
    line = line / line.sum(1, keepdim=True)
    return torch.kron(line, line)


def psnr(z: Tensor, x: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels, peak 1, of the mean square error of all images."""
    return float(-10 * torch.log10((z - x).square().mean()))


def train(deq: DEQ, x: Tensor, y: Tensor, steps: int, penalty: float, seed: int) -> None:
    """Trains by Adam on the mean square error, with batches of 64."""
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(deq.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (64,), generator=rng)
        z = deq(torch.zeros(64, 64), y[rows]).value
        loss = 100 * (z - x[rows]).square().mean()
        if penalty:
            loss = loss + penalty * jacobian_penalty(deq.f, z.detach(), y[rows], generator=rng).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def by_depth(deq: DEQ, x: Tensor, y: Tensor) -> list[float]:
    """PSNR after n plain iterations from zero, for each n of DEPTHS."""
    values = []
    for depth in DEPTHS:
        stop = Stop(rtol=0, atol=0, max_evals=depth)
        values.append(psnr(fixed_point(deq.f, torch.zeros_like(y), y, solver=Picard(), stop=stop).value, x))
    return values


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description="Deblurring by an equilibrium model and by an unrolled model.")
    parser.add_argument("--steps", type=int, default=400, help="training steps of 64 images, for each model")
    parser.add_argument("--width", type=float, default=1.0, help="standard deviation of the blur, pixels")
    parser.add_argument("--noise", type=float, default=0.02, help="standard deviation of the noise")
    parser.add_argument("--penalty", type=float, default=0.1, help="weight of the Jacobian penalty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", help="file for a figure of PSNR by iterations, and some images")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    x = torch.tensor(load_digits(return_X_y=True)[0] / 16, dtype=torch.float32)[torch.randperm(1797, generator=rng)]
    blur = gaussian_blur(args.width)
    y = x @ blur.T + args.noise * torch.randn(x.shape, generator=rng)
    x_test, y_test = x[1500:], y[1500:]
    linear = max(
        psnr(torch.linalg.solve(blur.T @ blur + weight * torch.eye(64), blur.T @ y_test.T).T, x_test)
        for weight in torch.logspace(-5, 0, 51)
    )
    print(
        f"PSNR of the blurred images {psnr(y_test, x_test):.2f} dB, of the best linear reconstruction {linear:.2f} dB"
    )
    kinds = {
        "equilibrium": (IFT(), Stop(rtol=1e-3, max_evals=60), args.penalty),
        "unrolled twin": (Unrolled(), Stop(rtol=0, atol=0, max_evals=10), 0.0),
    }
    curves, images = {}, {"true": x_test, "blurred": y_test}
    for name, (grad, stop, penalty) in kinds.items():
        torch.manual_seed(args.seed)
        solver = Picard() if name == "unrolled twin" else AndersonGS()
        deq = DEQ(Reconstruction(blur), solver=solver, grad=grad, stop=stop, eval_stop=Stop(rtol=1e-4, max_evals=200))
        train(deq, x[:1500], y[:1500], args.steps, penalty, args.seed)
        curves[name] = by_depth(deq, x_test, y_test)
        print(f"{name}:", ", ".join(f"{d}: {v:.2f}" for d, v in zip(DEPTHS, curves[name], strict=True)), "dB")
        with torch.no_grad():
            found = deq.eval()(torch.zeros_like(y_test), y_test)
        images[name] = found.value
        print(
            f"  at its fixed point {psnr(found.value, x_test):.2f} dB, {found.converged.float().mean():.1%} converged"
        )
    if args.figure:
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
        for name, values in curves.items():
            left.semilogx(DEPTHS, values, ".-", label=name)
        left.axhline(linear, color="k", ls=":", label="linear")
        left.set(xlabel="iterations at test time (10 in the twin's training)", ylabel="PSNR, dB", ylim=(10, None))
        left.legend()
        right.imshow(
            torch.cat([torch.cat(list(z[:8].view(8, 8, 8)), 1) for z in images.values()]), "gray", vmin=0, vmax=1
        )
        right.set(xticks=[], yticks=[4 + 8 * i for i in range(4)], yticklabels=list(images))
        figure.savefig(args.figure, dpi=80)
    return curves


if __name__ == "__main__":
    main()
