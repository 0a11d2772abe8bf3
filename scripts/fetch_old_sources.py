"""Fetch modeling files of old transformers releases, as text, out of the wheels that pip downloads.

    fetch_old_sources.py FOLDER                       the four that the tests convert
    fetch_old_sources.py FOLDER 4.44.2 gemma phi      any others

They land in FOLDER/<version>/<model>/ and are never imported, installed or committed.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "4.36.2"
MODELS = ("falcon", "gpt_neox", "llama", "opt")


def wanted_files(model: str) -> tuple[str, str]:
    return f"modeling_{model}.py", f"configuration_{model}.py"


def fetch(folder: Path, version: str, models: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as downloads:
        download = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", downloads]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        if subprocess.run([*pip, *download, f"transformers=={version}"]).returncode:
            sys.exit(f"pip could not download transformers=={version}; is a package index reachable?")
        with zipfile.ZipFile(next(Path(downloads).glob("*.whl"))) as wheel:
            for model in models:
                unpack(wheel, model, folder / version / model)


def unpack(wheel: zipfile.ZipFile, model: str, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for name in wanted_files(model):
        try:
            text = wheel.read(f"transformers/models/{model}/{name}")
        except KeyError:
            sys.exit(f"{wheel.filename} has no model called {model}")
        (into / name).write_bytes(text)


def main() -> None:
    if len(sys.argv) < 2 or len(sys.argv) == 3:
        sys.exit("usage: fetch_old_sources.py FOLDER [VERSION MODEL...]")
    folder = Path(sys.argv[1])
    version, models = (sys.argv[2], tuple(sys.argv[3:])) if len(sys.argv) > 2 else (VERSION, MODELS)
    if not all((folder / version / model / name).is_file() for model in models for name in wanted_files(model)):
        fetch(folder, version, models)


if __name__ == "__main__":
    main()
