"""What is missing or wrong in the options of `porter serve` is told in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT_FASTAPI = "import sys; sys.modules['fastapi'] = None; from porter.cli import main; main()"


@pytest.mark.parametrize(
    ("before", "options", "told"),
    [
        (WITHOUT_FASTAPI, [], 'pip install "porter-lm[serve]"'),
        ("from porter.cli import main; main()", ["--generation-config", "some"], "use auto or none"),
        ("from porter.cli import main; main()", ["--api-key", ""], "an API key is empty"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(before: str, options: list[str], told: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", before, "serve", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert told in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
