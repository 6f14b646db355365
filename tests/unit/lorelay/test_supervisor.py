"""The supervisor, on small real processes."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorelay.processes import ChildSpec, Signals, describe_exit
from lorelay.supervisor import HURRY_LIMIT_S, Backoff, ChildFailed, Supervisor

START_LIMIT_S = 30.0

PATIENT = """
import pathlib, signal, sys
place = pathlib.Path(sys.argv[1])
def note(number, frame):
    with open(place.parent / "order", "a") as file:
        file.write(f"{place.name} {signal.Signals(number).name}\\n")
    if number != signal.SIGTERM or "stubborn" not in place.name:
        sys.exit(0)
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGUSR1, note)
place.write_text("up")
while True:
    signal.pause()
"""


class FastClock:
    """A clock that jumps over what the supervisor waits for; real signals still arrive."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self.now = 0.0
        self.scripted: list[int] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, timeout_s: float) -> list[int]:
        self.now += max(0.0, timeout_s)
        if self.scripted:
            return [self.scripted.pop(0)]
        return self._signals.wait(0.02)


class Scene:
    """A supervisor, what it said, and how to make children for it."""

    def __init__(self, signals: Signals, folder: Path) -> None:
        self.clock = FastClock(signals)
        self.said: list[str] = []
        self.folder = folder
        self.supervisor = Supervisor(signals, say=self.said.append)
        self.fast = Supervisor(self.clock, clock=self.clock, say=self.said.append)

    def patient(self, name: str, **options: object) -> ChildSpec:
        """A child that says when it is up, and notes each signal it gets."""
        command = (sys.executable, "-c", PATIENT, str(self.folder / name))
        return ChildSpec(name, command, **options)  # type: ignore[arg-type]

    def wait_until_up(self, supervisor: Supervisor, *names: str) -> None:
        # The fast clock jumps, but the children take real time to come up.
        assert supervisor.run_until(lambda: all((self.folder / name).exists() for name in names))

    @property
    def order(self) -> list[str]:
        return (self.folder / "order").read_text().splitlines()


def python(name: str, code: str) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-c", code))


@pytest.fixture(autouse=True)
def hangup_is_not_ignored() -> Iterator[None]:
    """Restores the default of SIGHUP, which nohup sets to ignore."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def signals() -> Iterator[Signals]:
    with Signals() as source:
        yield source


@pytest.fixture
def scene(signals: Signals, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(signals, tmp_path)
    yield scene
    for supervisor in (scene.supervisor, scene.fast):
        pids = supervisor.pids.values()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        supervisor.stop()


def test_the_wait_before_a_restart_doubles_up_to_its_limit() -> None:
    backoff = Backoff(first_s=1, max_s=5, reset_s=60)
    assert [backoff.next_delay_s(0.1) for _ in range(5)] == [1, 2, 4, 5, 5]


def test_the_wait_starts_over_after_a_long_life() -> None:
    backoff = Backoff(first_s=1, max_s=5, reset_s=60)
    delays = [backoff.next_delay_s(lived_s) for lived_s in (0, 0, 60, 0)]
    assert delays == [1, 2, 1, 2]


def test_a_child_that_dies_is_started_again_with_growing_waits(scene: Scene) -> None:
    scene.fast.settle()
    scene.fast.start(python("flaky", "raise SystemExit(3)"))
    scene.fast.run_until(lambda: sum("again in" in line for line in scene.said) == 3)
    assert [line for line in scene.said if "again in" in line] == [
        "flaky ended with exit code 3; starting it again in 0.5 s",
        "flaky ended with exit code 3; starting it again in 1 s",
        "flaky ended with exit code 3; starting it again in 2 s",
    ]


def test_a_child_that_waits_for_its_restart_is_not_started_before_its_time(scene: Scene) -> None:
    scene.fast.settle()
    scene.fast.start(python("flaky", "raise SystemExit(3)"))
    scene.fast.run_until(lambda: bool(scene.said))
    died_at = scene.clock.now
    scene.fast.run_until(lambda: "starting flaky again" in scene.said)
    assert scene.clock.now == pytest.approx(died_at + 0.5)


def test_a_child_that_ends_before_everything_is_ready_is_a_failed_start(scene: Scene) -> None:
    scene.supervisor.start(python("worker 0", "raise SystemExit(2)"))
    with pytest.raises(ChildFailed, match="worker 0 ended with exit code 2 before it was ready") as raised:
        scene.supervisor.run()
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("code", ["raise SystemExit(0)", "import os; os.kill(os.getpid(), 9)"])
def test_a_failed_start_never_has_exit_code_zero(scene: Scene, code: str) -> None:
    scene.supervisor.start(python("api", code))
    with pytest.raises(ChildFailed) as raised:
        scene.supervisor.run()
    assert raised.value.exit_code == 1


def test_what_started_last_stops_first(scene: Scene) -> None:
    for name in ("server", "worker", "api"):
        scene.supervisor.start(scene.patient(name))
    scene.wait_until_up(scene.supervisor, "server", "worker", "api")
    assert scene.supervisor.stop()
    assert scene.order == ["api SIGTERM", "worker SIGTERM", "server SIGTERM"]
    assert scene.supervisor.pids == {}


def test_children_that_started_together_are_told_together(scene: Scene) -> None:
    scene.supervisor.start(scene.patient("worker 0"), scene.patient("worker 1"))
    scene.wait_until_up(scene.supervisor, "worker 0", "worker 1")
    scene.supervisor.stop()
    assert scene.said == ["stopping worker 0, worker 1"]
    assert sorted(scene.order) == ["worker 0 SIGTERM", "worker 1 SIGTERM"]


def test_a_child_that_does_not_end_in_time_is_killed_and_said(scene: Scene) -> None:
    scene.fast.start(scene.patient("stubborn", stop_limit_s=4))
    scene.wait_until_up(scene.fast, "stubborn")
    before = scene.clock.now
    assert not scene.fast.stop()
    assert scene.clock.now >= before + 4
    assert "stubborn did not end in time: killed" in scene.said


def test_a_second_request_to_stop_hurries_the_child_with_its_own_signal(scene: Scene) -> None:
    scene.fast.start(scene.patient("stubborn", stop_limit_s=1e6, hurry_signal=signal.SIGUSR1))
    scene.wait_until_up(scene.fast, "stubborn")
    scene.clock.scripted = [signal.SIGINT]
    assert scene.fast.stop()
    assert scene.order[-1] == "stubborn SIGUSR1"


def test_a_hurried_child_that_still_stays_is_killed(scene: Scene) -> None:
    scene.fast.start(scene.patient("stubborn", stop_limit_s=1e6))
    scene.wait_until_up(scene.fast, "stubborn")
    before = scene.clock.now
    scene.clock.scripted = [signal.SIGINT]
    assert not scene.fast.stop()
    assert before + HURRY_LIMIT_S <= scene.clock.now < before + 1e6


def test_a_third_request_to_stop_kills_at_once(scene: Scene) -> None:
    scene.fast.start(scene.patient("stubborn", stop_limit_s=1e6))
    scene.wait_until_up(scene.fast, "stubborn")
    before = scene.clock.now
    scene.clock.scripted = [signal.SIGINT, signal.SIGINT]
    assert not scene.fast.stop()
    assert scene.clock.now < before + HURRY_LIMIT_S


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_to_stop_and_nothing_is_restarted_afterwards(scene: Scene, number: int) -> None:
    scene.supervisor.settle()
    scene.supervisor.start(scene.patient("api"))
    scene.wait_until_up(scene.supervisor, "api")
    os.kill(os.getpid(), number)
    scene.supervisor.run()
    assert scene.supervisor.is_stopping
    assert scene.supervisor.stop()
    assert scene.said == ["stopping api"]


def test_a_signal_that_came_before_the_wait_is_not_lost(signals: Signals) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.wait(0) == [signal.SIGTERM]


def test_the_signal_handlers_of_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_process_that_ignores_hangups_goes_on_ignoring_them() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.wait(0) == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_waiting_ends_at_its_limit(scene: Scene) -> None:
    scene.fast.start(scene.patient("api"))
    assert not scene.fast.run_until(lambda: False, limit_s=2)
    assert not scene.fast.is_stopping


def test_a_child_leads_its_own_group_so_the_terminals_ctrl_c_passes_it_by(scene: Scene) -> None:
    scene.supervisor.start(scene.patient("api"))
    (pid,) = scene.supervisor.pids.values()
    assert os.getpgid(pid) == pid


def test_what_a_dead_child_leaves_in_its_group_is_killed(scene: Scene) -> None:
    read_fd, write_fd = os.pipe()
    # The grandchild holds the pipe open: reading its end means that the grandchild is gone.
    code = (
        "import subprocess, sys; "
        "subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'], "
        f"pass_fds=({write_fd},)); raise SystemExit(1)"
    )
    scene.supervisor.settle()
    scene.supervisor.start(ChildSpec("api", (sys.executable, "-c", code), pass_fds=(write_fd,)))
    os.close(write_fd)
    scene.supervisor.run_until(lambda: bool(scene.said))
    assert select.select([read_fd], [], [], START_LIMIT_S)[0]
    assert os.read(read_fd, 1) == b""
    os.close(read_fd)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no signal at the parent's death")
def test_children_end_when_their_supervisor_is_killed() -> None:
    code = (
        "import sys\n"
        "from lorelay.processes import ChildSpec, Signals\n"
        "from lorelay.supervisor import Supervisor\n"
        "with Signals() as signals:\n"
        "    supervisor = Supervisor(signals)\n"
        "    child = 'import signal; print(1, flush=True); signal.pause()'\n"
        "    supervisor.start(ChildSpec('child', (sys.executable, '-c', child)))\n"
        "    supervisor.run()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"1\n"
        parent.kill()
        # The child holds the pipe, too: reading its end means that both are gone.
        assert select.select([parent.stdout], [], [], START_LIMIT_S)[0]
        assert parent.stdout.read() == b""


def test_an_exit_status_is_told_in_words() -> None:
    assert describe_exit(3) == "ended with exit code 3"
    assert describe_exit(-9) == "was ended by SIGKILL"
    assert describe_exit(-99) == "was ended by signal 99"
