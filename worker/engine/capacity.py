"""The maximum number of sequences that run at once, which drops if the device runs out of memory."""

NUM_STEPS_TO_GROW = 1_000


class Capacity:
    """The maximum number of sequences: the configured number, or less after a step ran out of memory.

    The maximum slowly rises again, because one long prompt or another process may have caused the shortage.
    """

    def __init__(self, max_num_sequences: int) -> None:
        self._most = max_num_sequences
        self._num_good_steps = 0
        self.num_sequences = max_num_sequences
        """The number of sequences that may run now. Safe to read from any thread."""

    def shrink(self, num_running: int) -> None:
        """Lowers the maximum after a step ran out of memory: to `num_running` - 1, but at least 1."""
        self._num_good_steps = 0
        self.num_sequences = max(1, min(num_running, self.num_sequences) - 1)

    def count_step(self) -> None:
        """Counts a step that had enough memory; `NUM_STEPS_TO_GROW` such steps raise the maximum by 1."""
        if self.num_sequences == self._most:
            return
        self._num_good_steps += 1
        if self._num_good_steps == NUM_STEPS_TO_GROW:
            self._num_good_steps = 0
            self.num_sequences += 1
