"""Accuracy under attack: what the stage measures and what the report says of it."""

from __future__ import annotations

import pytest
import torch
from tiny_job import make_job

from edgekd import pipeline, stages
from edgekd.methods.attacks import Ball, withstood
from edgekd.recipe import Attack
from edgekd.report.assemble import document_from_run
from edgekd.report.html import html_from_document
from edgekd.report.markdown import markdown_from_document
from edgekd.stages import attacking


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """The tiny job with an attack, up to it; and its artifacts."""
    job = make_job(
        tmp_path_factory.mktemp("attack") / "store", "attack={epsilon: 4, steps: 3}", "student.activation=relu"
    )
    return job, pipeline.run(job, "attack")


def by_hand(job, subject: str, artifact, spec: Attack) -> float:
    """In one batch, without the stage."""
    dataset, network = job.dataset, job.restore(subject, artifact)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
    x, y = torch.from_numpy(dataset.normalized("test")), torch.from_numpy(dataset.test.labels)
    torch.manual_seed(job.recipe.seed)
    right = withstood(network, x, y, Ball.of(spec.epsilon, spec.step_size, mean, std), spec.steps)
    return int(right.sum()) / len(right)


def test_every_network_is_attacked(attacked):
    job, artifacts = attacked
    result = artifacts["attack"].result
    assert sorted(result["networks"]) == ["scratch", "student", "teacher"]
    assert (result["epsilon"], result["step_size"], result["steps"]) == (4.0, 2.0, 3)
    for name, found in result["networks"].items():
        subject = "teacher" if name == "teacher" else "student"
        assert found["robust_top1"] == by_hand(job, subject, artifacts[name], job.recipe.attack)
        assert found["sanity_top1"] == by_hand(job, subject, artifacts[name], attacking.SANITY)
        assert found["n"] == 50


def test_an_attack_is_the_same_every_time(attacked, tmp_path):
    job, artifacts = attacked
    inputs = {name: artifacts[name] for name in ("teacher", "scratch", "student")}
    torch.rand(5)
    assert stages.attack(job, inputs, tmp_path, tmp_path) == artifacts["attack"].result


def test_the_report_tells_what_is_left(attacked):
    job, artifacts = attacked
    record = job.store.recorded(job.run_id)
    document = document_from_run(record, artifacts)
    assert [row.network for row in document.attack.networks] == ["teacher", "scratch", "student"]
    for row in document.attack.networks:
        assert row.top1 == document.row(row.network).score
        assert row.robust_ci95[0] <= row.robust_top1 <= row.robust_ci95[1]
    for page in (markdown_from_document(document), html_from_document(document)):
        assert "Attack: PGD-3 within 4/255, in steps of 2/255, by each network" in page
    upto = {name: artifact for name, artifact in artifacts.items() if name != "attack"}
    assert document_from_run(record, upto).attack.reason == "Not attacked yet: edgekd distill."


def test_without_the_section_nothing_is_attacked(done):
    record, artifacts = pipeline.recorded(make_job(done.store).store, done.run_id)
    assert "attack" not in artifacts
    assert document_from_run(record, artifacts).attack.reason == "The recipe asks for no attack."


def test_another_attack_trains_nothing_anew(attacked):
    job, _ = attacked
    other = make_job(job.store.root, "attack={epsilon: 2, steps: 3}", "student.activation=relu")
    actions = {planned.stage: planned.action for planned in pipeline.plan(other, "attack")}
    assert actions == {"teacher": "reuse", "scratch": "reuse", "student": "reuse", "attack": "run"}
    same = make_job(job.store.root, "attack={epsilon: 4, steps: 3}", "student.activation=relu")
    assert {planned.action for planned in pipeline.plan(same, "attack")} == {"reuse"}


def test_a_network_that_hides_its_gradient_is_warned_of(attacked, tmp_path, monkeypatch):
    job, artifacts = attacked
    shares = iter([0.5, 0.004, 0.6, 0.42])
    monkeypatch.setattr(attacking, "_withstood", lambda *given: next(shares))
    result = stages.attack(job, {name: artifacts[name] for name in ("teacher", "student")}, tmp_path, tmp_path)
    assert result["warnings"] == [
        "The student still tells 42.0% right with half of every pixel's range to change: its gradient misleads the"
        " attack, and its accuracy under attack says little."
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("attack.epsilon=0", "attack.epsilon = 0 is not valid"),
        ("attack.steps=0", "attack.steps = 0 is not valid"),
        ("attack.epsilom=8", "attack.epsilom is not a known key"),
    ],
)
def test_attacks_that_are_none(given, message, main, tiny):
    code, _, err = main("distill", "tiny.yaml", "--set", given)
    assert code == 2 and message in err


def test_the_command_line_attacks(main, tiny):
    code, _, err = main("distill", "tiny.yaml", "--set", "attack={steps: 2}", "--set", "student.activation=relu")
    assert code == 0, err
    assert "[4/4] attack" in err
