"""A benchmark in one archive, for a board that edgekd cannot reach: unpack it, run one command, bring one file back.

`run.py` and the README are for whoever sits at the board; what comes back is read by `edgekd.device.kit`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from edgekd.device import files_below, signers

HERE = Path(__file__).parent
FOLDER = "edgekd-kit"


def packed(
    archive: Path,
    files: Mapping[str, Path],
    *,
    models: Sequence[str],
    name: str,
    target: str,
    backend: str,
    built_files: Sequence[str],
    commands: Sequence[str],
) -> dict[str, Any]:
    """Write the archive, a .tar.gz; the same files always give the same bytes.

    files: the benchmark's bundle, and what else shall be there, by name; models: those that are measured, by name;
    built_files: what a build leaves beside each of them, where engines are built on the board; commands: what is done
    there, for those who want to do it by hand.

    Returns:
        id: what the results must name, files: their number, size_bytes of the archive.
    """
    files = {**files, "run.py": HERE / "run.py", "signers.py": Path(signers.__file__)}
    content = {path: file.read_bytes() for path, file in sorted(files_below(files).items())}
    sha256 = {path: hashlib.sha256(data).hexdigest() for path, data in content.items()}
    kinds = ["latency", "logits", *(["end_to_end"] if "pictures" in files else [])]
    arrays = [f"{model}_{kind}.npy" for model in models for kind in kinds]
    kit = {
        "name": name, "target": target, "backend": backend, "files": sha256,
        "built_here": list(models) if built_files else [], "built_files": list(built_files),
        "measured_files": ["result.json", *arrays],
    }  # fmt: skip
    kit["id"] = hashlib.sha256(json.dumps(kit, sort_keys=True).encode()).hexdigest()
    readme = Template((HERE / "README.md").read_text(encoding="utf-8")).substitute(
        name=name, target=target, backend=backend, commands="\n".join(f"    {line}" for line in commands),
        networks="a student" + " and its teacher" * ("teacher" in models),
        folders=", ".join(f"`{model}/`" for model in models),
    )  # fmt: skip
    content |= {"kit.json": json.dumps(kit, indent=1, sort_keys=True).encode(), "README.md": readme.encode()}
    _write(archive, content)
    return {"id": kit["id"], "files": len(content), "size_bytes": archive.stat().st_size}


def _write(archive: Path, content: Mapping[str, bytes]) -> None:
    with (
        archive.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path, data in sorted(content.items()):
            entry = tarfile.TarInfo(f"{FOLDER}/{path}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
