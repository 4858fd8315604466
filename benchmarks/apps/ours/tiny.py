"""The tiny model of the round benchmark; with `tensors`, 4 MB in that many more parameters."""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from client.task import Examples, Node, Task


class Ballast(nn.Module):
    """A linear layer, and parameters that only have to be carried."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.ballast = nn.ParameterList(nn.Parameter(torch.randn(1_000_000 // tensors)) for _ in range(tensors))

    def forward(self, inputs: Tensor) -> Tensor:
        """The linear layer's output."""
        return self.linear(inputs)


class Tiny(Task):
    """256 random examples of ten classes, a linear layer."""

    num_classes = 10
    tensors: int = Field(default=0, ge=0)

    def model(self) -> nn.Module:
        """A linear layer, with ballast where asked."""
        return Ballast(self.tensors) if self.tensors else nn.Linear(64, 10)

    def data(self, node: Node) -> tuple[Examples, Examples]:
        """The same examples to train and to evaluate on, as the stock app has it."""
        generator = torch.Generator().manual_seed(0)
        examples = TensorDataset(
            torch.randn(256, 64, generator=generator), torch.randint(10, (256,), generator=generator)
        )
        return examples, examples
