"""Searches for the plans that run fastest, kernel by kernel, among those of `schedules.py`.

A task is a kernel without its name and numbers: one that occurs several times, in this model or in another, is tuned
once. Its first plan is the schedules' best guess. Batches of others are measured in turn with the best one so far,
first its neighbours, in which one choice is another, then the next guesses. What counts is their ratio, which a busy
machine changes less than it changes times. Tasks get their batches by the time that the model spends in them.

Every result is one line of a file that only grows: a killed search goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tvm

from edgekd.backends.tvm.clock import Clock
from edgekd.backends.tvm.processor import Processor
from edgekd.backends.tvm.schedules import Plan, cpu_schedules, plans_of, task_of

BATCH = 8
OnBest = Callable[[int, float, float], None]  # trials so far, seconds of the best plans and of the first ones


class Budget(NamedTuple):
    """When to stop: whatever comes first. Trials of an earlier search for the same kernels count."""

    trials: int
    minutes: float


@dataclass
class Task:
    """A kernel, and what is known of its plans."""

    key: str
    function: Any
    plans: list[Plan]
    calls: int = 0  # in one inference
    seconds: dict[Plan, float] = field(default_factory=dict)  # of those that were measured

    @property
    def best(self) -> Plan:
        """The fastest so far."""
        return min(self.seconds, key=self.seconds.__getitem__, default=self.plans[0])

    @property
    def share(self) -> float:
        """Seconds of an inference that are spent here, in units of how much was tried already."""
        return self.calls * self.seconds[self.best] / (1 + len(self.seconds) // BATCH)

    def untried(self) -> list[Plan]:
        """The next plans to measure: neighbours of the best one first."""
        left = [plan for plan in self.plans if plan not in self.seconds]
        best = self.best
        left.sort(key=lambda plan: sum(one != other for one, other in zip(plan, best, strict=True)) > 1)
        return left[:BATCH]


class Records:
    """The file of results: one JSON line [task, plan, seconds] each."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, dict[Plan, float]] = {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            try:
                task, plan, seconds = json.loads(line)
                self.known.setdefault(task, {})[Plan(*plan)] = float(seconds)
            except (ValueError, TypeError):
                continue  # a line that a kill cut short

    def add(self, task: str, found: Mapping[Plan, float]) -> None:
        """Keep results of a task."""
        lines = [json.dumps([task, plan, seconds]) for plan, seconds in found.items()]
        with self.file.open("a", encoding="utf-8") as handle:
            handle.write("\n" + "\n".join(lines))  # in front, since a kill may have cut the last line short
        self.known.setdefault(task, {}).update(found)


def tasks_of(module: Any, processor: Processor) -> list[Task]:
    """The kernels of a fused module among whose plans there is a choice."""
    tasks: dict[str, Task] = {}
    keys = {}
    for name, function in module.functions_items():
        if isinstance(function, tvm.tirx.PrimFunc) and (plans := plans_of(function, processor))[1:]:
            keys[name.name_hint] = key = task_of(function)
            tasks.setdefault(key, Task(key, function, plans))

    for called in kernel_calls(module):
        if called.name_hint in keys:
            tasks[keys[called.name_hint]].calls += 1
    return list(tasks.values())


def kernel_calls(module: Any) -> list[Any]:
    """The functions that one inference calls, in order, by their variables in the module."""
    found = []

    def note(expression: Any) -> None:
        if isinstance(expression, tvm.relax.Call) and expression.op == tvm.ir.Op.get("relax.call_tir"):
            found.append(expression.args[0])

    tvm.relax.analysis.post_order_visit(module["main"], note)
    return found


def tune(tasks: list[Task], clock: Clock, records: Records, budget: Budget, on_best: OnBest) -> dict[str, Plan]:
    """The fastest known plan of every task, after a search within the budget."""
    for task in tasks:
        known = records.known.get(task.key, {})
        task.seconds = {plan: known[plan] for plan in task.plans if plan in known}
    until = time.monotonic() + 60 * budget.minutes
    for task in tasks:
        if task.plans[0] not in task.seconds:  # all ratios are to the first
            task.seconds = {}
            _measure(task, [], clock, records)
    while (tried := sum(len(task.seconds) for task in tasks)) < budget.trials and time.monotonic() < until:
        on_best(tried, *_totals(tasks))
        open_tasks = [task for task in tasks if task.untried()]
        if not open_tasks:
            break
        task = max(open_tasks, key=lambda task: task.share)
        _measure(task, task.untried()[: budget.trials - tried], clock, records)
    on_best(tried, *_totals(tasks))
    return {task.key: task.best for task in tasks}


def _totals(tasks: list[Task]) -> tuple[float, float]:
    """Seconds of an inference that these kernels take, by their best plans and by the first ones."""
    best = sum(task.calls * task.seconds[task.best] for task in tasks)
    return best, sum(task.calls * task.seconds[task.plans[0]] for task in tasks)


def _measure(task: Task, plans: list[Plan], clock: Clock, records: Records) -> None:
    """Measure plans in turn with the best one so far, whose time is known already unless it is the first."""
    best = task.best
    scheduled = {plan: _scheduled(task.function, plan, clock.processor) for plan in [best, *plans]}
    took = dict(zip(scheduled, clock.kernels(list(scheduled.values())), strict=True))
    unit = task.seconds.get(best, took[best]) / took[best]
    found = {plan: seconds * unit for plan, seconds in took.items() if plan not in task.seconds}
    records.add(task.key, found)
    task.seconds.update(found)


def _scheduled(function: Any, plan: Plan, processor: Processor) -> Any:
    """The function, scheduled as planned."""
    module = tvm.IRModule({"main": function})
    with processor.target():
        return cpu_schedules(processor, {task_of(function): plan})(module)["main"]
