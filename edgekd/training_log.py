"""What a training tells while it runs: metrics by epoch as JSON lines, and as TensorBoard event files on request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.errors import MissingError

METRICS = "metrics.jsonl"


class TrainingLog:
    """The log in a folder. It starts as `history`, the epochs up to the checkpoint: a kill may have left other ones.

    Raises MissingError when TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, history: Sequence[Mapping[str, float]], *, tensorboard: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / METRICS
        self.file.write_text("".join(map(_line, history)), encoding="utf-8")
        self.board = _board(folder / "tensorboard", len(history)) if tensorboard else None

    def add(self, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one more epoch, and see that they can be read at once."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(_line(metrics))
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, metrics["epoch"])
            self.board.flush()

    def close(self) -> None:
        """Nothing more will come."""
        if self.board is not None:
            self.board.close()


def _line(metrics: Mapping[str, float]) -> str:
    return json.dumps(dict(metrics)) + "\n"


def _board(folder: Path, epochs: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingError(
            "train.tensorboard needs the Python package 'tensorboard', which is not installed",
            fix="pip install 'edgekd[tensorboard]', or set train.tensorboard = false",
        ) from error
    return SummaryWriter(
        str(folder), purge_step=epochs + 1
    )  # TensorBoard drops what earlier files have of later epochs
