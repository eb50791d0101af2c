from __future__ import annotations

import numpy as np
import pytest
from small_models import images, residual_model, run

from edgekd.quantize import ptq
from edgekd.quantize.mixed import Search, search, sensitivity
from edgekd.tasks import Judge
from edgekd.tasks.classification import Classification

LAYERS = [f"layer{index}" for index in range(10)]
# What each layer costs in INT8, in points; `ranked` is nearly their order.
COST = dict(zip(LAYERS, [4.0, 0.1, 3.0, 0.2, 0.0, 0.1, 0.0, 0.1, 0.0, 0.0], strict=True))


def accuracy(kept):
    return 0.9 - sum(cost for name, cost in COST.items() if name not in kept) / 100


def test_it_keeps_as_few_layers_as_the_target_needs():
    found = Search(accuracy, LAYERS, 0.9 - 0.0051, seconds=60).run()
    assert found["keep_float"] == ["layer0", "layer2"]
    assert found["score"] == pytest.approx(0.895)
    assert (found["met"], found["out_of_time"]) == (True, False)
    assert len(found["tried"]) < 12


def test_nothing_is_kept_when_all_of_int8_is_good_enough():
    found = Search(accuracy, LAYERS, 0.5, seconds=60).run()
    assert found["keep_float"] == []
    assert len(found["tried"]) == 1


def test_a_target_is_not_missed_by_rounding():
    """Scores are those of float32 answers."""
    found = Search(lambda kept: 0.9 - (1e-7 if not kept else 0), LAYERS, 0.9, seconds=60).run()
    assert (found["met"], found["keep_float"]) == (True, [])


def test_the_best_is_kept_when_time_runs_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("edgekd.quantize.mixed.time.monotonic", lambda: now[0])

    def slow(kept):
        now[0] += 4
        return accuracy(kept)

    found = Search(slow, LAYERS, 0.9 - 0.0051, seconds=10).run()
    assert found["out_of_time"]
    assert found["met"]
    assert len(found["tried"]) == 3
    assert set(found["keep_float"]) >= {"layer0", "layer2"}


def test_a_target_out_of_reach_leaves_the_best_there_was():
    found = Search(accuracy, LAYERS, 0.95, seconds=60).run()
    assert not found["met"]
    assert found["score"] == pytest.approx(0.9)
    assert {"layer0", "layer2"} <= set(found["keep_float"]) < set(LAYERS)


def test_progress_tells_time_spent_and_layers():
    seen = []
    Search(accuracy, LAYERS, 0.9, 60, on_progress=lambda share, text: seen.append((share, text))).run()
    assert seen[0][1] == "0 of 10 layers in float"
    assert all(0 <= share <= 1 for share, _ in seen)


def test_a_layer_with_harder_values_is_more_sensitive(residual):
    prepared = ptq.prepare(residual, images(40))
    found = sensitivity(prepared, images(16), method="minmax", percentile=100, seconds=60)
    assert set(found) == {"stem", "conv1", "conv2", "fc"}
    clipped = sensitivity(prepared, images(16), method="percentile", percentile=70, seconds=60)
    assert all(clipped[name] < found[name] for name in found)
    assert len(sensitivity(prepared, images(16), method="minmax", percentile=100, seconds=0)) == 1


def test_the_search_of_a_model_meets_its_budget(residual):
    prepared = ptq.prepare(residual, images(40))
    x = images(60, 9)
    labels = run(residual_model(), x).argmax(1)
    bad = {"method": "percentile", "percentile": 70.0}
    found = search(prepared, x, Judge(Classification(), labels, (4,)), target=1.0, seconds=30, **bad)
    assert found["float_score"] == 1
    assert found["met"]
    assert found["score"] >= 0.98
    assert found["tried"][0]["score"] < 0.98
    assert 0 < len(found["keep_float"]) <= 4
    again = ptq.quantize(residual, residual.with_name("mixed.onnx"), images(40), calibrate="percentile", percentile=70,
                         keep_float=found["keep_float"])  # fmt: skip
    assert again["keep_float"] == found["keep_float"]
    assert isinstance(found["sensitivity_db"]["stem"], float) and np.isfinite(found["sensitivity_db"]["stem"])
