"""The architectures on which symmetries are proven, small, with an example batch and the groups found by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, gelu, interpolate, max_pool2d, pad, relu


class Convolved(nn.Sequential):
    """A convolution of 3 × 3 pixels, or of another kernel, its batch norm, and perhaps a ReLU."""

    def __init__(self, fan_in: int, fan_out: int, kernel: int = 3, stride: int = 1, last: bool = False) -> None:
        super().__init__(
            nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(fan_out),
            nn.Identity() if last else nn.ReLU(),
        )


def mlp(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width + 1), nn.ReLU(), nn.Linear(width + 1, 5)
    )


def lenet(width: int = 2) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 3 * width, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(3 * width, 8 * width, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(8 * width * 16, 60), nn.ReLU(), nn.Linear(60, 42), nn.ReLU(), nn.Linear(42, 10)),
    )


def vgg9(width: int = 2) -> nn.Module:
    channels = [3, width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
    convolutions = [
        layer
        for depth, (fan_in, fan_out) in enumerate(pairwise(channels))
        for layer in (nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if depth % 2 else []))
    ]
    dense = [nn.Linear(8 * width * 4, 16 * width), nn.ReLU(), nn.Linear(16 * width, 16 * width), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), *dense, nn.Dropout(), nn.Linear(16 * width, 10))


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut, which a projection or zeros widen."""

    def __init__(self, fan_in: int, width: int, stride: int, projected: bool) -> None:
        super().__init__()
        self.stride, self.missing = stride, width - fan_in
        self.first = Convolved(fan_in, width, 3, stride)
        self.second = Convolved(width, width, last=True)
        if projected and stride > 1:
            self.shortcut = Convolved(fan_in, width, 1, stride, last=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        if hasattr(self, "shortcut"):
            x = self.shortcut(x)
        elif self.missing:
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.missing // 2, self.missing // 2))
        return relu(x + y)


class Bottleneck(nn.Module):
    """Convolutions of 1, 3 and 1 pixels beside a shortcut, projected where the width or the stride changes."""

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.reduce = Convolved(fan_in, width, 1)
        self.within = Convolved(width, width, 3, stride)
        self.extend = Convolved(width, 4 * width, 1, last=True)
        self.shortcut = Convolved(fan_in, 4 * width, 1, stride, last=True) if fan_in != 4 * width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.shortcut(x) + self.extend(self.within(self.reduce(x))))


class ResNet(nn.Module):
    """A convolution, blocks, the mean over positions, and a linear layer."""

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.Sequential(*blocks), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


def resnet20(width: int = 4, projected: bool = True) -> nn.Module:
    widths = [width, *(width * 2**stage for stage in range(3) for _ in range(3))]
    blocks = [BasicBlock(a, b, 1 if a == b else 2, projected) for a, b in pairwise(widths)]
    return ResNet(Convolved(3, width), blocks, 4 * width)


def resnet50(width: int = 2) -> nn.Module:
    stages = [stage for stage, depth in enumerate((3, 4, 6, 3)) for _ in range(depth)]
    fan_ins = [width, *(4 * width * 2**stage for stage in stages)]
    strides = [1, *(2 if a != b else 1 for a, b in pairwise(stages))]
    blocks = [Bottleneck(*one) for one in zip(fan_ins, (width * 2**stage for stage in stages), strides, strict=False)]
    return ResNet(nn.Sequential(Convolved(3, width), nn.MaxPool2d(2)), blocks, 32 * width)


class ViT(nn.Module):
    """Patches, a class token and positions into a pre-norm encoder, which is read at the class token."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        z = self.patches(x).flatten(2).transpose(1, 2)
        z = torch.cat([self.token.expand(len(z), -1, -1), z], dim=1) + self.positions
        return self.head(self.encoder(z)[:, 0])


class Attention(nn.Module):
    """Self-attention with a layer each for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        every = (layer(x).unflatten(2, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        q, k, v = (one.transpose(1, 2) for one in every)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        return self.out((scores @ v).transpose(1, 2).flatten(2))


class PostNorm(nn.Module):
    """A layer of BERT's encoder."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.norm = Attention(width, heads), nn.LayerNorm(width)
        self.intermediate, self.output = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm_output = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x))
        return self.norm_output(x + self.output(gelu(self.intermediate(x))))


class Bert(nn.Module):
    """MiniLM's shape, six layers of twelve heads, with a pooler and two classes; or the words back, by tied weights."""

    def __init__(self, width: int = 24, tied: bool = False) -> None:
        super().__init__()
        self.words, self.positions, self.types = (nn.Embedding(n, width) for n in (30, 16, 2))
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*(PostNorm(width, 12) for _ in range(6)))
        self.pooler = nn.Linear(width, width)
        self.head = nn.Linear(width, 30 if tied else 2)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        places = torch.arange(words.shape[1], device=words.device)
        x = self.norm(self.words(words) + self.positions(places) + self.types(torch.zeros_like(words)))
        return self.head(self.pooler(self.layers(x)[:, 0]).tanh())


class Recurrent(nn.Module):
    """Words into a recurrent network, read at the last."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, width: int = 6, **options: bool | int) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 5)
        self.cell = kind(5, width, batch_first=True, **options)
        self.head = nn.Linear(2 * width if options.get("bidirectional") else width, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.cell(self.words(words))[0][:, -1])


class Gates(nn.Module):
    """An LSTM out of linear layers, with one number as its first state."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back, self.head = nn.Linear(5, 24), nn.Linear(6, 24), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(len(x), 6, dtype=x.dtype)
        for step in x.unbind(1):
            i, f, g, o = (self.into(step) + self.back(h)).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


class Grouped(nn.Module):
    """A convolution in groups and its group norm, then one for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.groups, self.norm = nn.Conv2d(8, 16, 3, groups=4), nn.GroupNorm(4, 16)
        self.mix, self.each, self.last = nn.Conv2d(16, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.norm(self.groups(relu(self.first(x)))))
        return self.last(relu(self.each(relu(self.mix(x))))).mean((2, 3))


class Dense(nn.Module):
    """Each layer sees the outputs of all before it; the last sees them flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(fan_in, fan_out, 3, padding=1) for fan_in, fan_out in ((3, 4), (7, 5), (12, 6))
        )
        self.norm = nn.BatchNorm2d(18)
        self.head = nn.Linear(18 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, relu(layer(x))], dim=1)
        return self.head(max_pool2d(self.norm(x), 2).flatten(1))


class UNet(nn.Module):
    """Down and up again, beside what did not go down."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(6, 5, 2, 2), nn.Conv2d(15, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        down = relu(self.down(x))
        bottom = self.bottom(max_pool2d(down, 2))
        wide = interpolate(bottom, scale_factor=2, mode="bilinear")
        return self.last(torch.cat([down, relu(self.up(bottom)), wide], dim=1))


def along(convolution: type[nn.Module], pool: type[nn.Module], axes: int) -> nn.Module:
    """Convolutions along one axis or three."""
    return nn.Sequential(
        *(convolution(2, 6, 3), nn.ReLU(), pool(2), convolution(6, 4, 2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(4 * 2**axes, 3)),
    )


def normed() -> nn.Module:
    """Weights that are computed from others."""
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(nn.Flatten(), norm(nn.Linear(12, 8)), nn.PReLU(8), norm(nn.Linear(8, 5)))


@dataclass(frozen=True)
class Case:
    """A network, an example batch, and the size of each of its groups; `outputs` are the tensors that end it."""

    make: Callable[..., nn.Module]
    example: Tensor
    groups: Mapping[str, int]
    outputs: tuple[str, ...]

    @property
    def network(self) -> nn.Module:
        """The network as it is always initialised."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make()


def images(channels: int, *sides: int) -> Tensor:
    return torch.rand(2, channels, *sides, generator=torch.Generator().manual_seed(0))


WORDS = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(0))
HEAD = ("head.weight", "head.bias")
INNER = {f"blocks.{block}.first.0": 4 * 2 ** (block // 3) for block in range(9)}
BOTTLENECKS = {
    f"blocks.{block}.{layer}.0": 2 * 2**stage
    for stage, blocks in enumerate((range(3), range(3, 7), range(7, 13), range(13, 16)))
    for block in blocks
    for layer in ("reduce", "within")
}
LAYERS = {
    f"layers.{layer}.{module}": units
    for layer in range(6)
    for module, units in (("attention.query", 12), ("intermediate", 96))
}
ENCODER = {
    f"encoder.layers.{layer}.{name}": units for layer in range(2) for name, units in (("self_attn", 4), ("linear1", 32))
}

EIGHT = {
    "MLP": Case(mlp, images(1, 3, 4), {"1": 8, "3": 9}, ("5.weight", "5.bias")),
    "LeNet": Case(lenet, images(1, 28, 28), {"0": 6, "3": 16, "7": 60, "9": 42}, ("11.weight", "11.bias")),
    "VGG-9": Case(
        vgg9,
        images(3, 16, 16),
        {"0": 2, "2": 4, "5": 8, "7": 8, "10": 16, "12": 16, "16": 32, "18": 32},
        ("21.weight", "21.bias"),
    ),
    "ResNet-20": Case(
        resnet20, images(3, 8, 8), {"stem.0": 4, "blocks.3.second.0": 8, "blocks.6.second.0": 16, **INNER}, HEAD
    ),
    "ResNet-50": Case(
        resnet50,
        images(3, 16, 16),
        {
            "stem.0.0": 2,
            **{f"blocks.{at}.extend.0": n for at, n in ((0, 8), (3, 16), (7, 32), (13, 64))},
            **BOTTLENECKS,
        },
        HEAD,
    ),
    "ViT": Case(ViT, images(3, 16, 16), {"token": 16, **ENCODER}, HEAD),
    "BERT": Case(Bert, WORDS, {"words": 24, **LAYERS, "pooler": 24}, HEAD),
    "LSTM": Case(Recurrent, WORDS, {"words": 5, "cell": 6}, HEAD),
}

OTHERS = {
    "padded ResNet-20": Case(
        partial(resnet20, projected=False),
        images(3, 8, 8),
        {
            "stem.0": 4,  # amid zeros in the next streams, which have a part to either side of it
            **{"blocks.3.second.0": 2, "blocks.3.second.0#2": 2},
            **{"blocks.6.second.0": 4, "blocks.6.second.0#2": 4},
            **INNER,
        },
        HEAD,
    ),
    "tied BERT": Case(partial(Bert, tied=True), WORDS, {"words": 24, **LAYERS}, ("head.bias",)),
    "GRU": Case(
        partial(Recurrent, nn.GRU, num_layers=2, bidirectional=True),
        WORDS,
        {"words": 5, "cell": 6, "cell#2": 6, "cell#3": 6, "cell#4": 6},
        HEAD,
    ),
    "RNN": Case(partial(Recurrent, nn.RNN, bias=False), WORDS, {"words": 5, "cell": 6}, HEAD),
    "gates": Case(Gates, images(4, 5), {"into": 6}, HEAD),
    "grouped": Case(Grouped, images(3, 8, 8), {"first": 4, "mix": 6}, ("last.weight", "last.bias")),
    "DenseNet": Case(Dense, images(3, 8, 8), {"layers.0": 4, "layers.1": 5, "layers.2": 6}, HEAD),
    "U-Net": Case(UNet, images(3, 8, 8), {"down": 4, "bottom": 6, "up": 5}, ("last.weight", "last.bias")),
    "1-d": Case(partial(along, nn.Conv1d, nn.MaxPool1d, 1), images(2, 8), {"0": 6, "3": 4}, ("6.weight", "6.bias")),
    "3-d": Case(
        partial(along, nn.Conv3d, nn.AvgPool3d, 3), images(2, 8, 8, 8), {"0": 6, "3": 4}, ("6.weight", "6.bias")
    ),
    "weight norm": Case(normed, images(1, 3, 4), {"1": 8}, ("3.bias", "3.parametrizations.weight.original0")),
}

NETWORKS = {**EIGHT, **OTHERS}
