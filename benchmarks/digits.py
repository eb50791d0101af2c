"""The shipped recipe `digits` over several seeds: teacher, the student alone, and the distilled student.

python benchmarks/digits.py [--seeds 0 1 2 3 4] [--report]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from results import spread_of, table, write_section

from edgekd import pipeline, recipe, target
from edgekd.artifact import Store
from edgekd.stages import Job

RUNGS = {"teacher": "teacher", "scratch": "student, no teacher", "student": "student, distilled"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--report", action="store_true", help="write docs/results.md")
    given = parser.parse_args()
    found: dict[str, list[float]] = {rung: [] for rung in RUNGS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in given.seeds:
            made = pipeline.run(job(seed, Path(folder)), "student")
            for rung, accuracies in found.items():
                accuracies.append(100 * made[rung].result["score"])
            print(f"seed {seed}:", ", ".join(f"{rung} {found[rung][-1]:.2f}" for rung in RUNGS), flush=True)
    params = {rung: made[rung].result["params"] for rung in RUNGS}
    changes = [student - teacher for student, teacher in zip(found["student"], found["teacher"], strict=True)]
    rows = [[RUNGS[rung], f"{params[rung]:,}", spread_of(values)] for rung, values in found.items()]
    change = f"{statistics.mean(changes):+.2f} points ({min(changes):+.2f} to {max(changes):+.2f})"
    ratio = params["teacher"] / params["student"]
    text = f"Student against teacher, per seed: {change}, at 1/{ratio:.0f} of the parameters."
    print(text)
    if given.report:
        body = f"Test accuracy in percent of {made['student'].result['n']} images, mean ± standard deviation over"
        body += f" {len(given.seeds)} seeds.\n\n{table(['rung', 'parameters', 'accuracy'], rows)}\n\n{text}"
        write_section("digits", "The recipe `digits`", f"{body}\n\nMade by `benchmarks/digits.py`.")


def job(seed: int, folder: Path) -> Job:
    return Job(
        recipe.load("digits", [f"seed={seed}"]), target.load("local"), Store(folder / "store"),
        run_id=f"digits-{seed}", created="", command="python benchmarks/digits.py",
    )  # fmt: skip


if __name__ == "__main__":
    main()
