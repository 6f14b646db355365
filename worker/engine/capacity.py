"""The number of sequences that may run at once, which falls when memory is short."""

NUM_STEPS_TO_GROW = 1_000


class Capacity:
    """The configured number of sequences, lowered after a step was out of memory, then slowly raised again.

    It is raised again because the cause may have been one long prompt, or another process on the device.
    """

    def __init__(self, max_num_sequences: int) -> None:
        self._most = max_num_sequences
        self._num_good_steps = 0
        self.num_sequences = max_num_sequences
        """The number that may run now. Safe to read in any thread."""

    def shrink(self, num_running: int) -> None:
        """Lowers the number after a step was out of memory: to one below `num_running`, but at least 1."""
        self._num_good_steps = 0
        self.num_sequences = max(1, min(num_running, self.num_sequences) - 1)

    def count_step(self) -> None:
        """Counts a step that found its memory; after `NUM_STEPS_TO_GROW` of them, allows one more."""
        if self.num_sequences == self._most:
            return
        self._num_good_steps += 1
        if self._num_good_steps == NUM_STEPS_TO_GROW:
            self._num_good_steps = 0
            self.num_sequences += 1
