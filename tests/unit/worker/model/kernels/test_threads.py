import subprocess
import sys
from pathlib import Path

import pytest

from worker.model.kernels.threads import COMPILER, sleep_while_waiting, stays_eager


def test_threads_sleep_while_they_wait_unless_an_operator_chose_otherwise() -> None:
    environ: dict[str, str] = {}
    sleep_while_waiting(environ=environ)
    assert environ == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
    for choice in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "50"}):
        environ = dict(choice)
        sleep_while_waiting(environ=environ)
        assert environ == choice


def test_threads_wait_longer_where_no_compiled_pass_is_to_be_expected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environ: dict[str, str] = {}
    sleep_while_waiting(is_eager=True, environ=environ)
    assert environ == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "6000"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stays_eager("graph")
    (tmp_path / COMPILER).touch(0o755)
    assert not stays_eager("graph")
    assert stays_eager("kernels")
    assert stays_eager("off")


@pytest.mark.parametrize("choose", ["sleep_while_waiting", "bound_caches"])
def test_a_worker_chooses_before_torch_loads(choose: str) -> None:
    code = (
        "import sys, worker.lora_worker\n"
        "from shared.settings import WorkerSettings\n"
        "assert 'torch' not in sys.modules\n"
        f"worker.lora_worker.{choose} = lambda **_: sys.exit('torch' in sys.modules)\n"
        "worker.lora_worker.LoraWorker.load_model(None, WorkerSettings(model='m'))\n"
        "raise RuntimeError('it did not')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
