"""The official client for Node: from npm, run by the Node that comes from PyPI."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from api.generation import LAST_EVENT_ID
from tests.chaos.readers import Read, Reading, and_back
from tests.deployment import BIN

PACKAGE = "openai@7.59.0"
SCRIPT = Path(__file__).parent / "read_stream.mjs"
INSTALL_LIMIT_S = 60


def install_openai(folder: Path) -> Path:
    """Installs the package into this folder, beside our script; fails the test if it can't be fetched."""
    options = ["--no-audit", "--no-fund", "--fetch-retries", "1", "--cache", folder / "cache"]
    command = [BIN / "npm", "install", PACKAGE, "--prefix", folder, *options]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=INSTALL_LIMIT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.fail(f"npm can't install {PACKAGE}, which this test reads streams with: {error}")
    if done.returncode:
        pytest.fail(f"npm can't install {PACKAGE}, which this test reads streams with: {done.stderr}")
    return Path(shutil.copy(SCRIPT, folder))


def node_readers(script: Path) -> dict[str, Read]:
    """Node clients that read a stream from its beginning."""

    def reader(mode: str) -> Read:
        def read(url: str, reading: Reading) -> None:
            _run(script, url, reading, mode=mode, body=reading.ask.body, headers=reading.request_headers)

        return read

    return {"openai for Node": reader("create"), "openai for Node .stream()": reader("helper")}


def resuming_node_readers(script: Path) -> dict[str, Read]:
    """The Node client that resumes a stream."""

    def resume(url: str, reading: Reading) -> None:
        path = f"/chat/completions/{reading.request_id}/stream"
        _run(script, url, reading, mode="resume", path=path, headers={LAST_EVENT_ID: reading.last_id})

    return {"openai for Node, resumed": and_back(resume)}


def _run(script: Path, url: str, reading: Reading, **options: Any) -> None:
    arguments: Mapping[str, Any] = {"baseURL": f"{url}/v1"} | options
    command = [BIN / "node", script, json.dumps(arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            reading.note(json.loads(line))
        complaint = process.stderr.read()
    if process.returncode:
        reading.failure = complaint
    elif not reading.errors:
        reading.num_done = 1
