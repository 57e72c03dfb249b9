"""Plain torch nets, as people write them. Each takes x [batch, length, 32], and gives one tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D


class Stack(nn.Sequential):
    """`nn.Sequential` under a keyword."""

    def forward(self, x):
        return super().forward(x)


def perceptron():
    return Stack(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32, bias=False), nn.Tanh(), nn.Linear(32, 5))


def weight_norm():
    return Stack(parametrizations.weight_norm(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 5))


def spectral_norm():
    return Stack(parametrizations.spectral_norm(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 5))


def pruned():
    return Stack(prune.random_unstructured(nn.Linear(32, 32), "weight", 0.5), nn.ReLU(), nn.Linear(32, 5))


def transposed():
    return Stack(Conv1D(48, 32), nn.ReLU(), Conv1D(5, 48))


def hooked():
    net = perceptron()
    net[0].register_forward_hook(lambda module, inputs, output: 3 * output)
    net[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return net


def transformer_encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return Stack(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 5))


class transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Transformer(32, 4, 1, 1, 64, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.body(x, x.flip(1))


class attention(nn.Module):
    """`nn.MultiheadAttention` reads its out_proj's weight."""

    def __init__(self):
        super().__init__()
        self.first, self.attn, self.head = nn.Linear(32, 32), nn.MultiheadAttention(32, 4), nn.Linear(32, 5)

    def forward(self, x):
        x = self.first(x)
        return self.head(self.attn(x, x, x)[0])


class convolutional(nn.Module):
    """Convolutions, batch norm, pooling, a linear head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(32, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 16, 1))
        self.head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x):
        return self.head(self.body(x.transpose(1, 2)).mean(-1))


class recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.lstm, self.gru = nn.Linear(32, 32), nn.LSTM(32, 16, batch_first=True), nn.GRU(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.gru(self.lstm(self.inside(x))[0])[0])


class cell(nn.Module):
    """One layer in every step, on its own output."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, x):
        state = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            state = torch.tanh(self.mix(torch.cat([step, state], -1)))
        return self.head(state)


class mixer(nn.Module):
    """Layers over positions and over channels."""

    def __init__(self):
        super().__init__()
        self.positions, self.channels, self.norm = nn.Linear(6, 6), nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, x):
        x = x + self.positions(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm(x))


class tied_autoencoder(nn.Module):
    """The decoder reads the encoder's weight, transposed."""

    def __init__(self):
        super().__init__()
        self.encoder, self.last = nn.Linear(32, 16), nn.Linear(32, 32)

    def forward(self, x):
        return self.last(F.linear(self.encoder(x).relu(), self.encoder.weight.t()))


class tied_layers(nn.Module):
    """Two layers of one Parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 5)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()))


class shared_module(tied_layers):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.second = self.first


class mixture(nn.Module):
    """Experts that are linear layers, a gate, and a scorer with one output."""

    def __init__(self):
        super().__init__()
        self.gate, self.score = nn.Linear(32, 3), nn.Linear(32, 1)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(3))

    def forward(self, x):
        shares = self.gate(x).softmax(-1)
        mixed = sum(shares[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return self.score(x).sigmoid() * mixed


class in_place(nn.Module):
    """Changes the output of a layer in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32, bias=False), nn.Linear(32, 5)

    def forward(self, x):
        y = self.first(x)
        y += x
        z = self.second(y)
        z *= 2
        return z


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Written(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


def subclasses():
    """Layers with a forward of their own: another function, and the same one."""
    return Stack(Scaled(32, 32), nn.ReLU(), Written(32, 32), nn.ReLU(), nn.Linear(32, 5))


class unet(nn.Module):
    """Down, up, with a skip connection, and a time embedding."""

    def __init__(self):
        super().__init__()
        self.time, self.down, self.middle = nn.Linear(8, 16), nn.Linear(32, 16), nn.Linear(16, 16)
        self.up, self.out = nn.Linear(16, 32), nn.Linear(64, 32)

    def forward(self, x):
        down = self.down(x).relu() + self.time(torch.linspace(0, 1, 8).sin())
        return self.out(torch.cat([x, self.up(self.middle(down).relu() + down)], -1))


class low_rank(nn.Module):
    """Multiplies two weights before the input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 8, bias=False), nn.Linear(8, 32, bias=False)

    def forward(self, x):
        return x @ (self.b.weight @ self.a.weight).T + x @ self.a.weight.T @ self.b.weight.T


NETS = (
    "perceptron transposed hooked subclasses in_place weight_norm spectral_norm pruned convolutional recurrent cell "
    "mixer unet low_rank attention transformer_encoder transformer mixture tied_autoencoder tied_layers shared_module"
)
