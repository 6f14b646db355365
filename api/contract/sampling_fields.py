"""Fields that say how many sequences to generate, and from which distribution to sample their tokens."""

from typing import Annotated

from pydantic import Field

from api.contract.fields import INTEGRAL
from api.contract.strict import StrictModel
from shared.messages import MAX_NUM_CHOICES


class SamplingFields(StrictModel):
    """Fields that every route that generates has in common."""

    n: Annotated[int, Field(ge=1, le=MAX_NUM_CHOICES), INTEGRAL] | None = None
    """Number of answers to the prompt, 1 to 128; each is a choice with its own `index`. Default: 1."""

    @property
    def num_choices(self) -> int:
        """The number of answers to each prompt."""
        return self.n or 1
