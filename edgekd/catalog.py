"""What there is: the registered things with their options, the shipped files, and the health of this install."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekd import __version__, inventory, recipe, registry, target
from edgekd.device import Device, bootstrap
from edgekd.errors import EdgekdError, shown
from edgekd.yamlfile import mapping_from_yaml

# `edgekd list` speaks of many; the registry of one.
REGISTERED = {f"{kind}s": kind for kind in registry.KINDS}
FILES = {"recipes": lambda: recipe.SHIPPED, "targets": lambda: target.shipped_folder("targets"),
         "calib": lambda: target.shipped_folder("calib")}  # fmt: skip
MIN_FREE_BYTES = 1 << 30


def rows(kind: str) -> list[dict[str, Any]]:
    """Everything of a kind: name, one-line summary, and options as {name: {type, default, required}}."""
    if kind in REGISTERED:
        return [_registered(entry) for entry in registry.entries(REGISTERED[kind])]
    if kind == "devices":
        return [_device(name, device) for name, device in inventory.listed().items()]
    found: list[dict[str, Any]] = []
    for file in sorted(FILES[kind]().glob("*.yaml"), key=lambda file: file.stem):
        content, _ = mapping_from_yaml(file.read_text(encoding="utf-8"), str(file))
        summary = f"{content['n']} images of {content['dataset']}" if kind == "calib" else content["description"]
        found.append({"name": file.stem, "summary": summary, "options": {}})
    return found


def options_text(row: dict[str, Any]) -> str:
    """The options of a row of `rows` with their defaults: `k=8 path=REQUIRED temperature=4.0|schedule`."""
    texts = []
    for name, option in row["options"].items():
        default = option["default"]
        value = (
            "REQUIRED" if option["required"] else default if isinstance(default, str) and default else shown(default)
        )
        texts.append(f"{name}={value}" + ("|schedule" if "schedule" in option["type"] else ""))
    return " ".join(texts)


def _device(name: str, device: inventory.Listed) -> dict[str, Any]:
    target = [f"target {device.target}"] if device.target else []
    about = ", ".join([device.url, *target, *(f"tag:{tag}" for tag in device.tags)])
    return {"name": name, "summary": about, "options": {}}


def _registered(entry: registry.Entry) -> dict[str, Any]:
    options = {
        option.name: {
            "type": registry.typename(option.annotation),
            "default": None if option.required else option.default,
            "required": option.required,
        }
        for option in entry.options.values()
    }
    return {"name": entry.name, "summary": entry.doc, "options": options}


def health(
    places: Sequence[inventory.Place],
    store: Path,
    *,
    wanted: str | None = None,
    backend: str | None = None,
    install: bool = False,
) -> list[dict[str, str]]:
    """Rows of what was looked at, what was found, and the command that mends it (empty when all is well).

    places: the devices; wanted: the target whose engines shall run there, else that of the place, else local; backend:
    another one than the target's; install: first install on them what these engines need.
    """
    found = [_row("edgekd", f"{__version__}, Python {sys.version.split()[0]}")]
    for requirement in importlib.metadata.requires("edgekd") or ():
        name, _, marker = requirement.partition(";")
        package = name.split("[")[0].split(">")[0].split("=")[0].strip()
        if "train" in marker:
            version = _installed(package)
            found.append(_row(package, version or "not installed", "" if version else "pip install 'edgekd[train]'"))
    for entry in registry.entries("backend"):
        try:
            reason = registry.create("backend", entry.name).available()
        except EdgekdError as error:
            reason = f"{error.what}: {error.fix}"
        found.append(_row(f"backend {entry.name}", reason.partition(":")[0] or "ready", reason.partition(": ")[2]))
    found.append(_disk(store))
    for place in places:
        try:
            looked_at = _looked_at(place, wanted or place.target, backend, install)
        except EdgekdError as error:
            if len(places) == 1:
                raise
            looked_at = [bootstrap.Finding("device", error.what, error.fix)]
        found += [_row(f"{place.url} {one.what}", one.found, one.fix) for one in looked_at]
    return found


def _looked_at(
    place: inventory.Place, wanted: str | None, backend: str | None, install: bool
) -> list[bootstrap.Finding]:
    packages = device_packages(target.load(wanted or "local", backend))
    given = [word for name, value in (("--target", wanted), ("--backend", backend)) if value for word in (name, value)]
    with tempfile.TemporaryDirectory() as folder:
        if install:
            bootstrap.install(Device(place.url, Path(folder)), packages)
        device = Device(bootstrap.installed_url(place.url) if install else place.url, Path(folder))
        command = bootstrap.install_command(place.url, packages, given)
        return [*bootstrap.findings(device.facts(), packages, command), bootstrap.turn(device)]


def device_packages(chosen: target.Target) -> list[str]:
    """What must be installed on a device: numpy for the agent, and what the runners of the target's backends import."""
    backends = (registry.entry("backend", choice.name).load() for choice in chosen.choices)
    return ["numpy", *(package for backend in backends for package in getattr(backend, "device_packages", ()))]


def _disk(store: Path) -> dict[str, str]:
    folder = next(path for path in (store.absolute(), *store.absolute().parents) if path.exists())
    if not os.access(folder, os.W_OK):
        return _row("store", f"{folder} may not be written", "choose another: --store FOLDER")
    free = shutil.disk_usage(folder).free
    return _row("store", f"{folder}, {free / 1e9:.1f} GB free", "" if free > MIN_FREE_BYTES else "free some space")


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _row(what: str, found: str, fix: str = "") -> dict[str, str]:
    return {"what": what, "found": found, "fix": fix}
