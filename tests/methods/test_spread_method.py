"""One student on several boards: who gets which filters, the loss, and what silence does; against plain NumPy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from method_pairs import SHAPE, B, K, arrays, attached, cross_entropy, network, pair, setting, softmax, step_of

from edgekd import networks, registry
from edgekd.errors import RecipeError
from edgekd.methods.partition import coactivations, correlations, louvain_groups, spectral_groups

BOARDS, FILTERS = 3, 24


@pytest.mark.parametrize("groups_of", [spectral_groups, louvain_groups])
def test_groups_are_equal_and_hold_every_filter_once(groups_of):
    graph = np.random.default_rng(0).random((24, 24))
    graph += graph.T
    for count in (2, 3, 4, 6, 8):
        groups = groups_of(graph, count)
        assert [len(group) for group in groups] == [24 // count] * count
        assert sorted(np.concatenate(groups)) == list(range(24))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_correlated_filters_stay_together(count):
    rng = np.random.default_rng(1)
    belongs = rng.permutation(np.arange(24) % count)
    causes = rng.normal(size=(400, count))
    features = causes[:, belongs] + 0.3 * rng.normal(size=(400, 24))
    for group in spectral_groups(correlations(features), count):
        assert len(set(belongs[group])) == 1


def test_correlations_against_numpy():
    features = np.random.default_rng(2).normal(size=(50, 6))
    features[:, 4] = 3.0  # a dead filter
    found = correlations(features)
    live = [0, 1, 2, 3, 5]
    expected = np.abs(np.corrcoef(features[:, live].T)) - np.eye(5)
    np.testing.assert_allclose(found[np.ix_(live, live)], expected, atol=1e-12)
    assert not found[4].any() and not found[:, 4].any()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_communities_stay_together(count):
    rng = np.random.default_rng(1)
    belongs = rng.permutation(np.arange(24) % count)
    graph = np.where(belongs[:, None] == belongs, 1.0, 0.1) * rng.uniform(0.5, 1, (24, 24))
    graph = np.triu(graph, 1) + np.triu(graph, 1).T
    for group in louvain_groups(graph, count):
        assert len(set(belongs[group])) == 1


def test_communities_without_room_are_split_and_the_largest_are_whole():
    graph = np.zeros((12, 12))  # communities of 5, 4, 2 and 1
    for community in ([0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10]):
        graph[np.ix_(community, community)] = 1 - np.eye(len(community))
    assert [list(group) for group in louvain_groups(graph, 2)] == [[0, 1, 2, 3, 4, 11], [5, 6, 7, 8, 9, 10]]
    assert [list(group) for group in louvain_groups(graph, 3)] == [[0, 1, 2, 3], [4, 9, 10, 11], [5, 6, 7, 8]]


def test_coactivations_against_plain_loops():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(9, 60))
    features[3] = -1  # nothing is active
    expected = np.zeros((60, 60))
    for row in features:
        a = [max(one, 0) / max(row) if max(row) > 0 else 0 for one in row]
        lowest = sorted(a)[-50]
        a = [one if one >= lowest else 0 for one in a]
        for i in range(60):
            for j in range(60):
                expected[i, j] += a[i] * a[j] * abs(a[i] - a[j])
    strengths = sorted((expected[i, j] for i in range(60) for j in range(i)), reverse=True)
    expected[expected < strengths[59]] = 0  # a hundredth of the edges were 18, fewer than the filters
    np.testing.assert_allclose(coactivations(features), expected / strengths[0], atol=1e-12)
    assert not coactivations(np.zeros((3, 5))).any()


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_every_filter_is_given_by_as_many_boards_as_there_are_copies(copies):
    student = spread(copies)
    groups = [np.arange(8) * 3 + number for number in range(BOARDS)]
    student.share_out(groups)
    place = student.head.place.reshape(BOARDS, -1, FILTERS)
    assert place.shape[1] == 8 * copies
    assert (place.sum((0, 1)) == copies).all() and (place.sum(1) <= 1).all()
    for board in range(BOARDS):
        held = {int(one) for number in range(copies) for one in groups[(board + number) % BOARDS]}
        assert set(place[board].argmax(1).tolist()) == held


def spread(copies: int = 1, **options):
    part = {"network": "resnet", "depth": 8, "width": 0.25}
    chosen = {"part": part, "boards": BOARDS, "filters": FILTERS, "copies": copies, **options}
    return networks.build("spread", chosen, SHAPE, K, ("relu", {}), 0)


def fused(head, features: np.ndarray) -> np.ndarray:
    """The logits of features [B, N, F], with zeros for silent boards."""
    place = head.place.double().numpy().reshape(BOARDS, -1, FILTERS)
    weight, bias = (one.detach().double().numpy() for one in (head.fc.weight, head.fc.bias))
    logits = []
    for sample in features:
        answered = np.abs(sample).sum(1) > 0
        known = (place[answered].sum((0, 1)) > 0).mean()
        mean = np.zeros(FILTERS)
        for filter_ in range(FILTERS):
            given = [sample[b, slot] for b in np.flatnonzero(answered) for slot in np.flatnonzero(place[b, :, filter_])]
            mean[filter_] = np.mean(given) / known if given else 0
        logits.append(weight @ mean + bias)
    return np.array(logits)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("silent", [silent for n in range(BOARDS) for silent in combinations(range(BOARDS), n)])
def test_the_head_takes_the_mean_of_who_answered(copies, silent):
    student = spread(copies).eval()
    x = torch.randn(B, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = torch.stack([part(x) for part in student.parts], 1)
        features[:, list(silent)] = 0
        logits = student.head(features).numpy()
        np.testing.assert_allclose(logits, fused(student.head, features.double().numpy()), rtol=1e-3, atol=1e-4)
        if not silent:
            np.testing.assert_allclose(student(x).numpy(), logits, rtol=1e-4, atol=1e-5)


def test_with_nobody_there_the_head_still_gives_numbers():
    assert spread().eval().head(torch.zeros(2, BOARDS, 8)).isfinite().all()


def test_the_parts_begin_differently():
    first, second, _ = spread().parts
    assert not torch.equal(first.fc.weight, second.fc.weight)


def test_spread():
    student, teacher = pair("spread")
    options = {"kd_weight": 0.6, "temperature": 2.0, "feature_weight": 3.0, "silent": 0.4}
    method = attached("spread", student, teacher, **options)
    step = step_of(method, student, teacher)
    torch.manual_seed(4)
    terms = {name: value.item() for name, value in method(step).items()}
    torch.manual_seed(4)
    answering = (torch.rand(B, BOARDS) >= 0.4).numpy()
    assert 0 < answering.mean() < 1
    answering |= ~answering.any(1, keepdims=True)
    features = np.stack(arrays(step.student_features), 1)
    z = fused(student.head, features * answering[..., None])
    p, q = softmax(step.teacher_logits.double().numpy() / 2), softmax(z / 2)
    (filters,) = arrays(step.teacher_features)
    assert filters.shape == (B, FILTERS)
    wanted = np.stack([filters[:, board.argmax(1)] for board in student.head.place.numpy().reshape(BOARDS, 8, -1)], 1)
    unit = [one / np.linalg.norm(one, axis=2, keepdims=True) for one in (features, wanted)]
    assert terms == {
        "ce": pytest.approx(0.4 * cross_entropy(z, step.y.numpy()), rel=1e-3),
        "kd": pytest.approx(0.6 * 4 * (p * np.log(p / q)).sum(1).mean(), rel=1e-3),
        "features": pytest.approx(3 * ((unit[0] - unit[1]) ** 2).sum(2).mean(), rel=1e-3),
    }


@pytest.mark.parametrize("partition", ["spectral", "louvain"])
def test_the_partition_is_that_of_the_teachers_filters(partition):
    student, teacher = pair("spread")
    attached("spread", student, teacher, partition=partition)
    with torch.no_grad():
        seen = teacher.pool(teacher.stages(teacher.stem(setting().images(512)))).double().numpy()
    spectral = spectral_groups(correlations(seen), BOARDS)
    groups = spectral if partition == "spectral" else louvain_groups(coactivations(seen), BOARDS)
    assert any(list(group) != list(range(8 * n, 8 * n + 8)) for n, group in enumerate(groups))
    for board, group in zip(student.head.place.reshape(BOARDS, 8, -1), groups, strict=True):
        assert board.argmax(1).tolist() == list(group)


def problem(student, teacher=None, **options) -> str:
    with pytest.raises(RecipeError) as caught:
        attached("spread", student, teacher or network(0.375, 1), **options)
    return str(caught.value)


def test_what_cannot_be_spread():
    assert problem(network(0.25, 0)) == (
        "error: the method spread trains the parts of several boards, and the student has none\n"
        "       expected: student.network = spread, with part, boards, copies and filters\n"
        "fix:   --set student.network=spread --set student.part=resnet"
    )
    assert problem(spread(), network(0.25, 1)) == (
        "error: the teacher has 16 filters before its logits, the student's head 24\n"
        "       expected: the same number, to be shared out to the boards\n"
        "fix:   --set student.filters=16"
    )
    with pytest.raises(RecipeError) as caught:
        spread(filters=25)
    assert str(caught.value) == (
        "error: network spread cannot share 25 filters out to 3 boards, each to 1 of them\n"
        "       allowed: 2 boards or more, filters a multiple of boards, copies from 1 to boards\n"
        "fix:   set filters = 24, and copies = 1 or 2"
    )
    with pytest.raises(RecipeError) as caught:
        registry.create("method", "spread", options={"silent": 1.0})
    assert str(caught.value) == (
        "error: distill.silent = 1.0 is not valid\n"
        "       expected: a share, at least 0 and below 1\n"
        "fix:   --set distill.silent=0.25"
    )
