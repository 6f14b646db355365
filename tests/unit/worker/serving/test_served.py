"""The queues and cards of a worker: both follow its models as they change."""

from dataclasses import replace

import pytest

from shared.errors import ConfigurationError
from tests.fakes import served_models
from worker.serving.served import ServedQueues, queues_of


def test_the_queues_follow_the_models() -> None:
    models = served_models(["a", "b"])
    queues = ServedQueues(models, max_model_len=64)
    assert queues.versions() == {"tiny": "m1", "tiny-a": "m1+a1", "tiny-b": "m1+b1"}
    models.add(replace(models.find("a"), version="a2"))
    models.remove("b")
    assert queues.versions() == {"tiny": "m1", "tiny-a": "m1+a2"}
    assert [(card.name, card.version) for card in queues.cards()] == [("tiny", "m1"), ("a", "a2")]


def test_a_worker_of_named_queues_claims_from_no_other() -> None:
    models = served_models(["a", "b"])
    queues = ServedQueues(models, max_model_len=64, only=["tiny-a"])
    assert queues.versions() == {"tiny-a": "m1+a1"}
    assert len(queues.cards()) == 3


def test_queue_arguments_are_model_names_and_none_means_all() -> None:
    assert queues_of("tiny", ["a", "b"], ["default"]) == ["tiny", "tiny-a", "tiny-b"]
    assert queues_of("tiny", ["a", "b"], ["b", "tiny"]) == ["tiny-b", "tiny"]
    with pytest.raises(ConfigurationError, match="'c', which is no model of this worker: tiny, a, b"):
        queues_of("tiny", ["a", "b"], ["c"])


def test_weights_by_model_name_become_those_of_queues() -> None:
    queues = ServedQueues(served_models(["a"]), max_model_len=64)
    assert queues.weights_by_queue({"a": 2.0, "tiny": 0.5, "later": 3.0}) == {
        "tiny-a": 2.0,
        "tiny": 0.5,
        "tiny-later": 3.0,
    }


def test_only_few_queues_are_named() -> None:
    models = served_models(["a", "b"])
    queues = ServedQueues(models, max_model_len=64)
    assert queues.names_if_few(3) == ["tiny", "tiny-a", "tiny-b"]
    assert queues.names_if_few(2) == []
    assert ServedQueues(models, max_model_len=64, only=["tiny-a"]).names_if_few(1) == ["tiny-a"]
