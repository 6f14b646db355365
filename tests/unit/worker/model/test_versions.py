"""Weights versions: hashes of files, which all workers and releases must compute alike."""

import subprocess
import sys
from pathlib import Path

from tests.tiny_models import build_model
from worker.model.versions import adapter_version, model_version

ROOT = Path(__file__).parents[4]


def test_the_model_version_changes_with_the_weights_alone(tmp_path: Path) -> None:
    one, other = build_model(tmp_path / "one", seed=0), build_model(tmp_path / "other", seed=1)
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (one, other)]
    assert sizes[0] == sizes[1]
    versions = [model_version(folder) for folder in (one, other, one)]
    assert versions[0] != versions[1]
    assert versions[0] == versions[2]


def test_the_same_files_have_the_same_versions_in_every_release(tmp_path: Path) -> None:
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text("{}")
    weights.write_text("weights")
    assert model_version(tmp_path).startswith("44aea630a98bb7d7")
    assert adapter_version(config, weights).startswith("17b8c541347379d6")


def test_versions_are_computed_without_torch() -> None:
    code = "import sys, worker.model.versions; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert not {"torch", "transformers", "peft"} & set(loaded.stdout.split())
