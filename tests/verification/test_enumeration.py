"""The enumeration bench: that it enumerates, that every claim of unbiasedness holds, that biases show."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.cli.main import main
from nested_reft.estimators.advantages import group_advantages
from nested_reft.losses.config import PolicyGradientConfig, claims_unbiased
from nested_reft.losses.policy_gradient import policy_gradient_loss
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.rollout.logprobs import completion_logprobs
from nested_reft.types import TrainBatch
from nested_reft.verification import enumeration, estimator_list
from nested_reft.verification.enumerable_model import TinyModel, all_completions, enumerate_policies
from nested_reft.verification.enumeration import (
    EXACT,
    SCENARIOS,
    EstimatorReport,
    all_groups,
    gradients_of_rows,
    group_gradients,
    slot_probabilities,
)
from nested_reft.verification.enumeration import reports as reports_of
from nested_reft.verification.estimator_list import ALPHA, BETA, GROUP_SIZE, Estimator, named_estimators

# One plan and four, of the present policy, and four of the policy four updates ago.
ONE_PLAN, DRAWN, MOVED = range(3)
TESTED = (SCENARIOS[0], SCENARIOS[3], SCENARIOS[5])
UNBIASED_AT_FIRST = ("one, full rollouts", "base, sequence, clipped 0.2, three policies")
BALANCE = "trajectory balance, full rollouts"
ESTIMATORS = {estimator.name: estimator for estimator in named_estimators()}


@pytest.fixture(scope="module")
def model():
    return TinyModel(seed=0)


@pytest.fixture(scope="module")
def policies(model):
    """Of three of the scenarios."""
    return enumerate_policies(model, TESTED)


@pytest.fixture(scope="module")
def reports(policies):
    """`reports[scenario][name]`."""
    by_name = {name: reports_of(estimator, TESTED, policies) for name, estimator in ESTIMATORS.items()}
    return [{name: found[index] for name, found in by_name.items()} for index in range(len(TESTED))]


def test_scenarios_are_three_depths_at_three_ages(model):
    """Each deeper nesting is further off, each older policy too; one update moves the policy by little."""
    assert len({scenario.name for scenario in SCENARIOS}) == 9
    assert [(len(scenario.plans), scenario.updates) for scenario in TESTED] == [(1, 0), (4, 0), (4, 4)]
    assert TESTED[MOVED].name == "one layer, 4 updates old"
    old_XY, one_XY, four_XY = (
        np.asarray(model.logprobs(model.target(updates)), np.float64).sum(axis=-1) for updates in (0, 1, 4)
    )
    one, four = ((np.exp(old_XY) * (old_XY - new_XY)).sum(axis=-1).mean() for new_XY in (one_XY, four_XY))
    assert 0 < one < four < 0.2
    gained = [(np.exp(each) * model.completions.reward_XY).sum() for each in (old_XY, one_XY, four_XY)]
    assert gained == sorted(gained)  # an update follows the gradient of the reward


def test_all_completions_by_hand():
    """Three tokens, at most two: the stop token at once, or one of the others and anything."""
    tokens_YC, length_Y = all_completions(3, 0, 2)
    assert tokens_YC.tolist() == [[0, 0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]
    assert length_Y.tolist() == [1, 2, 2, 2, 2, 2, 2]
    assert len(all_completions(3, 0, 3)[1]) == 1 + 2 * (1 + 2 * 3)


def test_every_policy_sums_to_one(policies):
    """Nothing is missing and nothing listed twice, under any plan."""
    for enumerated in policies:
        for logprob in (
            enumerated.target_logprob_XYC,
            enumerated.old_logprob_XYC,
            enumerated.reference_logprob_XYC,
            enumerated.nested_logprob_ZXYC,
        ):
            np.testing.assert_allclose(np.exp(np.asarray(logprob, np.float64).sum(axis=-1)).sum(axis=-1), 1, atol=2e-6)


def test_groups_cover_all_orders(policies):
    index_NG, orders_N = all_groups(15, "nested")
    assert len(index_NG) == 680 and orders_N.sum() == 15**GROUP_SIZE
    assert len(all_groups(15, "mixture with fixed counts")[0]) == 15**GROUP_SIZE
    for sampling in ("nested", "full", "mixture", "mixture with fixed counts"):
        index_NG, orders_N = all_groups(15, sampling)
        enumerated = policies[ONE_PLAN]
        probability_XYS = slot_probabilities(sampling, enumerated.old_logprob_XYC, enumerated.nested_logprob_ZXYC[0])
        probability_XN = np.prod([probability_XYS[:, index_NG[:, s], s] for s in range(GROUP_SIZE)], axis=0)
        np.testing.assert_allclose(probability_XN @ orders_N, 1, atol=1e-5)


def completion_scores(enumerated):
    """grad log pi(y) of whole completions."""
    return enumerated.jacobian_XRM.reshape(2, 15, 3, -1).sum(axis=2)


def test_scores_have_mean_zero(policies):
    """sum_y pi(y) grad log pi(y) = 0: the Jacobian belongs to these probabilities."""
    for enumerated in policies:
        probability_XY = np.exp(np.asarray(enumerated.target_logprob_XYC, np.float64).sum(axis=-1))
        score_XYM = completion_scores(enumerated)
        mean_XM = np.einsum("xy,xym->xm", probability_XY, score_XYM)
        assert np.abs(mean_XM).max() < 1e-5 * np.abs(score_XYM).max()


@pytest.mark.parametrize("name", ["mixture, leave-one-out", "DAPO"])
def test_group_gradients_are_those_of_the_model(model, policies, name):
    """The chain rule's shortcut against differentiating loss and transformer together, as an update does."""
    estimator, enumerated = ESTIMATORS[name], policies[MOVED]
    assert isinstance(estimator.loss, PolicyGradientConfig)
    completions, nested_XYC = enumerated.completions, enumerated.nested_logprob_ZXYC[1]
    group, x = np.array([[2, 9, 13]]), 1
    (found,) = group_gradients(estimator, [enumerated], group)
    coefficient_XNGC = found[0][1]
    jacobian_YCM = enumerated.jacobian_XRM[x].reshape(15, 3, -1)
    shortcut_M = np.einsum("gc,gcm->m", coefficient_XNGC[x, 0], jacobian_YCM[group[0]])

    batch = TrainBatch(
        prompt_BP=jnp.asarray(completions.prompt_XP[x : x + 1]),
        prompt_length_B=jnp.array([2]),
        tokens_BGC=jnp.asarray(completions.tokens_YC[group]),
        length_BG=jnp.asarray(completions.length_Y[group]),
        forced_BG=jnp.zeros((1, 3), jnp.int32),
        counted_BG=jnp.ones((1, 3), bool),
        behavior_logprob_BGC=nested_XYC[x, group],
        full_share_BG=jnp.full((1, 3), ALPHA),
        signal_BG=group_advantages(
            jnp.asarray(completions.reward_XY[x, group]), jnp.ones((1, 3), bool), estimator.loss.advantage
        ),
        old_logprob_BGC=enumerated.old_logprob_XYC[x, group],
        nested_logprob_BGC=nested_XYC[x, group],
    )

    @jax.jit
    def loss(flat_M):
        logprob_BGC, _ = completion_logprobs(
            model.at(flat_M), batch.prompt_BP, batch.prompt_length_B, batch.tokens_BGC, 1.0
        )
        return policy_gradient_loss(logprob_BGC, batch, estimator.loss).total.mean()

    direct_M = -np.asarray(jax.grad(loss)(model.target(TESTED[MOVED].updates)))
    np.testing.assert_allclose(shortcut_M, direct_M, atol=1e-5 * np.abs(direct_M).max())


def test_every_claim_holds(reports):
    for scenario in reports:
        claiming = [found for found in scenario.values() if found.claimed_scale is not None]
        # Two weights; four baselines, all but the group's mean also with the KL in the reward, and each also with three
        # policies, where the ratio since the update is of whole completions. Budgeted rejection at one lambda with each
        # baseline, and at two more.
        assert len(claiming) == 2 * (4 + 3 + 4) + 4 + 2
        for found in claiming:
            assert found.keeps_claim, found
            assert found.relative_bias == pytest.approx(1 - found.claimed_scale, abs=EXACT), found


def test_budgeted_rejection_of_three_policies_is_unbiased(policies):
    """Acceptance corrects the sampler, and r the optimizer. Accepted by pi / pi_b, a moved target would show a bias."""
    loss = dataclasses.replace(
        ESTIMATORS["base, sequence, no baseline"].loss, obrs_lambda=1.0, clip_policies="three", clip_level="sequence"
    )
    estimator = Estimator("masks", "decoupled", loss, "nested, accepted at random")
    (moved,) = reports_of(estimator, TESTED[MOVED:], policies[MOVED:])
    assert moved.claimed_scale == 1 and moved.relative_bias < EXACT


def test_no_claim_escapes():
    """Every field of a loss is varied in what the claims are taken from, and each claim is in the list."""
    varied = {name for part in estimator_list.OPTIONAL_PARTS for name in part} | {"fixed_length_tokens"}
    required = {"advantage", "bias_mitigation", "level", "normalization"}
    fields = {field.name for field in dataclasses.fields(PolicyGradientConfig)}
    # `kind` has one value, and a loss with a critic claims nothing: its values are learnt.
    assert varied | required == fields - {"kind", "critic"}
    losses = [estimator.loss for estimator in named_estimators()]
    assert all(loss in losses for loss in estimator_list.all_combinations() if claims_unbiased(loss))


def test_a_claim_that_is_too_wide_is_found(policies, monkeypatch):
    """The mean of the group shortens the reward's part of the gradient and not the KL's."""
    loss = dataclasses.replace(
        ESTIMATORS["base, sequence, k1 in reward"].loss, advantage="group_mean", reference_kl_coefficient=1.0
    )
    too_wide = Estimator("exact", "too wide", loss)
    assert too_wide.claimed_scale is None
    monkeypatch.setattr(estimator_list, "claims_unbiased", lambda loss: True)
    found = reports_of(too_wide, TESTED, policies)[ONE_PLAN]
    assert found.direction_bias > 0.05 and found.claimed_scale is not None and not found.keeps_claim


def test_group_mean_is_a_pure_scale(reports):
    """(G - 1) / G = 2/3, so relative bias 1/3, and no bias of direction."""
    for scenario in reports:
        found = scenario["base, sequence, group mean"]
        assert found.scale == pytest.approx(2 / 3, abs=1e-5) and found.relative_bias == pytest.approx(1 / 3, abs=1e-5)
        assert found.direction_bias < EXACT


@pytest.mark.parametrize("name", UNBIASED_AT_FIRST)
def test_some_are_exact_until_the_target_moves(reports, name):
    """Full rollouts, and a clip that acts on the optimizer's ratio alone: on the whole weight it is never exact."""
    assert reports[DRAWN][name].relative_bias < EXACT
    assert reports[MOVED][name].direction_bias > 0.1


@pytest.mark.parametrize(
    "name",
    [name for name, estimator in ESTIMATORS.items() if estimator.claimed_scale is None and "fixed counts" not in name
     and name not in (*UNBIASED_AT_FIRST, BALANCE)],
)  # fmt: skip
def test_what_claims_nothing_is_biased(reports, name):
    """In direction, not in scale alone, wherever its limits act: the weights of the first scenario are small."""
    assert all(scenario[name].direction_bias > 0.01 for scenario in reports[DRAWN:])


def test_trajectory_balance_has_the_regularised_gradient_on_policy_alone(reports):
    """(G - 1) / G of it, times the 2 / beta that is taken off. Old or nested samples give another direction."""
    for scenario in (ONE_PLAN, DRAWN):
        found = reports[scenario][BALANCE]
        assert found.direction_bias < EXACT and found.scale == pytest.approx(2 / 3, abs=1e-5)
    assert reports[MOVED][BALANCE].direction_bias > 0.01


def test_trajectory_balance_stands_still_at_its_optimum_whatever_sampled(policies):
    """At pi_ref exp(r / beta) / Z every group of three has no gradient, so no distribution of groups has any. Half the
    way there, it has."""
    completions, config = policies[0].completions, TrajectoryBalanceConfig(BETA)
    index_NG, _ = all_groups(15, "nested")
    reference_XYC = np.asarray(policies[0].reference_logprob_XYC)
    log_z_X = np.log((np.exp(reference_XYC.sum(-1)) * np.exp(completions.reward_XY / BETA)).sum(-1))
    largest = {}
    for share in (1.0, 0.5):
        best_XYC = reference_XYC.copy()
        # Where in a completion the difference lies does not matter.
        best_XYC[..., 0] += share * (completions.reward_XY / BETA - log_z_X[:, None])
        best_RGC, reference_RGC = (jnp.asarray(x[0][index_NG]) for x in (best_XYC, reference_XYC))
        gradient_RGC, _ = gradients_of_rows(
            config,
            jnp.asarray(completions.length_Y[index_NG]),
            jnp.asarray(completions.reward_XY[0][index_NG]),
            best_RGC,
            reference_RGC,
            reference_RGC,
            reference_RGC,
            reference_RGC,
            jnp.zeros(index_NG.shape),
        )
        largest[share] = float(jnp.abs(gradient_RGC).max())
    assert largest[1.0] < 1e-5 < 0.01 < largest[0.5]


def test_practical_is_one_until_the_target_moves(reports):
    for level in ("token", "sequence"):
        same, one = reports[DRAWN][f"practical, {level}"], reports[DRAWN]["one"]
        assert same.relative_bias == pytest.approx(one.relative_bias) and same.variance == pytest.approx(one.variance)
        assert abs(reports[MOVED][f"practical, {level}"].scale - reports[MOVED]["one"].scale) > 0.02


def test_fixed_counts_bias_the_leave_one_out_baseline_only(reports):
    for scenario in reports:
        assert scenario["mixture, fixed counts, no baseline"].relative_bias < EXACT
        assert scenario["mixture, fixed counts, leave-one-out"].direction_bias > 1e-3
        assert scenario["mixture, fixed counts, leave-one-out"].claimed_scale is None


@pytest.mark.parametrize("level", ["sequence", "prefix", "token"])
def test_a_weighted_baseline_changes_no_expectation(reports, level):
    """Each level keeps the bias that it has with the plain baseline, up to the length that baselines do not touch."""
    plain = f"base, {level}, leave-one-out" if level == "sequence" else f"base, {level}"
    for scenario in reports:
        weighted = scenario[f"base, {level}, weighted leave-one-out"]
        for name in ("relative_bias", "direction_bias", "scale"):
            assert getattr(weighted, name) == pytest.approx(getattr(scenario[plain], name), abs=EXACT)


def test_a_weighted_baseline_of_two_others_is_itself_noisy(reports):
    """It lowers the variance where weights alone differ, and raises it where the target has moved as well."""
    plain, weighted = ("base, sequence, leave-one-out", "base, sequence, weighted leave-one-out")
    assert reports[DRAWN][weighted].variance < reports[DRAWN][plain].variance
    assert reports[MOVED][weighted].variance > reports[MOVED][plain].variance


def test_lambda_at_token_level_is_a_learning_rate(reports):
    """Retrace's lambda multiplies every token alike: direction, noise and ESS stay; at prefix level they do not."""
    for scenario in reports:
        whole, part = scenario["retrace 1, token"], scenario["retrace 0.9, token"]
        assert part.scale == pytest.approx(0.9 * whole.scale, rel=1e-5)
        for name in ("direction_bias", "noise", "ess"):
            assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=1e-4)
        assert abs(scenario["retrace 0.7, prefix"].direction_bias - scenario["retrace 1, prefix"].direction_bias) > 0.02


def test_mixture_is_unbiased_at_less_variance(reports):
    for scenario in reports:
        exact, mixture = scenario["base, sequence, leave-one-out"], scenario["mixture, leave-one-out"]
        assert mixture.variance < exact.variance and mixture.ess > exact.ess


def test_scenarios_are_far_enough_off_policy(policies):
    """Weights of 4 and more, so that the mixture's bound 3 says something; and the mixture keeps it."""
    enumerated = policies[DRAWN]
    target_XY, nested_XY = (
        np.exp(np.asarray(logprob, np.float64).sum(axis=-1))
        for logprob in (enumerated.target_logprob_XYC, enumerated.nested_logprob_ZXYC[1])
    )
    assert (target_XY / nested_XY).max() > 4
    assert (target_XY / (ALPHA * target_XY + (1 - ALPHA) * nested_XY)).max() <= 1 / ALPHA


def test_variance_against_single_completions(policies, reports):
    """Without a baseline the G terms are independent: the group's variance is that of one completion over G."""
    enumerated = policies[ONE_PLAN]
    target_XY = np.exp(np.asarray(enumerated.target_logprob_XYC, np.float64).sum(axis=-1))
    nested_XY = np.exp(np.asarray(enumerated.nested_logprob_ZXYC[0], np.float64).sum(axis=-1))
    weighted_XY = target_XY / nested_XY * enumerated.completions.reward_XY
    estimate_XYM = weighted_XY[..., None] * completion_scores(enumerated)
    mean_XM = np.einsum("xy,xym->xm", nested_XY, estimate_XYM)
    square_X = np.einsum("xy,xym,xym->x", nested_XY, estimate_XYM, estimate_XYM)
    within = np.mean(square_X - (mean_XM**2).sum(axis=1)) / GROUP_SIZE
    between = np.mean((mean_XM**2).sum(axis=1)) - (mean_XM.mean(axis=0) ** 2).sum()
    expected = (within + between) / (enumerated.reward_gradient_M**2).sum()
    assert reports[ONE_PLAN]["base, sequence, no baseline"].variance == pytest.approx(expected, rel=1e-4)


def test_effective_sample_size_of_token_weights(policies, reports):
    """(E sum rho)^2 / (E n E sum rho^2) over the tokens of one completion."""
    assert reports[MOVED]["one"].ess == pytest.approx(1)
    enumerated = policies[ONE_PLAN]
    behavior = np.asarray(enumerated.nested_logprob_ZXYC[0], np.float64)
    ratio_XYC = np.exp(np.asarray(enumerated.target_logprob_XYC, np.float64) - behavior)
    length_Y, probability_XY = enumerated.completions.length_Y, np.exp(behavior.sum(axis=-1))
    tokens, weight, square = 0.0, 0.0, 0.0
    for x, y in itertools.product(range(2), range(15)):
        own = ratio_XYC[x, y, : length_Y[y]]
        tokens += probability_XY[x, y] * len(own)
        weight += probability_XY[x, y] * own.sum()
        square += probability_XY[x, y] * (own**2).sum()
    assert reports[ONE_PLAN]["base, token"].ess == pytest.approx(weight**2 / (tokens * square), rel=1e-4)


def test_names_are_unique():
    assert len(ESTIMATORS) == len(named_estimators())


def test_kl_per_token_by_a_loop(policies):
    """As training logs it: the sum of log pi_b - log pi over sampled tokens, divided by their number."""
    enumerated, total, tokens = policies[DRAWN], 0.0, 0.0
    for z, x, y in itertools.product(range(4), range(2), range(15)):
        nested_C = np.asarray(enumerated.nested_logprob_ZXYC[z, x, y], np.float64)
        probability = np.exp(nested_C.sum())
        total += probability * (nested_C - np.asarray(enumerated.target_logprob_XYC[x, y], np.float64)).sum()
        tokens += probability * enumerated.completions.length_Y[y]
    assert enumerated.kl_per_token == pytest.approx(total / tokens, rel=1e-6)


def fake_report(**changes) -> EstimatorReport:
    report = EstimatorReport(
        "here", "one layer", 0, 0.1, "exact", "exact", "nested", 1.0, 1e-7, 1e-7, 1.0, 6.25, 1.0, 0.5
    )
    return dataclasses.replace(report, **changes)


def test_command_prints_writes_and_draws(monkeypatch, tmp_path, capsys):
    reports = [fake_report(), fake_report(estimator="biased", claimed_scale=None, direction_bias=0.4)]
    monkeypatch.setattr(enumeration, "verify_estimators", lambda seed: reports)
    files = tmp_path / "table.json", tmp_path / "bias.png"
    assert main(["verify-estimators", "--json", str(files[0]), "--figure", str(files[1])]) == 0
    written = json.loads(files[0].read_text())
    assert [row["estimator"] for row in written] == ["exact", "biased"] and written[0]["variance"] == 6.25
    assert written[0]["standard_deviation"] == 2.5
    assert "here" in capsys.readouterr().out and files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["bias.pdf", "missing/bias.png"])
def test_a_figure_that_cannot_be_written_is_refused_at_once(tmp_path, capsys, name):
    assert main(["verify-estimators", "--figure", str(tmp_path / name)]) == 2
    assert "ends in .png" in (error := capsys.readouterr().err) or "cannot write" in error


@pytest.mark.parametrize("broken", [{"direction_bias": 2e-5}, {"scale": 0.99}, {"claimed_scale": 2 / 3}])
def test_command_fails_on_a_broken_claim(monkeypatch, capsys, broken):
    monkeypatch.setattr(enumeration, "verify_estimators", lambda seed: [fake_report(**broken)])
    assert main(["verify-estimators"]) == 1
    assert "not as unbiased as claimed: exact (here)" in capsys.readouterr().err
