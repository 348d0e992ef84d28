"""Trains with torch_fused.optim.AdamW, and exchanges checkpoints with torch.optim.AdamW."""

import torch

import torch_fused

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
x = torch.randn(256, 8)
y = x.sin().sum(1, keepdim=True)


def train(optimizer: torch.optim.Optimizer, steps: int) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


# A drop-in replacement for torch.optim.AdamW. For 16-bit parameters, state_dtype=torch.float32 keeps float32 averages.
ours = torch_fused.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
print(f"loss after   1 step,  torch_fused: {train(ours, 1):.4f}")
print(f"loss after 100 steps, torch_fused: {train(ours, 99):.4f}")

# torch's optimizer continues from our state dict ...
theirs = torch.optim.AdamW(model.parameters())
theirs.load_state_dict(ours.state_dict())
print(f"loss after 150 steps, torch:       {train(theirs, 50):.4f}")

# ... and ours from torch's.
ours = torch_fused.optim.AdamW(model.parameters())
ours.load_state_dict(theirs.state_dict())
print(f"loss after 200 steps, torch_fused: {train(ours, 50):.4f}")
print("steps counted:", int(ours.state[model[0].weight]["step"]))
