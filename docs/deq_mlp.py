"""A deep-equilibrium layer with an MLP inside, trained: it runs as it stands."""

import torch
from torch import nn

import implicit

generator = torch.Generator().manual_seed(0)
x = torch.randn(256, 8, generator=generator)
y = x.prod(dim=1, keepdim=True).sign()

inject, head = nn.Linear(8, 32), nn.Linear(32, 1)
mlp = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
stop = implicit.Stop(rtol=1e-4, max_evals=100)
layer = implicit.DEQ(lambda z, u: torch.tanh(0.5 * mlp(z) + u), stop=stop)
parameters = [*inject.parameters(), *mlp.parameters(), *head.parameters()]
optimizer = torch.optim.Adam(parameters, lr=1e-3)
for step in range(30):
    solution = layer(torch.zeros(256, 32), inject(x))  # solution.check() would raise where a sample did not converge
    loss = nn.functional.mse_loss(head(solution.value), y)
    optimizer.zero_grad()
    loss.backward()  # the exact gradient, by the implicit function theorem
    optimizer.step()
    if step % 10 == 9:
        print(f"loss {loss.item():.3f}, converged {solution.converged.float().mean():.1%}")
