"""Leaks: adapters that come and go leave no tensor, block, slot or object more than before."""

import gc
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.messages import SamplingParams
from shared.settings import WorkerSettings
from tests.streams import make_request
from tests.tiny_models import build_adapter, build_model
from worker.model.adapter_files import load_adapter
from worker.model.startup import load_model_runner
from worker.serving.faults import Faults
from worker.serving.service import build_engine

torch.set_num_threads(1)

READ_LIMIT_S = 10
TABLE_ROW_BYTES, NUM_LAYERS = 16, 15
"""Sizes of the tiny model: together far less than the smallest adapter."""
KINDS: tuple[dict[str, Any], ...] = (
    {"rank": 4},
    {"rank": 8, "targets": "all-linear"},
    {"rank": 4, "targets": ["o_proj"], "layers_to_transform": [1]},
    {"rank": 16},
    {"rank": 8, "targets": ["down_proj", "lm_head"]},
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        f"a{n}": build_adapter(folder / f"a{n}", model_folder, seed=n, **kind) for n, kind in enumerate(KINDS)
    }


def count_tensors() -> tuple[int, int]:
    """The number of live tensors, and their bytes."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return len(tensors), sum(tensor.nbytes for tensor in tensors)


class Service:
    """An engine with room for two adapters on the device and one in host memory, and its loop."""

    def __init__(self, model_folder: Path, adapters: Mapping[str, Path]) -> None:
        settings = WorkerSettings.load(
            model=str(model_folder),
            adapters=" ".join(f"{name}={folder}" for name, folder in adapters.items()),
            device="cpu",
            max_batch_size=3,
            max_resident_adapters=2,
            max_cached_adapter_bytes=12_000,
            compile="kernels",
        )
        self.runner = load_model_runner(settings)
        self.cache = self.runner.adapter_cache
        self.engine = build_engine(self.runner, settings, Faults())
        self._was_read = threading.Event()
        self.engine.call_when_ready(self._was_read.set)

    def add(self, request_id: str, adapter_name: str) -> None:
        request = make_request(
            adapter_name, request_id=request_id, sampling=SamplingParams(temperature=0, max_tokens=3)
        )
        assert self.engine.add_request(request, self.engine.encode(request)) == []

    def finish(self, adapter_names: Sequence[str]) -> None:
        """Runs a request of each, all at once, and gives the first one up half-way."""
        for name in adapter_names:
            self.add(f"of-{name}", name)
        num_ended, first = 0, f"of-{adapter_names[0]}"
        while num_ended < len(adapter_names):
            appends = self.engine.settle_adapters()
            appends += self.engine.step()
            if any(append.request_id == first and not append.event.is_terminal for append in appends):
                appends += self.engine.abort_request(first)
            if self.engine.is_stalled:
                assert self._was_read.wait(READ_LIMIT_S)
                self._was_read.clear()
            assert not any(append.event.error for append in appends)
            num_ended += sum(append.event.is_terminal for append in appends)


def test_adapters_that_come_and_go_leave_no_tensor_block_or_slot(
    model_folder: Path, adapters: Mapping[str, Path]
) -> None:
    service = Service(model_folder, adapters)
    names = list(adapters)

    def rounds(count: int) -> tuple[int, int]:
        for number in range(count):
            turned = names[number % len(names) :] + names[: number % len(names)]
            service.finish(turned)
        # After these two, the slots hold the same adapters at the end of each call.
        service.finish(names[:1])
        service.finish(names[1:2])
        return count_tensors()

    (num_tensors, num_bytes), num_reads = rounds(5), service.cache.num_reads
    num_tensors_after, num_bytes_after = rounds(15)
    assert num_tensors_after == num_tensors
    # Which slot an adapter has depends on the order of reads; a layer's table has a row for each slot.
    assert abs(num_bytes_after - num_bytes) <= TABLE_ROW_BYTES * NUM_LAYERS
    assert service.cache.num_reads > num_reads + 30, "they stayed where they were: nothing was tested"
    assert service.engine.remains == "0 requests, 0 cache blocks in use"
    assert sorted(service.cache.resident) == names[:2]
    assert {service.cache.slot(name) for name in names[:2]} == {0, 1}


@pytest.mark.parametrize("name", ["a0", "a1"])
def test_reading_an_adapter_again_and_again_keeps_no_object(
    name: str, model_folder: Path, adapters: Mapping[str, Path]
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    num_tensors = 2 * len(load_adapter(name, str(adapters[name]), model).layers)

    def num_objects_after(num_reads: int) -> int:
        for _ in range(num_reads):
            load_adapter(name, str(adapters[name]), model)
        gc.collect()
        return sys.getallocatedblocks()

    before = num_objects_after(20)
    # Python itself keeps some objects more or fewer: less than half an object per tensor is no leak.
    assert num_objects_after(50) - before < 50 * num_tensors / 2
