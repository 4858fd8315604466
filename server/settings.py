"""The run configuration as one frozen model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator

from aggregators.core.registry import AnyAggregator, parse, validated

TRAINING = "training."  # what the keys of local training begin with


class Settings(BaseModel):
    """How a run goes; keys in the configuration are written with hyphens, those of local training as `training.key`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )

    aggregator: AnyAggregator = Field(default_factory=lambda: parse("fedavg"))
    task: str = "digits"
    rounds: int = Field(default=3, ge=1)
    seed: int = Field(default=0, ge=0)
    start: Literal["shared", "own"] = "shared"  # whether clients begin from θ_0 or from their own initialisation
    fraction: float = Field(default=1.0, gt=0, le=1)  # of the connected clients, sampled once a round
    min_clients: int = Field(default=2, ge=1)  # connected before a round begins
    quorum: int = Field(default=1, ge=1)  # good replies that make an exchange
    deadline: float = Field(default=600, gt=0, allow_inf_nan=False)  # seconds an exchange may take
    evaluate: bool = True  # whether clients evaluate the model they receive
    max_examples: int = Field(default=10**9, ge=1)  # the largest num_examples a client may claim
    max_width: float = Field(default=4, ge=1, allow_inf_nan=False)  # of a client's own layer, in widths of the task's
    device: str = "auto"  # where the merge runs: auto, cpu, cuda, cuda:1, ...
    runs_dir: str = "runs"  # where checkpoints and records go
    checkpoints: int = Field(default=2, ge=1)  # how many of the latest models are kept
    keep_replies: bool = True  # whether an unfinished round's replies survive a crash
    resume: str = ""  # the folder of a run to continue
    training: dict[str, JsonValue] = Field(default_factory=dict)  # local training; validated by the client's model

    @property
    def local_training(self) -> dict[str, JsonValue]:
        """`training`, with the run's number of rounds as the end of a cosine schedule."""
        return {"rounds": self.rounds, **self.training}

    @field_validator("quorum")
    @classmethod
    def _reachable(cls, quorum: int, info: ValidationInfo) -> int:
        if quorum > (most := info.data.get("min_clients", quorum)):
            raise ValueError(f"at most min-clients, {most}: else a round may begin that cannot end well")
        return quorum

    @field_validator("device")
    @classmethod
    def _usable(cls, device: str) -> str:
        if device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.zeros((), device=device).item()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"not a device of this machine: {str(error).splitlines()[0]}") from None
        return device


def from_run_config(config: Mapping[str, Any]) -> Settings:
    """Settings from Flower's flat run configuration; ValueError in one line naming the key, value and remedy."""
    training = {key.removeprefix(TRAINING): value for key, value in config.items() if key.startswith(TRAINING)}
    others = {key: value for key, value in config.items() if not key.startswith(TRAINING)}
    settings: Settings = validated(Settings, {"training": training, **others})
    return settings


def to_run_config(noted: Mapping[str, Any]) -> dict[str, Any]:
    """What `model_dump` makes of Settings as text, numbers and booleans under flat keys, as Flower has it."""
    training = {f"{TRAINING}{key}": value for key, value in noted["training"].items()}
    others = {key: value for key, value in noted.items() if key != "training"}
    return {**others, "aggregator": json.dumps(noted["aggregator"]), **training}


def overrides(config: Mapping[str, Any]) -> str:
    """The run configuration as `flwr run -c` takes it."""
    return " ".join(f"{key}={_literal(value)}" for key, value in config.items())


def _literal(value: Any) -> str:
    """The value in TOML, which has no escapes between single quotes: JSON goes there, with its own for a quote."""
    if not isinstance(value, str):
        return json.dumps(value)
    if value.startswith("{"):
        value = value.replace("'", r"\u0027")
    return f'"{value}"' if "'" in value else f"'{value}'"
