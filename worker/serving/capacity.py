"""How many sequences a worker holds at once, where memory may be short."""

NUM_STEPS_TO_GROW = 1_000


class Capacity:
    """At most as many sequences as configured, fewer after a step was out of memory, then slowly more again.

    What did not fit may have been one long prompt, or another process on the device.
    """

    def __init__(self, max_num_sequences: int) -> None:
        self._most = max_num_sequences
        self._num_good_steps = 0
        self.num_sequences = max_num_sequences
        """How many may be held now. Safe to read in any thread."""

    def shrink(self, num_held: int) -> None:
        """A step was out of memory while so many were held: one fewer from now on, but at least one."""
        self._num_good_steps = 0
        self.num_sequences = max(1, min(num_held, self.num_sequences) - 1)

    def count_step(self) -> None:
        """A step found the memory it needed; after `NUM_STEPS_TO_GROW` of them one more is held."""
        if self.num_sequences == self._most:
            return
        self._num_good_steps += 1
        if self._num_good_steps == NUM_STEPS_TO_GROW:
            self._num_good_steps = 0
            self.num_sequences += 1
