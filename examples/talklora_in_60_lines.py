"""TalkLoRA (arXiv 2604.06291) in plain PyTorch. T tokens, D input width, O output width, E experts, R rank of one."""

import torch
from torch import Tensor, nn


def kaiming(*shape: int) -> nn.Parameter:
    """U(±1/sqrt(last axis))."""
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1) * shape[-1] ** -0.5)


class TalkLoRA(nn.Module):
    """y = W x + sum_i w_i B_i K_i A_i x, with w = softmax(G [m_1 .. m_E]) and m_i = sum_j C_ij A_j x."""

    def __init__(self, frozen: nn.Linear, B_EOR: nn.Parameter) -> None:
        super().__init__()
        E, _, R = B_EOR.shape
        self.frozen = frozen.requires_grad_(False)
        self.A_ERD = kaiming(E, R, frozen.in_features)  # what every expert reads
        self.K_ERR = kaiming(E, R, R)  # its square core
        self.B_EOR = B_EOR  # what it writes: shared by the layers of one kind, zero at the start
        self.C_EE = kaiming(E, E)  # who listens to whom
        self.G_EM = kaiming(E, E * R)  # who speaks, decided from what all have heard

    def forward(self, x_TD: Tensor) -> Tensor:
        h_TER = torch.einsum("erd,td->ter", self.A_ERD, x_TD)
        m_TER = torch.einsum("ij,tjr->tir", self.C_EE, h_TER)  # the experts talk
        w_TE = torch.softmax(m_TER.flatten(1) @ self.G_EM.T, dim=-1)  # only the router hears it
        u_TEO = torch.einsum("eor,ers,tes->teo", self.B_EOR, self.K_ERR, h_TER)  # experts use their own h
        return self.frozen(x_TD) + torch.einsum("te,teo->to", w_TE, u_TEO)


def main() -> list[float]:
    """Two frozen layers learn a function that depends on the sign of the first coordinate; prints the loss."""
    torch.manual_seed(0)
    D, E, R = 16, 4, 2
    B_EOR = nn.Parameter(torch.zeros(E, D, R))
    model = nn.Sequential(TalkLoRA(nn.Linear(D, D), B_EOR), nn.Tanh(), TalkLoRA(nn.Linear(D, D), B_EOR))
    x_TD = torch.randn(512, D)
    y_TD = torch.where(x_TD[:, :1] > 0, x_TD, -x_TD).roll(1, dims=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for step in range(301):
        loss = (model(x_TD) - y_TD).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step:3}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
