"""The messages of the registry: what each model is, and what each worker says about itself."""

import msgspec

from shared.messages import Message, weights_version


class ModelCard(Message, frozen=True, omit_defaults=False):
    """The registry's entry for a base model or an adapter."""

    name: str
    base: str
    source: str
    """The configured folder or Hugging Face id."""
    version: str
    """SHA-256 (hex) of the weight files."""
    created: int
    """Unix time in seconds."""
    max_model_len: int
    adapter_name: str | None = None
    """None for the base model itself."""
    base_version: str = ""
    """The version of the base that this model belongs to; empty if an earlier release wrote the card."""
    max_token_bytes: int = 0
    """Maximum number of bytes (UTF-8) of user messages that a token stands for; 0 if there is no bound."""

    @property
    def weights_version(self) -> str:
        """The version of the weights that answer requests for this model; empty if unknown."""
        if self.adapter_name is None:
            return self.version
        return weights_version(self.base_version, self.version) if self.base_version else ""


class WorkerFacts(Message, frozen=True, omit_defaults=False):
    """Facts that a serving worker writes about itself to Redis with every heartbeat."""

    max_model_len: int
    dtype: str = ""
    """The number type of the base's weights, such as `bfloat16`."""
    num_adapters: int = 0
    num_resident: int = 0
    """Number of adapters in slots on the device."""
    num_resident_bytes: int = 0
    num_slots: int = 0
    num_cached: int = 0
    """Number of adapters in host memory; some of them are resident, too."""
    num_cached_bytes: int = 0
    num_on_disk: int = 0
    """Number of adapters that are neither in a slot nor in host memory."""
    num_reads: int = 0
    """Number of times that an adapter was read from disk since the worker serves."""


decode_card = msgspec.json.Decoder(ModelCard).decode
decode_facts = msgspec.json.Decoder(WorkerFacts).decode
