"""Which gradient? The bias meter on an equilibrium layer before and after training on handwritten digits.

python docs/gradients_digits.py        some minutes; draws docs/images/gradients.png and writes the table into
                                       docs/gradients.md
"""

import copy
import re
import statistics
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import implicit
from implicit import IFT, JFB, SHINE, AbstractGrad, Neumann, Phantom, StochasticJFB, Stop, diagnostics, plotting
from implicit.diagnostics import GradientBias, every_estimator
from implicit.diagnostics.gradient_bias import label, markdown, size

DOCS = Path(__file__).parent
STOP = Stop(rtol=1e-3, atol=0, max_evals=40)
WIDTH, BATCH, STEPS, RATE = 32, 64, 200, 5e-3


class Layer(nn.Module):
    """z' = norm(u + mlp(z)), u the image's projection."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return self.norm(u + self.mlp(z))


class Classifier(nn.Module):
    """Projection, equilibrium layer, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.inject, self.layer, self.head = nn.Linear(64, WIDTH), Layer(), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor, grad: AbstractGrad = IFT()) -> Tensor:
        u = self.inject(x)
        return self.head(implicit.fixed_point(self.layer, torch.zeros_like(u), u, grad=grad, stop=STOP).value)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then 297 held out."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels / 16 - 0.5, dtype=torch.float32)[order], torch.tensor(labels)[order]
    return x[:1500], y[:1500], x[1500:], y[1500:]


def fresh(seed: int) -> Classifier:
    """A model whose weights depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier()


def train(grad: AbstractGrad, seed: int) -> tuple[Classifier, float, float]:
    """The trained model, its held-out accuracy and the CPU seconds it took."""
    x, y, x_test, y_test = digits()
    model = fresh(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    rng = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in range(STEPS):
        rows = torch.randint(0, len(x), (BATCH,), generator=rng)
        loss = nn.functional.cross_entropy(model(x[rows], grad), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        right = (model(x_test).argmax(dim=1) == y_test).double().mean()
    return model, float(right), seconds


def measured(model: Classifier) -> tuple[GradientBias, str]:
    """The table on a batch of held-out images, and what kind of fixed point it is about."""
    model = copy.deepcopy(model)
    _, _, x, y = digits()
    u, y = model.inject(x[:BATCH]).detach(), y[:BATCH]
    z0 = torch.zeros_like(u)

    def loss(z: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model.head(z), y)

    table = diagnostics.gradient_bias(
        model.layer, z0, u, params=model.layer.parameters(), loss=loss, stop=STOP, draws=16, repeats=9
    )
    with torch.no_grad():
        z = implicit.fixed_point(model.layer, z0, u, stop=Stop(rtol=1e-6, atol=0, max_evals=500)).value
    radius = diagnostics.spectral_radius(model.layer, z, u)
    alignment = diagnostics.path_independence(model.layer, z0, u).score.min()
    text = f"spectral radius {radius.median():.2f} (median of {BATCH} images; largest {radius.max():.2f})"
    return table, f"{text}, alignment at least {alignment:.4f}"


def main() -> None:
    torch.set_num_threads(1)
    trained = {label(g): [train(g, seed) for seed in SEEDS] for g in every_estimator() if isinstance(g, TRAINED)}
    tables, kinds = {}, {}
    for name, model in {"untrained": fresh(0), "trained": trained["IFT"][0][0]}.items():
        tables[name], kinds[name] = measured(model)
    body = []
    for before, after in zip(tables["untrained"].rows, tables["trained"].rows, strict=True):
        accuracy = ("", "")
        if before.name in trained:
            rights, seconds = zip(*(run[1:] for run in trained[before.name]), strict=True)
            accuracy = (", ".join(f"{100 * right:.1f}" for right in rights), f"{statistics.median(seconds):.0f} s")
        bias = [f"{one.cosine:.3f}, {one.error:.1e}" for one in (before, after)]
        cost = [f"{after.evals:.3g}", f"{after.products:.3g}", size(after.saved), f"{after.time:.1f}"]
        body.append((before.name, *bias, *cost, *accuracy, after.note))
    kind = "\n".join(f"{name.capitalize()}: {kind}.\n" for name, kind in kinds.items())
    write("digits", kind + "\n" + markdown(HEAD, body))
    draw(tables, kinds)


SEEDS = (0,)
TRAINED = (IFT, JFB, SHINE, Neumann, Phantom, StochasticJFB)
HEAD = ("estimator", "untrained: cosine, error", "trained: cosine, error", "f", "VJPs", "saved", "time")
HEAD += ("accuracy, %", "training", "note")


def write(mark: str, text: str) -> None:
    """Put `text` between the marks in the guide."""
    page = (DOCS / "gradients.md").read_text()
    new = re.sub(f"(<!-- {mark} -->\n).*?(<!-- end -->)", lambda m: m[1] + text + "\n" + m[2], page, flags=re.DOTALL)
    (DOCS / "gradients.md").write_text(new)


def draw(tables: dict[str, GradientBias], kinds: dict[str, str]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for ax, (name, table) in zip(axes, tables.items(), strict=True):
        plotting.gradient_bias({name: table}, ax)
        ax.axhline(1.0, color="k", lw=0.8, ls="--")
        ax.set_title(f"{name}: {kinds[name].split(' (')[0]}")
        ax.set_ylabel("" if ax is axes[1] else ax.get_ylabel())
    figure.savefig(DOCS / "images" / "gradients.png", dpi=100)


if __name__ == "__main__":
    main()
