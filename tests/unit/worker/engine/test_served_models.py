"""The models that a worker serves: what is found, what is refused, what a change means for readers."""

from dataclasses import replace

import pytest

from shared.errors import AdapterError, AdapterVersionGone
from tests.fakes import served_models
from tests.streams import make_request
from worker.engine.served_models import ServedModels


@pytest.fixture
def served() -> ServedModels:
    return served_models(["a", "b"])


def test_the_base_comes_before_its_adapters(served: ServedModels) -> None:
    assert [model.adapter_name for model in served] == [None, "a", "b"]


def test_an_adapter_that_is_added_is_found_until_it_is_removed(served: ServedModels) -> None:
    served.add(replace(served.find("a"), name="c", adapter_name="c", version="c1"))
    assert served.find("c").version == "c1"
    served.remove("c")
    with pytest.raises(AdapterError, match="'c' is not loaded"):
        served.find("c")


def test_a_reader_keeps_the_adapters_it_began_with(served: ServedModels) -> None:
    before = served.adapters
    served.add(replace(served.find("a"), version="a2"))
    served.remove("b")
    assert (before["a"].version, list(before)) == ("a1", ["a", "b"])
    assert (served.find("a").version, list(served.adapters)) == ("a2", ["a"])


@pytest.mark.parametrize(
    "promised",
    [
        {},
        {"base_version": "m1"},
        {"adapter_version": "a1"},
        {"base_version": "m1", "adapter_version": "a1"},
    ],
)
def test_a_request_for_the_versions_that_are_served_finds_its_model(
    served: ServedModels, promised: dict[str, str]
) -> None:
    assert served.model_of(make_request("a", **promised)).name == "a"


@pytest.mark.parametrize(
    "promised",
    [{"base_version": "m0", "adapter_version": "a1"}, {"base_version": "m1", "adapter_version": "a0"}],
)
def test_a_request_for_another_version_is_refused(served: ServedModels, promised: dict[str, str]) -> None:
    with pytest.raises(AdapterVersionGone):
        served.model_of(make_request("a", **promised))


def test_a_replaced_adapter_refuses_requests_of_the_version_before(served: ServedModels) -> None:
    request = make_request("a", base_version="m1", adapter_version="a1")
    served.model_of(request)
    served.add(replace(served.find("a"), version="a2"))
    with pytest.raises(AdapterVersionGone):
        served.model_of(request)
