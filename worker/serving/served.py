"""The queues from which a worker claims and the cards that it registers, computed from `ServedModels`."""

from collections.abc import Collection, Mapping, Sequence

from shared.errors import ConfigurationError
from shared.model_cards import ModelCard, WorkerFacts
from shared.queue.names import queue_name
from shared.queue.slot_plan import AdapterSlots
from worker.engine.ports import Engine, Residency
from worker.engine.served_models import ServedModel, ServedModels

ALL_QUEUES = "default"
"""The queue name that `rq worker` passes to the worker if it was started without queues."""


class ServedQueues:
    """The queues of a worker's models, one per model."""

    def __init__(self, models: ServedModels, max_model_len: int, only: Collection[str] | None = None) -> None:
        """`only`: queues to claim from; None means the queues of all models, even of models added later."""
        self._models = models
        self._max_model_len = max_model_len
        self._only = only

    def name_of(self, adapter_name: str | None) -> str:
        """Returns the name of an adapter's queue, or of the base's queue for None."""
        return queue_name(self._models.base.name, adapter_name)

    def versions(self) -> dict[str, str]:
        """Returns the queues from which the worker may claim at present, each with its weights version."""
        versions = {
            self.name_of(model.adapter_name): self._models.weights_version(model) for model in self._models
        }
        if self._only is None:
            return versions
        return {queue: version for queue, version in versions.items() if queue in self._only}

    def names_if_few(self, most: int) -> list[str]:
        """Returns the queues from which the worker may claim; [] if there are more than `most`."""
        num_queues = 1 + len(self._models.adapters) if self._only is None else len(self._only)
        return list(self.versions()) if num_queues <= most else []

    def weights_by_queue(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Converts weights by model name into weights by queue."""
        base = self._models.base.name
        return {self.name_of(None if name == base else name): weight for name, weight in weights.items()}

    def cards(self) -> list[ModelCard]:
        """Returns the registry's entries for all models: the base, then its adapters."""
        return [self._card(model) for model in self._models]

    def _card(self, model: ServedModel) -> ModelCard:
        base = self._models.base
        return ModelCard(
            name=model.name,
            base=base.name,
            source=model.source,
            version=model.version,
            base_version=base.version,
            created=model.created,
            max_model_len=self._max_model_len,
            adapter_name=model.adapter_name,
            max_token_bytes=model.tokenizer.max_token_bytes,
        )


def worker_facts(engine: Engine) -> WorkerFacts:
    """Returns the facts that a worker publishes about itself with every heartbeat."""
    return WorkerFacts(engine.max_model_len, engine.dtype, *engine.adapters.counts)


def queues_of(base: str, adapter_names: Collection[str], arguments: Sequence[str]) -> list[str]:
    """Returns the queue names for the arguments of `rq worker`, which are model names.

    Raises:
        ConfigurationError: an argument names no model of this worker.
    """
    queues = {base: queue_name(base, None)}
    queues |= {name: queue_name(base, name) for name in adapter_names}
    if list(arguments) == [ALL_QUEUES]:
        return list(queues.values())
    for argument in arguments:
        if argument not in queues:
            raise ConfigurationError(
                f"rq worker was given {argument!r}, which is no model of this worker: {', '.join(queues)}"
            )
    return [queues[argument] for argument in arguments]


def adapter_slots(queues: ServedQueues, adapters: Residency) -> AdapterSlots:
    """Returns the number of adapter slots, and the queues whose adapters are resident."""
    return AdapterSlots(adapters.num_slots, [queues.name_of(name) for name in adapters.resident])
