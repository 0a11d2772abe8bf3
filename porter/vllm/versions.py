"""The version map: how each name of vLLM that ports use looks, release by release.

`python -m porter.vllm.versions` reads the releases and writes it.

Reading a release fetches only the files that define the names, out of its wheel in the registry.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from porter import console
from porter.atomic import write_files
from porter.errors import UsageError
from porter.targets.base import passes_of
from porter.vllm.conform import INTERFACE, Name, names_used
from porter.vllm.library import Library, Symbol
from porter.vllm.wheels import open_vllm

MAP = Path(__file__).parent / "versions.json"
RELEASES = tuple(f"0.{minor}.0" for minor in range(20, 34))


def vocabulary() -> set[Name]:
    """Every name of vLLM that the target's passes and its support file can write."""
    from porter.emit import render, target_settings
    from porter.targets.vllm.use_layers import RENAMED

    passes = passes_of("vllm", target_settings("vllm")["passes"])
    texts = {f"{each.name}-{i}": e.after for each in passes for i, e in enumerate(each.EXAMPLES)}
    texts["support.py"] = render("vllm", "support.py.j2", {})
    names = dict.fromkeys(("architecture", "package", "stem", "version"), "oak")
    texts["__init__.py"] = render("vllm", "init.py.j2", names)
    known = {new for names in RENAMED.values() for new in names.values() if new[0].startswith("vllm")}
    return names_used(texts) | known


def read_release(place: str, names: Iterable[Name]) -> tuple[str, dict[Name, Symbol | None]]:
    """(version, symbols) of an installed vLLM, a wheel or a release; see `open_vllm`."""
    with open_vllm(place) as source:
        library = Library(source)
        return source.version, {name: library.symbol(*name) for name in sorted(names)}


def known_releases() -> dict[str, dict[Name, Symbol | None]]:
    """The committed map: version -> symbols."""
    table = json.loads(MAP.read_text(encoding="utf-8")) if MAP.is_file() else {"releases": [], "names": {}}
    found: dict[str, dict[Name, Symbol | None]] = {version: {} for version in table["releases"]}
    for text, forms in table["names"].items():
        module, _, name = text.rpartition(".")
        for form in forms:
            for version in form["releases"]:
                found[version][module, name] = None if form["symbol"] is None else _symbol(form["symbol"])
    return found


def symbols_for(files: Mapping[str, str], places: Sequence[str]) -> Iterator[tuple[str, Mapping[Name, Symbol | None]]]:
    """(version, symbols) for the names in a port's files: of each place, or of every release of the map.

    Raises UsageError if the port uses names that the map doesn't have.
    """
    names = names_used(files)
    if places:
        yield from (read_release(place, names) for place in places)
        return
    for version, symbols in known_releases().items():
        if unknown := sorted(".".join(name) for name in names - symbols.keys()):
            raise UsageError(f"the map of releases has no {', '.join(unknown)}", "read a vLLM with --vllm")
        yield version, symbols


def _symbol(data: Mapping[str, Any]) -> Symbol:
    tuples = {key: tuple(data[key]) for key in ("parameters", "attributes")}
    return Symbol(**{**data, **tuples})


def _compact(releases: Mapping[str, Mapping[Name, Symbol | None]]) -> dict[str, list[dict[str, Any]]]:
    """Each name's forms, with the releases that have them."""
    table: dict[str, list[dict[str, Any]]] = {}
    for version, symbols in releases.items():
        for (module, name), symbol in symbols.items():
            forms = table.setdefault(f"{module}.{name}", [])
            data = None if symbol is None else asdict(symbol)
            form = next((f for f in forms if f["symbol"] == data), None)
            if form is None:
                forms.append(form := {"releases": [], "symbol": data})
            form["releases"].append(version)
    return dict(sorted(table.items()))


def main(releases: Annotated[list[str] | None, typer.Argument(help="Versions or wheels.")] = None) -> None:
    """Read releases and write the map."""
    names = vocabulary()
    found = {}
    for place in releases or RELEASES:
        version, symbols = read_release(place, names)
        found[version] = symbols
        console.say(f"{version}: {sum(s is None for s in symbols.values())} of {len(symbols)} names are not there")
    table = {"interface": INTERFACE, "releases": list(found), "names": _compact(found)}
    write_files(MAP.parent, {MAP.name: json.dumps(table, indent=1) + "\n"})


if __name__ == "__main__":
    typer.run(main)
