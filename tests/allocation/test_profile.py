"""Menus: every entry's bits against what packing stores, and its predicted loss increase against what it stands for."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cospadi.allocation.choices import DENSE, Factors, Quantized, kept_dense, sides
from cospadi.allocation.menu import Menu
from cospadi.allocation.offers import Corrections, interpolation_errors, menu
from cospadi.allocation.profile import SPARSE, Families, GroupProfile, Point, is_complete, profile_group, sizes
from cospadi.calibration.source_statistics import SourceStatistics
from cospadi.errors import CheckpointError
from cospadi.formats.dictionary import dictionary_dtype_of
from cospadi.formats.factorization import SparseFactorization
from cospadi.formats.packing import pack_group, unpack_group
from cospadi.models.groups import Group
from cospadi.models.layers import Layer
from cospadi.solvers.svd import SVD
from cospadi.solvers.updates import hard_threshold, leading_left_singular_vectors, least_squares_dictionary
from cospadi.whitening.objective import build_objective
from cospadi.whitening.problem import Problem

QUANTIZED = ("int8", "int6g64", "int4g64", "int3g32")
NOTHING = Corrections()


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sizes_of(layer):
    return torch.linspace(1, 3, layer.out_features, dtype=torch.float64)


def group_objective(width=24, widths=(20,), seed=0, tokens=200, weighted=True):
    """Layers of a common input, whose Gram and weights have decaying spectra."""
    layers = tuple(Layer(f"b.{i}", 0, f"k{i}", "b.0", width, out, False) for i, out in enumerate(widths))
    own = SourceStatistics("b.0", width, {la.name: la.out_features for la in layers})
    x = normal(seed, tokens, width) @ torch.diag(torch.arange(1, width + 1.0, dtype=torch.float64) ** -0.5)
    x = x @ torch.linalg.qr(normal(seed + 1, width, width)).Q
    own.add_inputs(x)
    own.n_tokens = tokens
    for i, layer in enumerate(layers):
        own.layers[layer.name].add(normal(seed + 2 + i, tokens, layer.out_features) * sizes_of(layer))
        own.layers[layer.name].n_tokens = tokens
    weights = [normal(seed + 50 + i, width, out) for i, out in enumerate(widths)]
    return build_objective(Group(layers), weights, {"b.0": own}, 1e-6, column_weights=weighted)


def families(**options):
    return Families(**({"quantized": QUANTIZED} | options))


@pytest.fixture(scope="module")
def one():
    given = group_objective()
    return given, profile_group(given, "k0", families(), spectrum=True)


@pytest.fixture(scope="module")
def two():
    given = group_objective(widths=(9, 14), seed=5)
    return given, profile_group(given, "k0", families())


def stored_bits(choice, width, widths, format, shared=True):
    """Pack random factors of exactly this size and count the bytes of all tensors."""
    generator = torch.Generator().manual_seed(choice.n_atoms + 100 * choice.n_nonzero)
    side, columns = sides(choice, width, widths)
    D = torch.rand(side, choice.n_atoms, generator=generator) + 0.5
    if choice.dictionary_dtype == "none":
        # Non-zeros anywhere, their number fixed over all members together.
        total = sum(columns)
        flat = torch.zeros(width * total)
        flat[torch.randperm(width * total, generator=generator)[: choice.n_nonzero * total]] = 0.75
        S, D = flat.reshape(width, total), torch.eye(width)
    else:
        ranks = torch.rand(choice.n_atoms, sum(columns), generator=generator).argsort(dim=0).argsort(dim=0)
        S = (ranks < choice.n_nonzero) * (torch.rand(ranks.shape, generator=generator) + 0.5)
    parts = dict(zip((f"m{i}" for i in range(len(columns))), S.split(list(columns), dim=1), strict=True))
    factors = SparseFactorization(D, parts, side=choice.side)
    _, tensors = pack_group(factors, format, choice.value_dtype, {}, shared, choice.dictionary_dtype)
    return 8 * sum(tensor.nbytes for tensor in tensors.values())


def quantized_bits(choice, width, widths):
    bits = 0
    for dtype, out in zip(choice.dtypes, widths, strict=True):
        if dtype == DENSE:
            bits += 16 * width * out
            continue
        factors = SparseFactorization.of_weight("m", normal(out, width, out))
        _, tensors = pack_group(factors, "identity", "none", {}, True, dtype)
        bits += 8 * sum(tensor.nbytes for tensor in tensors.values())
    return bits


VALUE_DTYPES = ("bfloat16", "float16", "float32", "int8", "bfloat14")


@pytest.mark.parametrize("format", ["bitmask", "csr", "dense"])
@pytest.mark.parametrize("widths", [(20,), (9, 14)])
def test_bits_of_every_entry_are_those_on_disk(format, widths, one, two):
    _, profile = one if len(widths) == 1 else two
    held = [dtype for dtype in VALUE_DTYPES if format == "bitmask" or dtype != "bfloat14"]
    offered = families(dtypes=tuple((dtype, dictionary_dtype_of(dtype)) for dtype in held))
    found = menu(profile, offered, format, NOTHING)
    kinds = set()
    for entry in found.entries[:: 1 if format == "bitmask" else 7]:
        choice = entry.choice
        if isinstance(choice, Quantized):
            kinds.add(choice.kind)
            assert entry.bits == quantized_bits(choice, 24, widths), choice
        else:
            kinds.add((choice.side, choice.kind, choice.value_dtype))
            stored = stored_bits(choice, 24, widths, format)
            # Strings of 14 bits end in whole bytes, for each member.
            slack = 7 * len(widths) if choice.value_dtype == "bfloat14" else 0
            assert entry.bits <= stored <= entry.bits + slack, choice
    assert {"dense", "quantized"} <= kinds
    if format == "bitmask":
        wanted = {("input", kind, dtype) for kind in ("factors", "sparse") for dtype in ("bfloat16", "int8")}
        assert wanted <= kinds
        assert (("output", "factors", "bfloat16") in kinds) == (len(widths) == 1)


def test_a_menu_has_the_dense_weights_and_nothing_larger(one):
    _, profile = one
    found = menu(profile, families(), "bitmask", NOTHING)
    assert found.name == "b.0"
    assert found.dense_bits == profile.dense_bits == 16 * 24 * 20
    dense = [entry for entry in found.entries if entry.choice == kept_dense(1)]
    assert [(entry.bits, entry.cost) for entry in dense] == [(found.dense_bits, 0.0)]
    assert all(entry.bits < found.dense_bits for entry in found.entries if entry not in dense)
    assert all(np.isfinite(entry.cost) and entry.cost >= 0 for entry in found.entries)
    np.testing.assert_allclose(found.spectrum, np.linalg.svd(one[0].target.numpy(), compute_uv=False), rtol=1e-5)
    assert menu(replace(profile, spectrum=()), families(), "bitmask", NOTHING).spectrum is None


@pytest.mark.parametrize("widths", [(20,), (9, 14)])
@pytest.mark.parametrize("rho", [2.0, 3.0])
def test_costs_fall_with_the_bits_along_every_family(widths, rho):
    offered = families(rhos=(rho,), quantized=(), dtypes=(("bfloat16", "bfloat16"),))
    profile = profile_group(group_objective(widths=widths), "k0", offered)
    found = [e for e in menu(profile, offered, "bitmask", NOTHING).entries if isinstance(e.choice, Factors)]
    most = min(24, sum(widths))
    curves = {}
    for entry in found:
        choice = entry.choice
        if choice.kind == "sparse":
            curves.setdefault("sparse", []).append((choice.n_nonzero, entry))
            continue
        if choice.n_nonzero == max(1, int(choice.n_atoms / rho)):
            curves.setdefault(choice.side, []).append((choice.n_atoms, entry))
        if choice.n_atoms == most:
            curves.setdefault(f"complete {choice.side}", []).append((choice.n_nonzero, entry))
    assert sum(map(len, curves.values())) >= len(found)
    for curve in curves.values():
        entries = [entry for _, entry in sorted(curve, key=lambda pair: pair[0])]
        assert all(after.cost <= before.cost for before, after in itertools.pairwise(entries))
        assert all(after.bits > before.bits for before, after in itertools.pairwise(entries))
    assert set(curves) >= {"sparse", "input"} | ({"output"} if len(widths) == 1 else set())


def test_the_points_are_the_loss_increase_of_factors_that_anyone_can_compute(one):
    given, profile = one
    assert set(profile.points) == {"input 2,3", "output 3", SPARSE}
    Y = given.target.double() * given.scales
    U = leading_left_singular_vectors(Y.float().numpy(), 20)
    for point in profile.points["input 2,3"]:
        S = hard_threshold(U[:, : point.n_atoms].T @ Y.float().numpy(), point.n_nonzero)
        A = least_squares_dictionary(Y.float().numpy(), S, U[:, : point.n_atoms])
        D = given.whitening.unwhiten(torch.from_numpy(A))
        V = D @ (torch.from_numpy(S).double() / given.scales)
        assert point.loss_increase == pytest.approx(given.loss_increase(V), rel=1e-3, abs=1e-9 * profile.energy)
    assert profile.energy == pytest.approx(given.loss_increase(torch.zeros(24, 20)))
    for points in profile.points.values():
        assert all(0 <= point.loss_increase <= 1.001 * profile.energy for point in points)


def test_rounding_increases_are_near_those_of_rounding(one):
    """Errors are taken to be uncorrelated: exact for a diagonal Gram, near otherwise, and falling with the bits."""
    given, profile = one
    falling = [profile.quantized[dtype][0] for dtype in ("int3g32", "int4g64", "int6g64", "int8")]
    assert falling == sorted(falling, reverse=True)
    for dtype in QUANTIZED:
        factors = SparseFactorization.of_weight("m", given.weight.float())
        stored = unpack_group(*pack_group(factors, "identity", "none", {}, True, dtype))
        exact = given.loss_increase(stored.to_dense("m"))
        assert 0.5 < profile.quantized[dtype][0] / exact < 2


def test_combinations_of_quantised_members_are_the_pareto_front(two):
    _, profile = two
    found = menu(profile, families(dtypes=()), "bitmask", NOTHING)
    entries = {entry.choice.dtypes: entry for entry in found.entries}
    every = {}
    for dtypes in itertools.product((DENSE, *QUANTIZED), repeat=2):
        cost = sum(0.0 if dtype == DENSE else profile.quantized[dtype][i] for i, dtype in enumerate(dtypes))
        every[dtypes] = (quantized_bits(Quantized(dtypes), 24, (9, 14)), cost)
    best = {
        dtypes
        for dtypes, (bits, cost) in every.items()
        if not any(b <= bits and c <= cost and (b, c) != (bits, cost) for b, c in every.values())
    }
    assert set(entries) == best
    for dtypes, entry in entries.items():
        assert entry.bits == every[dtypes][0]
        assert entry.cost == pytest.approx(every[dtypes][1], rel=1e-12)
    assert len(best) > len(QUANTIZED)


def test_corrections_act_where_they_were_measured(one):
    _, profile = one
    plain = menu(profile, families(), "bitmask", NOTHING)
    found = Corrections(
        solved={"k0x1 input": 0.5, "k0x1 output": 0.25, "k0x1 sparse": 0.125, "k0x2 input": 7.0},
        rounded={"k0x1 input int8": 0.01, "k0x1 sparse int8": 0.02, "k1x1 input int8": 9.0},
        quantized={"k0x1 int8": 0.75},
    )
    for before, after in zip(plain.entries, menu(profile, families(), "bitmask", found).entries, strict=True):
        choice = before.choice
        assert after.choice == choice
        if isinstance(choice, Quantized):
            factor, added = (0.75 if choice.dtypes == ("int8",) else 1.0), 0.0
        else:
            place = SPARSE if choice.kind == "sparse" else choice.side
            factor = {"input": 0.5, "output": 0.25, SPARSE: 0.125}[place]
            added = {"input int8": 0.01, "sparse int8": 0.02}.get(f"{place} {choice.value_dtype}", 0.0)
        assert after.cost == pytest.approx(factor * before.cost + added * profile.energy, rel=1e-12)


def test_the_papers_convention_counts_sixteen_bits_for_each_number(two):
    _, profile = two
    offered = families(quantized=(), dtypes=(("bfloat16", "bfloat16"),))
    found = menu(profile, offered, "bitmask", NOTHING, "paper")
    for entry in found.entries:
        choice = entry.choice
        if isinstance(choice, Factors):
            dictionary = 0 if choice.kind == "sparse" else choice.n_atoms * 24
            assert entry.bits == 16 * (dictionary + choice.n_nonzero * 23)
    honest = {e.choice: e.bits for e in menu(profile, offered, "bitmask", NOTHING).entries}
    assert all(e.bits < honest[e.choice] for e in found.entries if e.choice in honest and e.cost > 0)


def test_the_papers_convention_on_the_side_of_the_outputs(one):
    _, profile = one
    found = menu(profile, families(quantized=()), "bitmask", NOTHING, "paper")
    outputs = [e for e in found.entries if isinstance(e.choice, Factors) and e.choice.side == "output"]
    assert outputs
    assert all(e.bits == 16 * (e.choice.n_atoms * 20 + e.choice.n_nonzero * 24) for e in outputs)


def test_what_is_not_offered_is_not_there(one):
    given = one[0]

    def kinds(**options):
        found = menu(profile_group(given, "k0", families(**options)), families(**options), "bitmask", NOTHING)
        return {
            e.choice.kind if isinstance(e.choice, Quantized) or e.choice.kind == "sparse" else e.choice.side
            for e in found.entries
        }

    assert kinds() == {"dense", "quantized", "sparse", "input", "output"}
    assert kinds(quantized=()) == {"dense", "sparse", "input", "output"}
    assert kinds(dtypes=()) == {"dense", "quantized"}
    assert kinds(learned=False, quantized=()) == {"dense", "sparse"}
    assert kinds(identity=False, sides=("output",), quantized=()) == {"dense", "output"}
    assert kinds(identity=False, sides=("input",), quantized=()) == {"dense", "input"}


def test_low_rank_has_dense_coefficients_and_the_loss_increase_of_the_best_one():
    given = group_objective(seed=3)
    offered = families(sparse=False, identity=False, quantized=())
    profile = profile_group(given, "k0", offered)
    assert set(profile.points) == {"input dense"}
    for point in profile.points["input dense"]:
        assert point.n_atoms == point.n_nonzero
        problem = given.problem(point.n_atoms, point.n_nonzero)
        solution = SVD().solve(Problem(problem.target, point.n_atoms, point.n_atoms, problem.column_weights))
        V = given.whitening.unwhiten(solution.dictionary) @ solution.coefficients.double()
        assert point.loss_increase == pytest.approx(given.loss_increase(V), rel=1e-3, abs=1e-6 * profile.energy)
    found = menu(profile, offered, "dense", NOTHING)
    for entry in found.entries:
        if isinstance(entry.choice, Factors):
            assert entry.choice.n_atoms == entry.choice.n_nonzero
            assert entry.bits == stored_bits(entry.choice, 24, (20,), "dense")


@pytest.mark.parametrize(("d", "n"), [(1, 1), (1, 40), (40, 1), (7, 5), (64, 200), (200, 64)])
@pytest.mark.parametrize("sparse", [True, False])
def test_sizes_can_be_solved(d, n, sparse):
    found = sizes(d, n, families(sparse=sparse))
    assert found == sorted(set(found))
    assert all(1 <= s <= k <= min(d, n) for k, s in found)
    assert max(k for k, _ in found) == min(d, n)
    assert all(k == s for k, s in found) or sparse


@pytest.mark.parametrize(("width", "widths"), [(1, (1,)), (1, (4,)), (5, (1,)), (3, (2, 1)), (2, (2,))])
def test_tiny_layers_have_menus(width, widths):
    given = group_objective(width, widths, tokens=20)
    profile = profile_group(given, "k0", families(), spectrum=True)
    found = menu(profile, families(), "bitmask", NOTHING)
    assert isinstance(found, Menu)
    assert kept_dense(len(widths)) in [entry.choice for entry in found.entries]
    interpolation_errors(profile, families())


def test_a_weight_of_zeros_costs_nothing_in_any_way():
    given = group_objective()
    nothing = replace(given, weight=torch.zeros_like(given.weight))
    profile = profile_group(nothing, "k0", families())
    assert profile.energy == 0
    assert all(entry.cost == 0 for entry in menu(profile, families(), "bitmask", NOTHING).entries)


def test_an_expert_without_tokens_has_a_menu():
    layer = Layer("b.0", 0, "k0", "b.0", 12, 10, False)
    own = SourceStatistics("b.0", 12, {"b.0": 10})
    own.n_tokens = 50
    given = build_objective(Group((layer,)), [normal(0, 12, 10)], {"b.0": own}, 1e-6, column_weights=True)
    profile = profile_group(given, "k0", families())
    assert profile.energy == pytest.approx(0.5 * float(given.weight.square().sum()) / 50)
    assert all(0 < increase < 0.1 * profile.energy for (increase,) in profile.quantized.values())


def test_profiles_survive_exactly(one, two):
    for _, profile in (one, two):
        assert GroupProfile.from_json(profile.to_json()) == profile


def test_profiles_grow_by_what_they_lack(monkeypatch):
    given = group_objective()
    first, more = families(rhos=(2.0,), quantized=("int8",)), families(rhos=(2.0, 4.0), quantized=("int8", "int3g32"))
    small = profile_group(given, "k0", first)
    assert is_complete(small, first, False)
    assert not is_complete(small, first, True)
    assert not is_complete(small, more, False)
    grown = profile_group(given, "k0", more, spectrum=True, known=small)
    assert is_complete(grown, more, True)
    assert is_complete(grown, first, False)
    # What it has grown to serves both families as profiles of their own do.
    for offered in (first, more):
        alone = menu(profile_group(given, "k0", offered, spectrum=True), offered, "bitmask", NOTHING)
        found = menu(grown, offered, "bitmask", NOTHING)
        assert found.entries == alone.entries
        assert [entry.choice for entry in found.entries] == [entry.choice for entry in alone.entries]
    for name in ("_input_points", "_output_points", "_sparse_points", "_rounding_increases", "_spectrum"):
        monkeypatch.setattr(f"cospadi.allocation.profile.{name}", None)
    assert profile_group(given, "k0", more, spectrum=True, known=grown) == grown


@pytest.mark.parametrize(
    ("options", "widths", "expected"),
    [
        ({}, (7,), {"sparse": "sparse", "input 2,3": "input", "output 3": "output"}),
        ({}, (8,), {"sparse": "sparse", "input 2,3": "input"}),
        ({}, (3, 4), {"sparse": "sparse", "input 2,3": "input"}),
        ({"dtypes": ()}, (7,), {}),
        ({"learned": False}, (7,), {"sparse": "sparse"}),
        ({"identity": False, "sides": ("output",), "rhos": (2.5,)}, (9,), {"output 2.5": "output"}),
        ({"sparse": False, "identity": False}, (7,), {"input dense": "input"}),
    ],
)
def test_curves_that_menus_need(options, widths, expected):
    assert Families(**options).curves(8, widths) == expected


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", "{}", '{"points": {}}', '{"points": {"input": [{"n_atoms": 3}]}}'],
)
def test_what_is_no_profile_is_refused(text, one):
    with pytest.raises(CheckpointError, match="not a saved profile"):
        GroupProfile.from_json(text)
    data = json.loads(one[1].to_json())
    for change in (
        {"energie": 1},
        {"points": {"input": [{"n_atoms": 1, "n_nonzero": 1, "loss_increase": 1, "more": 1}]}},
    ):
        with pytest.raises(CheckpointError, match="not a saved profile"):
            GroupProfile.from_json(json.dumps(data | change))


def test_words_for_choices():
    assert [kept_dense(2).kind, Quantized(("int8", DENSE)).kind] == ["dense", "quantized"]
    assert [Factors(3, 2).kind, Factors(3, 2, dictionary_dtype="none").kind] == ["factors", "sparse"]


def test_interpolation_errors_are_those_of_leaving_points_out(one):
    errors = interpolation_errors(one[1], families())
    assert len(errors) > 5
    assert np.median(np.abs(errors)) < 0.5
    # A family on an exact exponential is predicted exactly, whatever point is left out.
    points = tuple(Point(24, s, 3.0 * 2.0 ** (-s / 3)) for s in range(2, 23, 4))
    exact = GroupProfile("x", "k", 24, (20,), 9.0, {SPARSE: points})
    np.testing.assert_allclose(interpolation_errors(exact, families(learned=False)), 0, atol=1e-9)
