import subprocess
import sys

import pytest

from worker.threads import sleep_while_waiting


def test_threads_sleep_while_they_wait_unless_an_operator_chose_otherwise() -> None:
    environ: dict[str, str] = {}
    sleep_while_waiting(environ)
    assert environ == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
    for choice in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "50"}):
        environ = dict(choice)
        sleep_while_waiting(environ)
        assert environ == choice


@pytest.mark.parametrize("choose", ["sleep_while_waiting", "bound_caches"])
def test_a_worker_chooses_before_torch_loads(choose: str) -> None:
    code = (
        "import sys, worker.lora_worker\n"
        "assert 'torch' not in sys.modules\n"
        f"worker.lora_worker.{choose} = lambda: sys.exit('torch' in sys.modules)\n"
        "worker.lora_worker.LoraWorker._load_model_runner(None, None)\n"
        "raise RuntimeError('it did not')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
