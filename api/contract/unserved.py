"""OpenAI's fields of a chat completion that Lorelay refuses, or accepts without effect."""

from typing import Annotated, Any, Literal

from pydantic import StringConstraints

from api.contract.fields import IGNORED, Only
from api.contract.strict import BOUNDED, StrictModel, at_most

Object = Annotated[dict[str, Any], BOUNDED]
Label = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class CacheOptions(StrictModel):
    """OpenAI's options of its prompt cache."""

    mode: Annotated[Literal["implicit", "explicit"] | None, IGNORED] = None
    """Choice of the parts after which OpenAI's cache may begin."""
    ttl: Annotated[Label | None, IGNORED] = None
    """Minimum life of a cache entry, such as `30m`."""


class LabelFields(StrictModel):
    """Labels and hints that have no effect on the answer."""

    user: Annotated[str | None, IGNORED] = None
    """Id of the end user."""
    safety_identifier: Annotated[Label | None, IGNORED] = None
    """Id of the end user, for OpenAI's safety checks."""
    prompt_cache_key: Annotated[str | None, IGNORED] = None
    """Hint for OpenAI's routing; Lorelay's prefix cache needs none."""
    prompt_cache_retention: Annotated[Literal["in_memory", "in-memory", "24h"] | None, IGNORED] = None
    """Life of entries in OpenAI's prompt cache; Lorelay keeps prefixes while there is memory for them."""
    prompt_cache_options: Annotated[CacheOptions | None, IGNORED] = None
    """Options of OpenAI's prompt cache."""
    metadata: Annotated[Annotated[dict[Label, MetadataValue], at_most(16)] | None, IGNORED] = None
    """Up to 16 pairs of texts."""
    verbosity: Annotated[Literal["low", "medium", "high"] | None, IGNORED] = None
    """Hint for OpenAI's models; for others, the prompt says how long an answer should be."""


class UnservedOpenAIFields(StrictModel):
    """OpenAI's fields that Lorelay refuses, unless a value means the same as leaving the field out."""

    modalities: Annotated[list[str] | None, BOUNDED, Only(["text"])] = None
    """Kinds of output."""
    audio: Annotated[Object | None, Only()] = None
    """Voice and format of a spoken answer."""
    prediction: Annotated[Object | None, Only()] = None
    """Text that the answer probably repeats."""
    web_search_options: Annotated[Object | None, Only()] = None
    """Options of a search on the web."""
    moderation: Annotated[Object | None, Only()] = None
    """Check of prompt and answer by another model."""
    store: Annotated[bool | None, Only(False)] = None
    """Storage of the answer."""
    service_tier: Annotated[
        Literal["auto", "default", "flex", "scale", "priority", "fast"] | None, Only("auto", "default")
    ] = None
    """Class of service, by which OpenAI bills."""
