"""The models that a worker serves: their queues, their cards and versions, the slots of their adapters."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from shared.errors import ConfigurationError
from shared.messages import ModelCard
from shared.queue import registry
from shared.queue.names import queue_name
from shared.queue.records import Slots
from shared.settings import WorkerSettings
from worker.engine.adapter_cache import AdapterCache

if TYPE_CHECKING:
    from worker.model.model_runner import ModelRunner

ALL_QUEUES = "default"
"""What `rq worker` passes without a queue argument."""


def served_queues(settings: WorkerSettings, arguments: Sequence[str]) -> list[str]:
    """The queue names behind the arguments of `rq worker`, which are model names."""
    base = settings.base_name
    queues = {base: queue_name(base, None)}
    queues |= {source.name: queue_name(base, source.name) for source in settings.adapters}
    if list(arguments) == [ALL_QUEUES]:
        return list(queues.values())
    for argument in arguments:
        if argument not in queues:
            raise ConfigurationError(
                f"rq worker was given {argument!r}, which is no model of this worker: {', '.join(queues)}"
            )
    return [queues[argument] for argument in arguments]


def adapter_slots(settings: WorkerSettings, adapters: AdapterCache[Any]) -> Slots:
    resident = [queue_name(settings.base_name, name) for name in adapters.resident]
    return Slots(adapters.num_slots, resident, settings.max_wait_s)


def served_versions(cards: Sequence[ModelCard], queues: Collection[str]) -> dict[str, str]:
    """The queues that this worker claims from, and the version of the weights that it has for each."""
    versions = {queue_name(card.base, card.adapter_name): card.weights_version for card in cards}
    return {queue: versions[queue] for queue in queues}


def model_cards(settings: WorkerSettings, model_runner: "ModelRunner") -> list[ModelCard]:
    """What this worker tells the registry: the base, then its adapters."""
    base = ModelCard(
        name=settings.base_name,
        base=settings.base_name,
        source=settings.model,
        version=model_runner.model_version,
        base_version=model_runner.model_version,
        created=registry.created_now(),
        max_model_len=model_runner.max_model_len,
    )
    versions = model_runner.adapter_versions
    return [base] + [
        msgspec.structs.replace(
            base,
            name=name,
            adapter_name=name,
            source=path,
            version=versions[name],
        )
        for name, path in settings.adapters
    ]
