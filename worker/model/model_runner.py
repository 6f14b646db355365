"""The `Model` of the engine: runs a batch on the device, and samples the next tokens of its sequences."""

import torch

from worker.engine.adapter_cache import AdapterCache
from worker.engine.sequence import Batch, OutOfDeviceMemory, Sampled, Sequence
from worker.engine.served_models import ServedModels
from worker.engine.tokenizer_port import Tokenizer
from worker.model.adapter_store import AdapterStore
from worker.model.batch_forward import BatchForward
from worker.model.file_watch import FileWatch
from worker.model.forward import Forward
from worker.model.grammar import Grammars
from worker.model.logprobs import with_logprobs
from worker.model.lora import SlotWeights
from worker.model.prepared import PreparedModel
from worker.model.sampler import SamplingRow, sample


class ModelRunner:
    """A loaded model with KV cache and adapters, created by `worker.model.startup`. Not thread-safe."""

    def __init__(
        self,
        prepared: PreparedModel,
        forward: Forward,
        served: ServedModels,
        adapters: AdapterStore,
        adapter_cache: AdapterCache[SlotWeights],
        watch: FileWatch,
    ) -> None:
        self.watch = watch
        self.served = served
        self.adapters = adapters
        self.adapter_cache = adapter_cache
        self.max_model_len = prepared.max_model_len
        self.dtype = str(prepared.model.dtype).removeprefix("torch.")
        self.vocab_size = int(prepared.model.get_input_embeddings().num_embeddings)
        self.num_blocks = prepared.state.kv_cache.num_blocks
        self.block_size = prepared.state.kv_cache.block_size
        self._forward = forward
        self._grammars = Grammars(served, self.vocab_size)
        self._run_batch = BatchForward(
            forward, prepared.state, prepared.lora, prepared.device, adapter_cache.slot
        )

    @property
    def forward_state(self) -> str:
        """The state of the forward pass: `eager`, `compiling` (eager in the meantime) or `compiled`."""
        return self._forward.state

    def compile_grammar(self, grammar: str, tokenizer: Tokenizer) -> object:
        """Compiles a grammar ahead of its first use; see `Model`."""
        return self._grammars.compile(grammar, tokenizer)

    def wait(self) -> None:
        """Waits until nothing is being compiled."""
        self._forward.wait()

    def close(self) -> None:
        """Stops compiling, and stops watching the model's files."""
        self.watch.close()
        self._forward.close()

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Sampled]:
        """Runs one forward pass; returns the next token of each sequence that `samples`, in batch order.

        A sequence whose logits are not finite gets an error. The block tables must have blocks for all
        scheduled tokens. After the call, the keys and values of these tokens are in the cache, and the caller
        must update `num_computed_tokens`.

        Raises:
            AdapterError: a sequence names an adapter that isn't resident.
            OutOfDeviceMemory: the step did not fit into the device's memory.
        """
        if not batch:
            return []
        seqs = [item.seq for item in batch if item.samples]
        rows = [sampling_row(seq) for seq in seqs]
        try:
            logits = self._run_batch(batch)
            # The masks are computed while a GPU still runs the forward pass.
            masks = self._grammars.masks(seqs)
            sampled = with_logprobs(sample(logits, rows, masks), logits, rows)
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(str(error)) from error
        if masks is not None:
            sampled = [masks.errors.get(row, token) for row, token in enumerate(sampled)]
        return sampled


def sampling_row(seq: Sequence) -> SamplingRow:
    """Returns the inputs for sampling a sequence's next token."""
    return SamplingRow(seq.sampling, seq.index, seq.num_output_tokens, seq.logit_adjustments)
