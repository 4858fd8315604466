"""Settings: what cannot run is refused before any client is woken, in one line: key, value and what is allowed."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.common.config import parse_config_args
from pydantic import ValidationError

from aggregators.core.registry import parse
from client.tasks import SHIPPED
from client.training import Training
from server.app import federate
from server.grid import Content, Reply, Terms
from server.settings import Settings, from_run_config, overrides, to_run_config
from server.telemetry import Telemetry

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
CONFIG: dict[str, Any] = PYPROJECT["tool"]["flwr"]["app"]["config"]
RUN_CONFIG = {key: value for key, value in CONFIG.items() if key != "training"} | {
    f"training.{key}": value for key, value in CONFIG["training"].items()
}


def refusal(**config: Any) -> str:
    """Why that run configuration is refused; Flower hands it over flat."""
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refused:
        from_run_config({**RUN_CONFIG, **config})
    return str(refused.value)


# --- defaults -------------------------------------------------------------------------------------------------------


def test_every_key_is_in_pyproject_since_flower_overrides_no_other() -> None:
    keys = {field.alias or name for name, field in Settings.model_fields.items()}
    assert keys == set(CONFIG)


def test_the_defaults_in_pyproject_are_those_of_the_settings() -> None:
    assert from_run_config(RUN_CONFIG).model_copy(update={"training": {}}) == Settings()


def test_the_defaults_of_local_training_in_pyproject_are_the_clients() -> None:
    defaults = Training().model_dump()
    assert {key: defaults[key] for key in CONFIG["training"]} == CONFIG["training"]


def test_every_default_in_pyproject_has_the_type_that_flower_will_insist_on() -> None:
    kept = {key: type(value) for key, value in Settings().model_dump(by_alias=True).items() if key in RUN_CONFIG}
    kept["aggregator"] = str  # which parses to a method
    assert {key: type(value) for key, value in RUN_CONFIG.items() if "." not in key} == kept


def test_an_empty_configuration_is_the_defaults() -> None:
    assert from_run_config({}) == Settings()


# --- what is read ---------------------------------------------------------------------------------------------------


def test_keys_are_read_with_hyphens_and_training_as_a_group() -> None:
    settings = from_run_config({"min-clients": 4, "quorum": 3, "training.epochs": 2, "training.optimizer": "adamw"})
    assert (settings.min_clients, settings.quorum) == (4, 3)
    assert settings.training == {"epochs": 2, "optimizer": "adamw"}


def test_training_is_read_as_a_mapping_too() -> None:
    given = {"training": {"epochs": 2}}
    assert from_run_config(given).training == {"epochs": 2}
    assert given == {"training": {"epochs": 2}}


def test_a_method_is_read_by_name_and_with_hyper_parameters() -> None:
    assert from_run_config({"aggregator": "fisher"}).aggregator == parse("fisher")
    nested = '{"kind": "fedavgm", "momentum": 0.5, "inner": {"kind": "fisher", "temper": 0.25}}'
    settings = from_run_config({"aggregator": nested})
    assert settings.aggregator.model_dump()["inner"]["temper"] == 0.25


def test_settings_survive_their_own_json() -> None:
    settings = from_run_config(
        {**RUN_CONFIG, "aggregator": '{"kind": "norm_clip", "inner": "median", "max_norm": 2.0}'}
    )
    assert from_run_config(json.loads(json.dumps(settings.model_dump(mode="json", by_alias=True)))) == settings


def test_settings_survive_flowers_command_line() -> None:
    """Which has no escapes: quotes within JSON and within a path go through all the same."""
    config = {**RUN_CONFIG, "aggregator": '{"kind": "fedavgm", "inner": "fisher", "momentum": 0.5}', "device": "cpu"}
    task = {"kind": "it's.a:Task", "text": "both \" and '"}
    settings = from_run_config({**config, "task": json.dumps(task), "resume": "/runs/it's/7"})
    parsed = parse_config_args([overrides(to_run_config(settings.model_dump(mode="json", by_alias=True)))])
    assert from_run_config(parsed).model_copy(update={"task": ""}) == settings.model_copy(update={"task": ""})
    assert json.loads(parsed["task"]) == task
    assert {key: type(value) for key, value in parsed.items()} == {key: type(RUN_CONFIG[key]) for key in parsed}


def test_the_automatic_device_is_one_of_this_machine() -> None:
    for settings in (Settings(), from_run_config(RUN_CONFIG), Settings(device="cpu")):
        assert torch.zeros(2, device=settings.device).sum().item() == 0


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().rounds = 5  # type: ignore[misc]


def test_as_many_good_replies_as_clients_may_be_demanded() -> None:
    assert from_run_config({"min-clients": 5, "quorum": 5}).quorum == 5


# --- what is refused ------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
REFUSED: dict[str, tuple[Any, str]] = {
    "rounds": (0, "greater than or equal to 1"),
    "seed": (-1, "greater than or equal to 0"),
    "start": ("mine", "'shared' or 'own'"),
    "fraction": (1.5, "less than or equal to 1"),
    "min-clients": (0, "greater than or equal to 1"),
    "quorum": (3, "at most min-clients, 2"),
    "deadline": (0.0, "greater than 0"),
    "evaluate": ("perhaps", "boolean"),
    "max-examples": (0, "greater than or equal to 1"),
    "max-width": (0.5, "greater than or equal to 1"),
    "device": ("cuda:99", "not a device of this machine"),
    "runs-dir": (7, "string"),
    "checkpoints": (0, "greater than or equal to 1"),
    "keep-replies": (2.5, "boolean"),
    "resume": (False, "string"),
    "training": (3, "dictionary"),
    "task": (3, "string"),
    "aggregator": ("fedvag", "did you mean 'fedavg'?"),
}


def test_every_key_has_a_row_of_what_is_refused() -> None:
    assert set(REFUSED) == set(CONFIG)


@pytest.mark.parametrize("key", REFUSED)
def test_a_value_out_of_range_is_refused_with_its_key_and_what_is_allowed(key: str) -> None:
    value, allowed = REFUSED[key]
    line = refusal(**{key: value})
    assert line.startswith(f"{key} = {value!r}: ")
    assert allowed in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("rounds", value) for value in (2.5, "three", NAN, None)],
        *[("fraction", value) for value in (0.0, -0.1, NAN, INF)],
        *[("deadline", value) for value in (-1.0, NAN, INF, "soon")],
        *[("quorum", value) for value in (0, -1, 1.5)],
        *[("device", value) for value in ("", "gpu", "meta", "cpu:x", 0)],
    ],
)
def test_a_value_of_no_use_is_refused_with_its_key(key: str, value: Any) -> None:
    assert refusal(**{key: value}).startswith(f"{key} = {value!r}: ")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("min-client", "min-clients"), ("round", "rounds"), ("keep_reply", "keep-replies"), ("agregator", "aggregator")],
)
def test_a_misspelt_key_is_refused_with_the_nearest_and_all_that_are_allowed(typed: str, meant: str) -> None:
    line = refusal(**{typed: 7})
    assert line.startswith(f"unknown key '{typed}' (did you mean '{meant}'?); allowed: ")
    assert all(key in line for key in CONFIG)
    assert "(its value: 7)" in line


@pytest.mark.parametrize("typed", ["trainig.epochs", "training-epochs", "epochs"])
def test_a_misspelt_group_is_refused_as_it_was_typed(typed: str) -> None:
    assert refusal(**{typed: 1}).startswith(f"unknown key '{typed}'")


def test_several_faults_are_told_together_in_one_line() -> None:
    line = refusal(**{"rounds": 0, "fraction": 2.0, "quorom": 1})
    assert all(part in line for part in ("rounds = 0", "fraction = 2.0", "unknown key 'quorom'"))


METHODS = {
    "fedvag": "unknown aggregation method 'fedvag' (did you mean 'fedavg'?); allowed: activation_matching, ",
    '{"kind": "fisher", "dampng": 0.5}': "unknown key 'dampng' (did you mean 'damping'?)",
    '{"kind": "fisher", "temper": 1.5}': "temper = 1.5: input should be less than or equal to 1",
    '{"kind": "fisher", "estimator": "guess"}': "estimator = 'guess': input should be 'exact'",
    '{"kind": "fedavgm"}': "inner: missing",
    '{"kind": "fedavgm", "inner": "fishr"}': "inner = 'fishr': unknown aggregation method 'fishr'",
    '{"kind": "fedavgm", "inner": {"kind": "fisher", "temper": -1}}': "temper = -1: input should be greater than",
    '{"kind": "fisher"': "is not valid JSON",
    '{"temper": 0.5}': 'an object with a "kind"',
    "": "unknown aggregation method ''",
    "no.such.module:Method": "cannot import 'no.such.module'",
    "json:JSONDecoder": "is no final subclass of aggregators.core.base:Aggregator",
}


@pytest.mark.parametrize("config", METHODS)
def test_an_unknown_method_or_hyper_parameter_is_refused(config: str) -> None:
    line = refusal(aggregator=config)
    assert line.startswith("aggregator = ")
    assert METHODS[config] in line


# --- before any client is woken -------------------------------------------------------------------------------------


class Asleep:
    """A transport whose clients may not be woken."""

    def nodes(self) -> list[int]:
        raise AssertionError("looked for clients")

    def ask(self, kind: str, content: Content, cohort: Sequence[int], terms: Terms) -> Iterator[Reply]:
        raise AssertionError("woke a client")


def unable(folder: Path, **config: Any) -> str:
    """Why a run of that configuration does not begin."""
    settings = from_run_config({**RUN_CONFIG, **config})
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refused:
        federate(settings, Asleep(), folder, Telemetry())
    assert not folder.exists() or not list(folder.iterdir())
    return str(refused.value)


def test_an_unknown_task_is_refused_with_all_that_ship(tmp_path: Path) -> None:
    line = unable(tmp_path, task="digit")
    assert line.startswith("task = 'digit': unknown task 'digit' (did you mean 'digits'?)")
    assert all(name in line for name in SHIPPED)


def test_an_unknown_option_of_a_task_is_refused(tmp_path: Path) -> None:
    line = unable(tmp_path, task='{"kind": "digits", "hiden": 3}')
    assert line.startswith("task = ")
    assert "unknown key 'hiden'" in line


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("training.epohcs", 2, "unknown key 'epohcs' (did you mean 'epochs'?)"),
        ("training.learning_rate", 0.0, "learning_rate = 0.0: input should be greater than 0"),
        ("training.optimizer", "adam", "optimizer = 'adam': input should be 'sgd' or 'adamw'"),
    ],
)
def test_bad_local_training_is_refused(tmp_path: Path, key: str, value: Any, said: str) -> None:
    line = unable(tmp_path, **{key: value})
    assert line.startswith("training: ")
    assert said in line


def test_a_method_that_measures_steps_is_refused_where_clients_start_from_their_own_models(tmp_path: Path) -> None:
    line = unable(tmp_path, start="own", aggregator='{"kind": "norm_clip", "inner": "fedavg"}')
    assert line == "aggregator = 'norm_clip': it measures steps from the server's model: start = 'own' must be 'shared'"


def test_a_method_that_needs_labels_is_refused_where_the_task_has_none(tmp_path: Path) -> None:
    line = unable(tmp_path, task="server_toys:Regression", aggregator="fisher")
    assert line.startswith("aggregator = 'fisher': estimator 'exact' needs labels")
    assert "choose 'empirical'" in line
    assert line.endswith("(task = 'server_toys:Regression')")


def test_a_method_that_needs_data_on_the_server_is_refused_where_the_task_has_none(tmp_path: Path) -> None:
    line = unable(tmp_path, task="server_toys:Regression", aggregator="server_toys:Probing")
    assert line.startswith("aggregator = 'server_toys:Probing': it needs held-out data on the server: task")


def test_a_folder_in_which_no_run_was_begun_cannot_be_resumed(tmp_path: Path) -> None:
    line = unable(tmp_path / "run", resume=str(tmp_path / "run"))
    assert line.startswith(f"resume = '{tmp_path / 'run'}': no run there")
