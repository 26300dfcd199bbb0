"""The predicted loss increase against a sum over explicit tokens, and the two problems that stand for it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.calibration.source_statistics import SourceStatistics
from cospadi.errors import NumericalError
from cospadi.models.groups import Group
from cospadi.models.layers import Layer
from cospadi.whitening.objective import build_objective

DAMPING = 1e-6


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case:
    """Layers that share one input, the inputs X themselves, gradients and weights; all follow from the fields."""

    def __init__(self, seed=0, tokens=40, width=6, widths=(5, 3), apart=False, routed=None, run=None, scale=1.0):
        names = [f"block.{index}" for index in range(len(widths))]
        sources = names if apart else [names[0]] * len(names)
        self.layers = tuple(
            Layer(name, 0, f"kind{index}", source, width, out, False)
            for index, (name, source, out) in enumerate(zip(names, sources, widths, strict=True))
        )
        self.group = Group(self.layers)
        self.run = run or tokens
        self.weights = [normal(10 * seed + i, width, out) for i, out in enumerate(widths)]
        self.inputs, self.gradients, self.statistics = {}, {}, {}
        for index, source in enumerate(dict.fromkeys(sources)):
            seen = tokens if routed is None else routed[index]
            members = [layer for layer in self.layers if layer.source == source]
            own = SourceStatistics(source, width, {m.name: m.out_features for m in members}, weighted=True)
            x = scale * normal(10 * seed + 100 + index, seen, width)
            own.n_tokens = self.run
            per_token = torch.zeros(seen, dtype=torch.float64)
            for member in members:
                g = normal(1000 + 10 * seed + len(self.gradients), seen, member.out_features) * (
                    1 + torch.arange(member.out_features, dtype=torch.float64)
                )
                self.gradients[member.name] = g
                self.inputs[member.name] = x
                if seen:
                    per_token += own.layers[member.name].add(g)
                    own.layers[member.name].n_tokens = seen
            if seen:
                own.add_inputs(x)
                own.add_weighted(x, per_token)
            self.statistics[source] = own
            self.per_token = per_token

    def objective(self, **options):
        given = {"column_weights": True} | options
        return build_objective(self.group, self.weights, self.statistics, DAMPING, **given)

    def brute(self, V, weighted=True, tokens=None):
        """Half the mean over the run's tokens of the sum of f_j times the squared error of output j."""
        total, start = [], 0
        for layer, W in zip(self.layers, self.weights, strict=True):
            E = W - V[:, start : start + layer.out_features]
            start += layer.out_features
            x, g = self.inputs[layer.name], self.gradients[layer.name]
            f = g.square().mean(0) if weighted else torch.ones(layer.out_features, dtype=torch.float64)
            lost = ((x @ E).square() * f).sum(1)
            total.append(0.5 * float((lost if tokens is None else lost * tokens).sum()) / self.run)
        return total


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**4),
    tokens=st.integers(12, 40),
    width=st.integers(1, 9),
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    apart=st.booleans(),
    weighted=st.booleans(),
)
def test_loss_increase_is_the_weighted_error_of_the_outputs_per_token(seed, tokens, width, widths, apart, weighted):
    case = Case(seed, tokens, width, tuple(widths), apart)
    given = case.objective(column_weights=weighted)
    V = normal(seed + 1, width, sum(widths))
    expected = case.brute(V, weighted)
    assert given.loss_increases(V) == pytest.approx(expected, rel=1e-6)
    assert given.loss_increase(V) == pytest.approx(sum(expected), rel=1e-6)
    assert given.loss_increase(given.weight) == 0
    # In float32 as in float64: the caller may hand either.
    assert given.loss_increase(V.float()) == pytest.approx(sum(expected), rel=1e-4)


def test_without_weights_every_output_counts_alike():
    given = Case().objective(column_weights=False)
    assert given.column_weights is None
    assert torch.equal(given.scales, torch.ones(8, dtype=torch.float64))
    assert given.problem(2, 1).column_weights is None


def test_the_whitened_error_is_the_loss_increase():
    case = Case(3, tokens=50, width=7, widths=(6, 4))
    given = case.objective()
    assert given.whitening.damping == 0
    V = normal(9, 7, 10)
    problem = given.problem(3, 2, seed=5)
    residual = problem.target - given.whitening.whiten(V)
    squared = float((residual.square().sum(0) * problem.column_weights).sum())
    assert 0.5 * squared / given.n_tokens == pytest.approx(given.loss_increase(V), rel=1e-5)
    assert (problem.n_atoms, problem.n_nonzero, problem.seed) == (3, 2, 5)
    torch.testing.assert_close(given.metric, given.grams[0], rtol=1e-9, atol=1e-9)


def test_the_metric_error_of_the_transpose_is_the_loss_increase():
    given = Case(4, tokens=60, width=7, widths=(9,)).objective()
    problem = given.transposed_problem(3, 2, seed=5)
    assert problem.column_weights is None
    assert tuple(problem.target.shape) == (9, 7)
    V = normal(1, 7, 9)
    E = problem.target.double() - (V * given.scales).T
    squared = float(((E @ problem.column_metric.double()) * E).sum())
    assert 0.5 * squared / given.n_tokens == pytest.approx(given.loss_increase(V), rel=1e-5)


def test_a_damped_gram_is_what_the_problems_and_not_what_the_loss_increase_sees():
    case = Case(5, tokens=3, width=8, widths=(4,))
    given = case.objective()
    assert given.whitening.damping > 0
    assert not torch.equal(given.metric, given.grams[0])
    V = normal(2, 8, 4)
    assert given.loss_increase(V) == pytest.approx(sum(case.brute(V)), rel=1e-6)


def test_what_the_tokens_do_not_see_loss_increases_nothing_and_never_less():
    """Errors in the null space of a singular Gram: a sum of squares that rounding alone may take below zero."""
    for seed in range(20):
        case = Case(seed, tokens=3, width=8, widths=(4,))
        given = case.objective()
        blind = torch.linalg.svd(case.inputs["block.0"]).Vh[3:].T @ normal(seed, 5, 4)
        lost = given.loss_increase(given.weight + blind)
        assert 0 <= lost < 1e-12 * given.loss_increase(torch.zeros(8, 4))


def test_an_expert_is_judged_by_its_own_tokens_and_counts_by_their_part():
    """Its gradients' mean is over the tokens that reached it; the sum over those is divided by all of the run."""
    case = Case(6, tokens=60, width=5, widths=(4,), routed=[12], run=60)
    given = case.objective()
    V = normal(3, 5, 4)
    x, g = case.inputs["block.0"], case.gradients["block.0"]
    f = g.square().sum(0) / 12
    expected = 0.5 * float(((x @ (case.weights[0] - V)).square() * f).sum()) / 60
    assert given.loss_increase(V) == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(given.column_weights, f)
    # The same gradients at five times the tokens of a run: a fifth of the loss increase.
    assert Case(6, tokens=60, width=5, widths=(4,), routed=[12], run=300).objective().loss_increase(V) == pytest.approx(
        expected / 5, rel=1e-9
    )


def test_an_expert_without_tokens_is_judged_by_its_weights():
    case = Case(7, tokens=30, width=5, widths=(4,), routed=[0], run=30)
    given = case.objective()
    V = normal(4, 5, 4)
    assert given.loss_increase(V) == pytest.approx(0.5 * float((case.weights[0] - V).square().sum()) / 30, rel=1e-9)
    assert "no calibration token" in given.whitening.note
    problem = given.problem(2, 1)
    torch.testing.assert_close(problem.target.double(), case.weights[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(problem.column_weights, torch.ones(4))


def test_outputs_that_the_loss_ignores_still_count_a_little():
    case = Case(8, tokens=30, width=5, widths=(4,))
    case.statistics["block.0"].layers["block.0"].squares[1] = 0
    given = case.objective()
    assert float(given.scales.min()) > 0
    assert float(given.scales[1] ** 2) == pytest.approx(1e-6 * float(given.column_weights.max()))
    everything = given.loss_increase(torch.zeros(5, 4))
    one = torch.zeros(5, 4, dtype=torch.float64)
    one[:, [0, 2, 3]] = given.weight[:, [0, 2, 3]]
    assert 0 < given.loss_increase(one) < 1e-5 * everything


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), power=st.integers(-12, 12))
def test_scaling_inputs_by_c_scales_the_loss_increase_by_its_square(seed, power):
    V = normal(seed, 6, 8)
    plain, larger = Case(seed).objective().loss_increase(V), Case(seed, scale=2.0**power).objective().loss_increase(V)
    assert larger == pytest.approx(plain * 4.0**power, rel=1e-5)


def test_members_of_another_order_have_the_same_loss_increases_in_that_order():
    case = Case(9, tokens=40, width=5, widths=(4, 3))
    V = normal(5, 5, 7)
    forth = case.objective().loss_increases(V)
    turned = Group((case.layers[1], case.layers[0]))
    back = build_objective(turned, case.weights[::-1], case.statistics, DAMPING, column_weights=True).loss_increases(
        torch.cat([V[:, 4:], V[:, :4]], dim=1)
    )
    assert back[::-1] == pytest.approx(forth, rel=1e-12)


def test_layers_with_inputs_of_their_own_share_the_mean_gram_and_keep_their_harms():
    case = Case(10, tokens=40, width=5, widths=(4, 3), apart=True)
    given = case.objective()
    mean = sum(case.statistics[layer.source].gram.matrix for layer in case.layers) / 2
    torch.testing.assert_close(given.metric, mean, rtol=1e-9, atol=1e-9)
    V = normal(6, 5, 7)
    assert given.loss_increases(V) == pytest.approx(case.brute(V), rel=1e-6)


def test_token_weights_count_tokens_by_their_gradients():
    case = Case(11, tokens=40, width=5, widths=(4,))
    given = case.objective(token_weights=True)
    V = normal(7, 5, 4)
    weights = case.per_token / case.per_token.mean()
    assert given.loss_increase(V) == pytest.approx(sum(case.brute(V, tokens=weights)), rel=1e-5)


def test_a_shift_moves_the_weights_by_the_mixing():
    case = Case(12, tokens=50, width=6, widths=(5,))
    plain = case.objective()
    # What the layer receives now is X; what it received in the dense model was X + Z.
    x, Z = case.inputs["block.0"], 0.1 * normal(8, 50, 6)
    shift = x.T @ Z
    full = case.objective(shift=shift, mixing=1.0, ridge=0.01)
    # The fit to the dense outputs is held to W by a ridge of 1 % of the mean of the Gram's diagonal.
    gram = x.T @ x
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(6)
    best = case.weights[0] + torch.linalg.solve(gram + ridge, shift @ case.weights[0])
    torch.testing.assert_close(full.weight, best, rtol=1e-6, atol=1e-8)
    lost = [float(((x + Z) @ case.weights[0] - x @ W).square().sum()) for W in (full.weight, case.weights[0])]
    assert lost[0] < lost[1]
    half = case.objective(shift=shift, mixing=0.5, ridge=0.01)
    torch.testing.assert_close(half.weight, (best + case.weights[0]) / 2, rtol=1e-6, atol=1e-8)
    assert torch.equal(case.objective(shift=shift, mixing=0.0).weight, plain.weight)
    # The shifted weights are what the loss increase compares with.
    assert full.loss_increase(best) < 1e-12 < full.loss_increase(case.weights[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_name_the_layer(bad):
    case = Case(13)
    case.weights[1] = case.weights[1].clone()
    case.weights[1][2, 0] = bad
    with pytest.raises(NumericalError, match=r"block\.1: the weight holds NaN or infinity"):
        case.objective()
    case = Case(13)
    case.statistics["block.0"].gram.matrix[1, 1] = bad
    with pytest.raises(NumericalError, match=r"block\.0"):
        case.objective()


def test_nothing_that_was_given_is_changed():
    case = Case(14)
    weights = [w.clone() for w in case.weights]
    gram = case.statistics["block.0"].gram.matrix.clone()
    given = case.objective(shift=normal(1, 6, 6), mixing=1.0)
    given.loss_increase(torch.zeros(6, 8)), given.problem(2, 1), given.metric
    assert all(torch.equal(a, b) for a, b in zip(weights, case.weights, strict=True))
    assert torch.equal(gram, case.statistics["block.0"].gram.matrix)
