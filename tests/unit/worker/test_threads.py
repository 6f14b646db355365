import subprocess
import sys

from worker.threads import sleep_while_waiting


def test_threads_sleep_while_they_wait_unless_an_operator_chose_otherwise() -> None:
    environ: dict[str, str] = {}
    sleep_while_waiting(environ)
    assert environ == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
    for choice in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "50"}):
        environ = dict(choice)
        sleep_while_waiting(environ)
        assert environ == choice


def test_a_worker_says_so_before_torch_loads() -> None:
    code = (
        "import sys, worker.lora_worker\n"
        "assert 'torch' not in sys.modules\n"
        "worker.lora_worker.sleep_while_waiting = lambda: sys.exit('torch' in sys.modules)\n"
        "worker.lora_worker.LoraWorker._load_model_runner(None, None)\n"
        "raise RuntimeError('it did not')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
