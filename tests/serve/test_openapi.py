"""What the OpenAPI document says is what the server does: schemathesis makes right and wrong requests from it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_no_request_made_from_the_document_is_answered_wrongly(server: Any, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json", "--seed", "1"]
    options = [
        "--max-examples",
        "5",
        "--max-response-time",
        "60",
        "--checks",
        "all",
        "--continue-on-failure",
        "--generation-database",
        "none",
    ]
    # Rules between fields, a full context and unknown token ids are no part of a JSON schema
    known = ["--exclude-checks", "positive_data_acceptance", "--suppress-health-check", "filter_too_much"]
    done = subprocess.run(
        [*command, *options, *known, "-H", "Authorization: Bearer a-secret"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:]
