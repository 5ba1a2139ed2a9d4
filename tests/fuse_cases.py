"""A model with one of each that fuse() knows, for its tests."""

import torch
from torch import nn

WIDE = 512  # from where a layer norm by itself is fused on a CPU


class Model(nn.Module):
    """One of each that is known."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(WIDE)
        self.rms = nn.RMSNorm(WIDE, eps=1e-5)
        self.drop = nn.Dropout(dropout)
        self.attention = nn.MultiheadAttention(WIDE, 8, dropout=dropout, batch_first=True)
        layer = {"dim_feedforward": 96, "dropout": dropout, "batch_first": True}
        self.encoder = nn.TransformerEncoderLayer(WIDE, 8, activation="gelu", **layer)
        self.decoder = nn.TransformerDecoderLayer(WIDE, 8, norm_first=True, **layer)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.rand(WIDE))

    def forward(self, x, target):
        x = self.drop(self.rms(self.norm(x)))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.decoder(self.encoder(x), x, tgt_is_causal=False)
        return self.loss(x.flatten(0, 1), target.flatten())


def inputs():
    return torch.randn(2, 11, WIDE), torch.randint(WIDE, (2, 11))


def run(model, x, target):
    """The loss and all gradients as one vector."""
    x = x.to(next(model.parameters()).dtype).requires_grad_()
    loss = model(x, target)
    grads = torch.autograd.grad(loss, [x, *model.parameters()])
    return loss, torch.cat([grad.flatten() for grad in grads])


def names(entries):
    return {entry.name for entry in entries}
