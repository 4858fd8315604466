"""Configuration -> method, and one-line errors."""

from __future__ import annotations

import sys
from abc import ABC
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import TwoExchanges

from aggregators.core.base import Aggregator, CohortAggregator, SumAggregator
from aggregators.core.exchange import Round
from aggregators.core.registry import methods, parse
from aggregators.core.update import GlobalModel
from aggregators.robust.norm_clip import NormClip
from aggregators.weight_average.fedavg import FedAvg
from aggregators.weight_average.fisher import Fisher

ALL = ", ".join(methods())


def refused(config: object) -> str:
    """Why `config` is refused, in one line."""
    with pytest.raises(ValueError, match=r".") as caught:
        parse(config)
    assert type(caught.value) is ValueError
    assert caught.value.__cause__ is None
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        '{"kind": "fisher", "temper": 0.5}',
        ' {"kind": "fisher", "temper": 0.5}\n',
        {"kind": "fisher", "temper": 0.5},
        Fisher(temper=0.5),
    ],
)
def test_text_a_mapping_and_a_method_mean_the_same(config: object) -> None:
    assert parse(config) == Fisher(temper=0.5)


def test_a_name_means_the_default_settings() -> None:
    assert parse("fisher") == Fisher()


def test_an_inner_method_is_parsed_like_any_other() -> None:
    for inner in ("fedavg", '{"kind": "fedavg"}', {"kind": "fedavg"}, FedAvg()):
        assert parse({"kind": "norm_clip", "inner": inner}) == NormClip(inner=FedAvg())


def test_an_inner_method_keeps_its_own_settings_in_json() -> None:
    method = NormClip(inner=NormClip(inner=Fisher(coefficients={"site": 2.0}, target=2**64 - 1, prior="target")))
    assert parse(method.model_dump_json()) == method


def test_a_method_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse("fedavg").weights = "uniform"  # type: ignore[attr-defined]


def test_kinds_come_sorted() -> None:
    assert list(methods()) == sorted(methods())
    assert all(cls.model_fields["kind"].default == kind for kind, cls in methods().items())


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("fishr", f"unknown aggregation method 'fishr' (did you mean 'fisher'?); allowed: {ALL}"),
        ("", f"unknown aggregation method ''; allowed: {ALL}"),
        ("two\nlines", f"unknown aggregation method 'two\\nlines'; allowed: {ALL}"),
        ("[1]", f"unknown aggregation method '[1]'; allowed: {ALL}"),
        (None, 'None: give a name, or an object with a "kind", such as \'{"kind": ...}\''),
        ('{"kind": 5}', "{'kind': 5}: give a name, or an object with a \"kind\", such as '{\"kind\": ...}'"),
        ('{"kind":', "'{\"kind\":' is not valid JSON: Expecting value: line 1 column 9 (char 8)"),
        (
            {"kind": "fisher", "tempr": 0.5},
            "unknown key 'tempr' (did you mean 'temper'?); allowed: coefficients, damping, estimator, kind, max_grads, "
            "normalize, prior, target, temper (its value: 0.5)",
        ),
        ({"kind": "fisher", "temper": 2}, "temper = 2: input should be less than or equal to 1"),
        ({"kind": "fisher", "damping": "much"}, "damping = 'much': input should be a valid number, unable to"),
        ('{"kind": "fisher", "damping": Infinity}', "damping = inf: input should be a finite number"),
        ({"kind": "fisher", "prior": "flat"}, "prior = 'flat': input should be 'mean', 'bayes' or 'target'"),
        ({"kind": "fisher", "coefficients": {"a\nb": -1}}, "coefficients.a b = -1: input should be greater than or"),
        ({"kind": "fisher", "prior": "target"}, "prior 'target' needs a target, a client's node id or name"),
        ({"kind": "fisher", "target": 3}, "only that prior takes one"),
        ({"kind": "norm_clip"}, "inner: missing; give it a value"),
        ({"kind": "norm_clip", "inner": "fedavg", "max_norm": 0}, "max_norm = 0: input should be greater than 0"),
        ({"kind": "norm_clip", "inner": "fedavgg"}, "inner = 'fedavgg': unknown aggregation method 'fedavgg' (did"),
        ({"kind": "norm_clip", "inner": None}, "inner = None: None: give a name"),
        (
            {"kind": "norm_clip", "inner": {"kind": "fedavgm", "inner": {"kind": "fisher", "temper": 2}}},
            "temper = 2: input should be less than or equal to 1",
        ),
        (
            {"kind": "fisher", "temper": 2, "damping": -1},
            "temper = 2: input should be less than or equal to 1; damping",
        ),
    ],
)
def test_an_error_names_the_key_the_value_and_what_is_allowed(config: object, said: str) -> None:
    assert said in refused(config)


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)))
def test_nothing_but_a_one_line_error_comes_of_nonsense(config: Any) -> None:
    assert refused(config)
    assert refused({"kind": "fedavg", "weights": config})
    assert refused({"kind": "norm_clip", "inner": config})


# --- methods outside the package --------------------------------------------------------------------------------


def test_a_method_outside_the_package_is_named_by_its_module() -> None:
    config = {"kind": "toys:TwoExchanges", "inner": "fisher", "learning_rate": 0.1}
    method = parse(config)
    assert method == TwoExchanges(inner=Fisher(), learning_rate=0.1)
    assert parse(method.model_dump_json()) == method
    assert parse({"kind": "norm_clip", "inner": config}) == NormClip(inner=method)


def test_a_method_outside_the_package_is_not_in_the_registry() -> None:
    assert "toys:TwoExchanges" not in methods()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nowhere:Method", "'nowhere:Method': cannot import 'nowhere': No module named 'nowhere'"),
        ("toys:Nothing", "'toys:Nothing' is no final subclass of aggregators.core.base:Aggregator"),
        ("toys:ask", "'toys:ask' is no final subclass of aggregators.core.base:Aggregator"),
        ("toys:Net", "'toys:Net' is no final subclass of aggregators.core.base:Aggregator"),
        ("toys:", "'toys:' is no final subclass of aggregators.core.base:Aggregator"),
        ("aggregators.core.base:SumAggregator", "'aggregators.core.base:SumAggregator' is no final subclass of"),
        (":Method", "':Method': '' is no module's name: write module:Class"),
        (".toys:TwoExchanges", "'.toys:TwoExchanges': '.toys' is no module's name: write module:Class"),
        ("toys.py:TwoExchanges", "'toys.py:TwoExchanges': cannot import 'toys.py': No module named 'toys.py'"),
        ("a/b:C", "'a/b:C': 'a/b' is no module's name: write module:Class"),
        (
            "aggregators.weight_average.fedavg:FedAvg",
            "kind = 'aggregators.weight_average.fedavg:FedAvg': input should be 'fedavg'",
        ),
    ],
)
def test_a_method_that_cannot_be_had_is_named(kind: str, said: str) -> None:
    assert said in refused(kind)


def test_a_module_that_does_not_import_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_in_need.py").write_text("import a_library_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "No module named 'a_library_that_is_missing'" in refused("module_in_need:Method")
    assert "module_in_need" not in sys.modules


# --- discovery --------------------------------------------------------------------------------------------------


class Twin(FedAvg):
    """Of the same kind as its parent."""


def test_two_methods_of_one_kind_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Twin, "__module__", "aggregators.weight_average.twin")
    with pytest.raises(TypeError, match=r"two methods of kind 'fedavg': .*FedAvg.*Twin.*: rename one"):
        methods.__wrapped__()


class Left(Aggregator, ABC):
    """One abstract base."""


class Right(Aggregator, ABC):
    """Another."""


class Heir(Left, Right):
    """A method with two abstract bases."""

    kind: Literal["heir"] = "heir"

    def round(self, model: GlobalModel) -> Round:
        """The mean of the clients."""
        return FedAvg().round(model)


def test_a_method_with_two_bases_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Heir, "__module__", "aggregators.weight_average.heir")
    assert methods.__wrapped__() == {**methods(), "heir": Heir}


def test_abstract_shapes_are_no_methods() -> None:
    assert not {Aggregator, SumAggregator, CohortAggregator, Left, Right} & set(methods().values())


@pytest.mark.parametrize("outer", ["fedavgm", "wise_ft", "git_rebasin", "activation_matching", "ot_fusion"])
@pytest.mark.parametrize("inner", ["fedma", "pfnm", {"kind": "ot_fusion", "inner": "fedavg"}])
def test_what_changes_widths_stands_in_nothing_that_compares_models_entry_by_entry(outer: str, inner: Any) -> None:
    kind = inner if isinstance(inner, str) else inner["kind"]
    nested = {"kind": outer, "inner": {"kind": "norm_clip", "inner": inner}}
    for config in (nested, {"kind": outer, "inner": inner}):
        assert f"{kind} may change the model's widths" in refused(config)
