"""Self-supervised Fisher merging: what precision it builds from statistics, and what it makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor
from toys import global_model, updates

from aggregators.core.exchange import LostRound
from aggregators.core.posterior import Block, Prior, flat, spans
from aggregators.core.registry import parse
from aggregators.core.update import ClientUpdate, GlobalModel
from aggregators.weight_average.fisher import Fisher
from aggregators.weight_average.ssf import SSF

EXAMPLES = 40


def model(size: int = 6, dtype: torch.dtype = torch.float64) -> GlobalModel:
    params = {"weight": torch.linspace(-1, 1, size, dtype=torch.float64).view(2, -1).to(dtype)}
    return GlobalModel(params=params, trainable=frozenset(params))


def gradients(seed: int = 0, size: int = 6, num: int = EXAMPLES, scale: float = 1.0) -> Tensor:
    """Single examples' gradients, (num, D), correlated and not of mean 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return scale * (torch.randn(num, size, generator=generator, dtype=torch.float64) @ mixing + 0.5)


def client(
    g: Tensor, number: int = 1, sketches: int = 4, num_examples: int = EXAMPLES, dtype: torch.dtype = torch.float64
) -> ClientUpdate:
    """A client with these gradients, and a θ_k of its own."""
    generator = torch.Generator().manual_seed(100 + number)
    signs = 2.0 * torch.randint(2, (sketches, len(g)), generator=generator).double() - 1
    theta = torch.randn(g.shape[1], generator=generator, dtype=torch.float64)
    return ClientUpdate(
        client_id=number,
        num_examples=num_examples,
        num_grads=len(g),
        estimator="empirical",
        params={"weight": theta.view(2, -1).to(dtype)},
        grad_sum={"weight": g.sum(0).view(2, -1)},
        sq_grad_sum={"weight": g.square().sum(0).view(2, -1)},
        grad_sketch={"weight": (signs @ g).view(sketches, 2, -1)},
    )


def cohort(num: int = 3) -> list[ClientUpdate]:
    return [client(gradients(k), k) for k in range(num)]


def block(method: SSF, update: ClientUpdate) -> Block:
    """The client's posterior on its only parameter."""
    (span,) = spans({"weight": update.params["weight"].shape})
    return method._posterior(update, span)


def precision(method: SSF, update: ClientUpdate) -> Tensor:
    found = block(method, update)
    return found.diagonal.diag() + found.factor @ found.factor.T


def merged(method: SSF | Fisher, updates: Sequence[ClientUpdate], start: GlobalModel | None = None) -> Tensor:
    return method.aggregate(start or model(), updates).params["weight"]


@pytest.mark.parametrize("kind", ["rank_one", "sketch", "paper"])
def test_the_diagonal_is_the_clients_fisher(kind: str) -> None:
    g = gradients()
    found = precision(SSF.model_validate({"precision": kind}), client(g))
    torch.testing.assert_close(found.diagonal(), g.square().sum(0), rtol=1e-12, atol=0)
    assert torch.linalg.eigvalsh(found).min() > 0


def test_rank_one_adds_the_mean_gradients_outer_product_in_the_same_units() -> None:
    g = gradients()
    found = precision(SSF(), client(g))
    outer = len(g) * g.mean(0).outer(g.mean(0))
    torch.testing.assert_close(found, outer + (g.square().sum(0) - outer.diagonal()).diag(), rtol=1e-10, atol=1e-10)


def test_the_papers_precision_is_as_its_code_has_it() -> None:
    g = gradients()
    found = precision(SSF(precision="paper"), client(g, num_examples=1000))
    mean = g.mean(0)
    expected = mean.outer(mean) + (g.square().sum(0) - mean.square()).diag()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["rank_one", "sketch"])
def test_few_gradients_stand_for_all_examples(kind: str) -> None:
    method, g = SSF.model_validate({"precision": kind}), gradients()
    few, all_of_them = client(g, num_examples=10 * len(g)), client(g)
    torch.testing.assert_close(precision(method, few), 10 * precision(method, all_of_them), rtol=1e-10, atol=1e-12)


def test_sketches_are_unbiased_where_they_are_not_clipped() -> None:
    method, g = SSF(precision="sketch", sketches=4000), gradients()
    update = client(g, sketches=4000)
    rows = update.grad_sketch["weight"].flatten(1) / 4000**0.5
    off = ~torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(
        (rows.T @ rows)[off], (g.T @ g)[off], rtol=0.0, atol=0.1 * float((g.T @ g).diagonal().max())
    )
    assert block(method, update).diagonal.min() > 0


@pytest.mark.parametrize("sketches", [1, 2, 8])
def test_sketches_leave_a_tenth_of_every_square_on_the_diagonal(sketches: int) -> None:
    g = gradients()
    found = block(SSF(precision="sketch", sketches=sketches), client(g, sketches=sketches))
    assert (found.diagonal >= (0.1 - 1e-9) * g.square().sum(0)).all()


def test_tempering_scales_variances_as_fishers_and_keeps_correlations() -> None:
    g = gradients()
    plain, tempered = precision(SSF(), client(g)), precision(SSF(temper=0.5), client(g))
    torch.testing.assert_close(tempered.diagonal(), len(g) * (g.square().sum(0) / len(g)).sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(correlations(tempered), correlations(plain), rtol=1e-9, atol=1e-12)


def correlations(matrix: Tensor) -> Tensor:
    scale = matrix.diagonal().rsqrt()
    return scale[:, None] * matrix * scale


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("temper", [0.5, 1.0])
def test_without_a_factor_it_is_fisher_merging(damping: float, temper: float) -> None:
    theta = merged(SSF(precision="sketch", sketches=0, damping=damping, temper=temper), cohort())
    torch.testing.assert_close(theta, merged(Fisher(damping=damping, temper=temper), cohort()), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["rank_one", "sketch", "paper"])
def test_it_is_the_dense_product_of_the_posteriors(kind: str) -> None:
    method, updates = SSF.model_validate({"precision": kind, "sketches": 4}), cohort()
    matrices = [precision(method, update) for update in updates]
    thetas = [update.params["weight"].flatten() for update in updates]
    centre = torch.stack(thetas).mean(0)
    damping = 0.1 * sum(matrix.diagonal().mean() for matrix in matrices)
    right = sum(matrix @ theta for matrix, theta in zip(matrices, thetas, strict=True)) + damping * centre
    expected = torch.linalg.solve(torch.stack(matrices).sum(0) + damping * torch.eye(6, dtype=torch.float64), right)
    torch.testing.assert_close(merged(method, updates).flatten(), expected, rtol=1e-9, atol=1e-10)


def test_a_shared_prior_is_counted_once() -> None:
    method, updates, start = SSF(prior="bayes", alpha=3.0), cohort(), model()
    eye, theta_t = 3.0 * torch.eye(6, dtype=torch.float64), start.params["weight"].flatten()
    matrices = [precision(method, update) + eye for update in updates]
    right = sum(m @ u.params["weight"].flatten() for m, u in zip(matrices, updates, strict=True)) - 2 * eye @ theta_t
    expected = torch.linalg.solve(torch.stack(matrices).sum(0) - 2 * eye, right)
    torch.testing.assert_close(merged(method, updates).flatten(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("prior", ["mean", "bayes"])
def test_cg_on_uniform_masks_approaches_the_closed_form(prior: str) -> None:
    masked = SSF.model_validate(
        {"solver": "cg", "mask_size": "uniform", "masks": 1000, "conditional": "marginal", "prior": prior}
    )
    exact = merged(SSF.model_validate({"prior": prior}), cohort())
    assert (merged(masked, cohort()) - exact).norm() < 0.05 * (exact - merged(Fisher(), cohort())).norm() + 0.02


def test_descent_on_fixed_masks_ends_where_conjugate_gradients_do() -> None:
    updates = [client(gradients(k, scale=0.1), k) for k in range(2)]
    settings = {"masks": 30, "mask_size": 0.5, "learning_rate": 0.05}
    descent = SSF.model_validate({"solver": "sgd", **settings})
    torch.testing.assert_close(
        merged(descent, updates),
        merged(SSF.model_validate({"solver": "cg", **settings}), updates),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_papers_protocol_runs_and_lowers_its_loss() -> None:
    method = parse({**SSF.paper, "steps": 300, "masks": 5, "window": 5, "mask_size": 2, "learning_rate": 1e-3})
    found = method.aggregate(model(), cohort())
    assert found.metrics["masked_loss"] < found.metrics["masked_loss_start"]
    assert not torch.equal(found.params["weight"], model().params["weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_squares_of_half_precision_models_do_not_underflow(dtype: torch.dtype) -> None:
    start = model(dtype=dtype)
    halves = [client(gradients(k, scale=1e-6), k, dtype=dtype) for k in range(3)]
    large = [client(gradients(k), k, dtype=dtype) for k in range(3)]
    assert torch.equal(merged(SSF(), halves, start), merged(SSF(), large, start))


def test_one_client_alone_gives_its_model() -> None:
    (update,) = cohort(1)
    assert torch.equal(merged(SSF(), [update]), update.params["weight"])


def test_without_gradients_all_squares_zero_it_is_the_mean() -> None:
    updates = [client(0 * gradients(k), k) for k in range(3)]
    mean = torch.stack([update.params["weight"] for update in updates]).mean(0)
    torch.testing.assert_close(merged(SSF(), updates), mean, rtol=1e-12, atol=0)


def test_one_example_is_enough() -> None:
    updates = [client(gradients(k, num=1), k) for k in range(3)]
    assert merged(SSF(damping=0.0), updates).isfinite().all()


def test_a_target_that_did_not_answer_loses_the_round() -> None:
    with pytest.raises(LostRound, match="client 'clinic', the prior's target, did not answer"):
        merged(SSF(prior="target", target="clinic"), cohort())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"prior": "target"}, "prior 'target' needs a target"),
        ({"target": 1}, "only that prior takes one"),
        ({"solver": "cg", "resample": True}, "set resample to false"),
        ({"mask_size": 0}, "mask_size"),
        ({"mask_size": 1.5}, "mask_size"),
        ({"alpha": 0}, "alpha"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse({"kind": "ssf", **settings})


def test_masks_depend_on_the_seed_and_the_round_alone() -> None:
    method = SSF(solver="cg", masks=12, mask_size=3)
    again, other = merged(method, cohort()), merged(method.model_copy(update={"seed": 1}), cohort())
    assert torch.equal(again, merged(method, cohort()))
    assert not torch.equal(again, other)
    assert not torch.equal(again, merged(method, cohort(), replace(model(), round=1)))


def test_every_kind_of_tensor_is_merged_by_its_fisher() -> None:
    start = global_model("mixed")
    method = SSF(precision="sketch", sketches=0)
    theta, fisher = (
        m.aggregate(start, updates(start, m.request)).params for m in (method, Fisher(estimator="sampled"))
    )
    shapes = {name: start.params[name].shape for name in start.names}
    torch.testing.assert_close(flat(theta, shapes), flat(fisher, shapes), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("resample", [True, False])
def test_masks_are_drawn_anew_in_every_step_only_if_asked(resample: bool) -> None:
    method = SSF(solver="sgd", resample=resample, masks=3, mask_size=2)
    cohort = Block(*(torch.ones(2, 6, *rest, dtype=torch.float64) for rest in ((), (), (1,))))
    prior = Prior(lambda span: torch.zeros(span.stop - span.start), 1.0)
    losses = islice(method._losses(0, cohort, torch.zeros(6, dtype=torch.float64), prior), 4)
    assert len({str(loss.masks) for loss in losses}) == (4 if resample else 1)
