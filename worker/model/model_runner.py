"""The only code that touches the device: one forward pass over a batch, and the tokens sampled from it."""

import contextlib
import logging
import time
from collections.abc import Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from shared.errors import AdapterError, ConfigurationError
from shared.logs import fields
from shared.messages import ForwardState
from shared.settings import AdapterSource, WorkerSettings
from worker.engine.adapter_cache import AdapterCache
from worker.engine.sequence import Batch, OutOfDeviceMemory, Sampled, ScheduledSequence, Sequence
from worker.engine.served_models import ServedModel, ServedModels
from worker.model import compiled, loading
from worker.model.adapter_store import AdapterStore
from worker.model.attention import AttentionState, QueryGroup, StepLayout, attach
from worker.model.compiled import CompiledForward, Forward
from worker.model.kernels import native
from worker.model.kernels.native import OperatorState
from worker.model.kernels.packed import replace_product
from worker.model.kv_cache import PagedKVCache
from worker.model.lora import LoraStack, SlotWeights
from worker.model.sampler import SamplingRow, sample
from worker.model.self_check import SelfCheck, num_blocks_needed
from worker.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_CPU_CACHE_BYTES = 2 << 30
"""What one of several workers on a machine may take without being asked."""
NUM_BATCHES_TO_KEEP = 3
"""So many full batches of sequences that ended may wait in the cache for others that begin alike."""
DEFAULT_ADAPTER_MEMORY_SHARE = 0.1
"""Of the memory that is free at the start: of the device's for slots, of the host's for others."""


class ModelRunner:
    """A loaded model with its KV cache and adapters. Not thread-safe."""

    def __init__(
        self, model: Any, served: ServedModels, settings: WorkerSettings, *, has_kernels: bool = False
    ) -> None:
        """Checks the model and allocates its cache; use `load`.

        Raises:
            ConfigurationError: the model can't be served, or its cache doesn't fit.
        """
        self.served = served
        self.block_size = settings.block_size
        self._model = model
        self._run_model: Forward = self._run_eagerly
        self._lora = LoraStack({}, {}, model.dtype)
        self._state = AttentionState(PagedKVCache(num_blocks_needed(self.block_size), self.block_size))
        attach(model, self._state)
        self_check = SelfCheck(model, self._state, self.block_size, settings.model)
        calls = self_check.run(self._forward)
        operators = native.new_state() if has_kernels else None
        token_layers, kept_layers = calls.select(model)
        self._lora = LoraStack(token_layers, kept_layers, model.dtype, operators)
        self._adapters = AdapterStore(model, settings.model, self._lora, served)
        if operators is not None:
            self._state.use(operators)
        self._products = calls.group(token_layers) + [[name] for name in kept_layers]
        self._replace_products(frozenset(kept_layers), operators)
        self_check.run_again(self._forward)
        self.max_model_len = loading.max_model_len(model.config, settings.session_len)
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        self._state.kv_cache.resize(self._affordable_blocks(settings))
        self._log_cache()
        self.adapter_cache = self._build_adapter_cache(settings)

    @classmethod
    def load(cls, settings: WorkerSettings) -> Self:
        """Loads the model and the adapters that `settings` name.

        Raises:
            ConfigurationError: names the setting and the reason.
        """
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        device = loading.find_device(settings.device)
        folder = loading.find_model(settings)
        tokenizer = Tokenizer.load(folder, trust_remote_code=settings.trust_remote_code)
        # A first build of the kernels takes some seconds: the model loads meanwhile.
        with ThreadPoolExecutor(1, "kernels") as executor:
            has_kernels = None if settings.compile == "off" else executor.submit(_make_kernels, device)
            model = loading.load_model(folder, settings, device)
        version, created = loading.model_version(folder), int(time.time())
        served = ServedModels(ServedModel(settings.base_name, version, settings.model, tokenizer, created))
        runner = cls(model, served, settings, has_kernels=bool(has_kernels and has_kernels.result()))
        runner._load_adapters(settings.adapters)
        if has_kernels and has_kernels.result() and settings.compile == "graph":
            runner._compile(folder, settings)
        return runner

    def _compile(self, folder: Path, settings: WorkerSettings) -> None:
        job = compiled.describe_job(
            folder, self._model, self._products, trust_remote_code=settings.trust_remote_code
        )
        self._run_model = CompiledForward(self._run_eagerly, self._model, job)

    @property
    def forward_state(self) -> str:
        """Whether the forward pass is `eager`, `compiled`, or eager and `compiling`."""
        return self._run_model.state if isinstance(self._run_model, CompiledForward) else ForwardState.EAGER

    def wait(self) -> None:
        """Returns when nothing goes on in the background any more."""
        if isinstance(self._run_model, CompiledForward):
            self._run_model.wait()

    def close(self) -> None:
        """Ends what goes on in the background."""
        if isinstance(self._run_model, CompiledForward):
            self._run_model.close()

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self._state.kv_cache.num_blocks

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Sampled]:
        """One forward pass; the next token of each sequence that `samples`, in batch order.

        A sequence whose logits are not finite gets an error. The cache then holds all scheduled tokens; their
        blocks must be in the block tables, and `num_computed_tokens` is the caller's to advance.

        Raises:
            AdapterError: a sequence names an adapter that isn't loaded.
            OutOfDeviceMemory: the step did not fit.
        """
        if not batch:
            return []
        try:
            logits = self._forward(batch)
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(str(error)) from error
        return sample(logits, [_sampling_row(item.seq) for item in batch if item.samples])

    @torch.inference_mode()
    def _forward(self, batch: Batch) -> Tensor:
        """Logits (num_sampling, vocab) of the last token of each sequence that samples."""
        device = self._model.device
        token_ids: list[int] = []
        positions: list[int] = []
        spans: list[tuple[int, int]] = []
        kept: list[int] = []
        for seq, num_tokens in ((item.seq, item.num_tokens) for item in batch):
            start, end = seq.num_computed_tokens, seq.num_computed_tokens + num_tokens
            token_ids += seq.token_ids[start:end]
            positions += range(start, end)
            spans.append((self._lora.slot(seq.adapter_name), num_tokens))
            if end == len(seq.token_ids):
                kept.append(len(token_ids) - 1)
        self._lora.set_rows(spans, kept)
        self._state.begin_step(lay_out(batch, self.block_size, device))
        return self._run_model(
            torch.tensor([token_ids], device=device),
            torch.tensor([positions], device=device),
            torch.tensor(kept, dtype=torch.long, device=device),
        )

    def _run_eagerly(self, token_ids: Tensor, positions: Tensor, kept: Tensor) -> Tensor:
        output = self._model(
            input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=kept
        )
        return output.logits[0]  # type: ignore[no-any-return]

    def _build_adapter_cache(self, settings: WorkerSettings) -> AdapterCache[SlotWeights]:
        return AdapterCache(
            self._adapters,
            ThreadPoolExecutor(1, "adapters"),
            num_slots=settings.max_resident_adapters or settings.max_batch_size,
            max_num_slot_bytes=None if settings.max_resident_adapters else _adapter_share(self._model.device),
            max_num_bytes=settings.max_cached_adapter_bytes or _adapter_share(torch.device("cpu")),
        )

    def _load_adapters(self, sources: Iterable[AdapterSource]) -> None:
        """Checks all adapters; keeps as many as there is room for."""
        try:
            for source in sources:
                self.adapter_cache.keep(source.name, self._adapters.register(source.name, source.path))
            self.adapter_cache.fill_slots()
        except AdapterError as error:
            raise ConfigurationError(f"LORELAY_ADAPTERS: {error.message}") from error
        if self.served.adapters:
            logger.info("adapters: %s", self.adapter_cache.summary, extra=fields("load_adapters"))

    def _replace_products(self, kept_layers: Container[str], operators: OperatorState | None) -> None:
        """Lets the Linears compute as fast as this machine can."""
        number = num_packed = 0
        for names in self._products:
            num_packed += replace_product(
                [self._model.get_submodule(name) for name in names],
                sees_kept_rows=names[0] in kept_layers,
                operators=operators,
                number=number,
            )
            number += len(names)
        layout = "packed for oneDNN" if num_packed else "plain weights"
        logger.info(
            "forward pass: %s, %s; %d Linears in %d products",
            self._model.dtype,
            layout,
            number,
            len(self._products),
            extra=fields("load_model"),
        )

    def _affordable_blocks(self, settings: WorkerSettings) -> int:
        """How many blocks the cache gets: what memory admits, at most what is of use.

        That is a full batch of the longest sequences, and with a prefix cache more for what others share.
        """
        device = self._model.device
        num_bytes = int(loading.num_free_bytes(device) * settings.cache_max_entry_count)
        limit = settings.cache_max_bytes or (DEFAULT_CPU_CACHE_BYTES if device.type == "cpu" else num_bytes)
        num_bytes = min(num_bytes, limit)
        per_sequence = -(-self.max_model_len // self.block_size)
        num_blocks = num_bytes // self._state.kv_cache.num_bytes_per_block
        if num_blocks < per_sequence:
            needed = per_sequence * self._state.kv_cache.num_bytes_per_block
            raise ConfigurationError(
                f"LORELAY_SESSION_LEN: the KV cache of one sequence of {self.max_model_len} tokens needs "
                f"{needed / 2**20:.1f} MiB and may take {num_bytes / 2**20:.1f}; set a shorter one, "
                "or give the cache more: LORELAY_CACHE_MAX_BYTES, LORELAY_CACHE_MAX_ENTRY_COUNT"
            )
        num_batches = 1 + NUM_BATCHES_TO_KEEP * settings.prefix_cache
        return min(num_blocks, num_batches * settings.max_batch_size * per_sequence)

    def _log_cache(self) -> None:
        cache = self._state.kv_cache
        num_tokens = cache.num_blocks * cache.block_size
        logger.info(
            "KV cache: %d tokens in %d MiB; room for %.1f sequences of %d tokens",
            num_tokens,
            cache.num_blocks * cache.num_bytes_per_block >> 20,
            num_tokens / self.max_model_len,
            self.max_model_len,
            extra=fields("allocate_cache"),
        )


def _sampling_row(seq: Sequence) -> SamplingRow:
    return SamplingRow(seq.sampling, seq.index, seq.num_output_tokens, seq.logit_wishes)


def _make_kernels(device: torch.device) -> bool:
    """`native.make_callable`, after a look at what earlier builds left."""
    with contextlib.suppress(OSError):  # no cache folder, as `make_callable` tells
        compiled.drop_cut_off(native.cache_folder())
    return native.make_callable(device)


def _adapter_share(device: torch.device) -> int:
    """Bytes that adapters may take there by default."""
    return int(loading.num_free_bytes(device) * DEFAULT_ADAPTER_MEMORY_SHARE)


def lay_out(batch: Batch, block_size: int, device: torch.device) -> StepLayout:
    """Where the tokens of a batch stand in the cache, and which of them attend together."""
    slots: list[int] = []
    decodes: list[tuple[int, ScheduledSequence]] = []
    chunks: list[tuple[int, ScheduledSequence]] = []
    for item in batch:
        seq, first_row = item.seq, len(slots)
        (decodes if item.num_tokens == 1 else chunks).append((first_row, item))
        for position in range(seq.num_computed_tokens, seq.num_computed_tokens + item.num_tokens):
            slots.append(seq.block_table[position // block_size] * block_size + position % block_size)
    return StepLayout(
        torch.tensor(slots, device=device),
        tuple(_group([chunk], block_size, device) for chunk in chunks),
        _group(decodes, block_size, device) if decodes else None,
    )


def _group(
    members: Iterable[tuple[int, ScheduledSequence]], block_size: int, device: torch.device
) -> QueryGroup:
    """The query group of (first row, item) pairs with equal `num_tokens`."""
    rows: list[int] = []
    positions: list[range] = []
    tables: list[list[int]] = []
    for first_row, item in members:
        start, end = item.seq.num_computed_tokens, item.seq.num_computed_tokens + item.num_tokens
        rows += range(first_row, first_row + item.num_tokens)
        positions.append(range(start, end))
        tables.append(item.seq.block_table[: -(-end // block_size)])
    longest = max(map(len, tables))
    padded = [table + table[:1] * (longest - len(table)) for table in tables]
    # Decodes come first in a step and a chunk is in one piece, so that this is a view and no copy.
    is_contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
    return QueryGroup(
        slice(rows[0], rows[0] + len(rows)) if is_contiguous else torch.tensor(rows, device=device),
        torch.tensor([list(entry) for entry in positions], device=device),
        torch.tensor(padded, device=device),
    )
