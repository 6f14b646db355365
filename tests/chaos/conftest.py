"""The models, the clusters, the fault-free answers, and a table of what was measured."""

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest

from tests.chaos.checker import Reference, check_expiry, check_quiet
from tests.chaos.cluster import BASE, TTL_S, UNHURRIED, Cluster, build_models
from tests.chaos.node import install_openai
from tests.chaos.recorder import Answer, Ask, Recorder, workload
from tests.forked import Nursery

Measure = Callable[[str, float, float], None]
FIGURE = "measured under faults"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test of this folder with `chaos`."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.chaos)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A worker's settings for the tiny model and its adapters."""
    return build_models(tmp_path_factory.mktemp("chaos-models"))


@pytest.fixture(scope="session")
def reference(nursery: Nursery, models: dict[str, str]) -> Reference:
    """Fault-free answers, from a quiet deployment of its own."""

    def run(asks: Sequence[Ask]) -> list[Answer]:
        with Cluster(models, nursery, **UNHURRIED) as cluster, Recorder(cluster.server.url) as recorder:
            cluster.start_worker(wait=False)
            api = cluster.start_api()
            cluster.workers[0].wait_until_serving()
            return recorder.start(api.url, asks).wait()

    reference = Reference(run)
    reference.prepare(workload())
    return reference


@pytest.fixture(scope="session")
def shared_cluster(models: dict[str, str], nursery: Nursery, reference: Reference) -> Iterator[Cluster]:
    """One server and one API for all tests that break workers only."""
    with Cluster(models, nursery) as cluster:
        cluster.start_api()
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster, quiet before and after (C4, C5), without complaints of its own."""
    yield shared_cluster
    check_quiet(shared_cluster.connection, BASE)
    check_expiry(shared_cluster.connection, max_ttl_s=TTL_S)
    assert not shared_cluster.take_complaints()


@pytest.fixture
def recorder(shared_cluster: Cluster) -> Iterator[Recorder]:
    """Clients of the shared cluster."""
    with Recorder(shared_cluster.server.url) as recorder:
        yield recorder


@pytest.fixture(scope="session")
def node_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script that reads a stream with the official client for Node."""
    return install_openai(tmp_path_factory.mktemp("node"))


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Measure:
    """Adds a figure and its limit to the table; fails only beyond five times the limit."""

    def note(what: str, seconds: float, limit_s: float) -> None:
        figure = f"{request.node.name}: {what} {seconds:.2f} s (limit {limit_s:g} s)"
        # Properties reach the process that prints the summary also with `pytest -n`.
        request.node.user_properties.append((FIGURE, figure))
        assert seconds <= 5 * limit_s, figure

    return note


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the output of the clusters' processes to the report of a failed test."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            cluster = getattr(value, "cluster", value)
            if isinstance(cluster, Cluster):
                report.sections += cluster.outputs()
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the measured figures."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    calls = [report for report in reports if report.when == "call"]
    if figures := [figure for report in calls for name, figure in report.user_properties if name == FIGURE]:
        terminalreporter.section(FIGURE)
        for figure in figures:
            terminalreporter.line(figure)
