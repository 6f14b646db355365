import subprocess
import sys

import pytest
import torch
from torch import nn

from worker.model.kernels.onednn import bound_caches
from worker.model.kernels.products import can_pack

GROW = """
import ctypes, psutil
from worker.model.kernels import onednn

onednn._NUM_ENTRIES = 16
onednn.bound_caches()

import torch
from torch import nn
from worker.model.kernels.products import FusedLinears, fuse

linear = nn.Linear(64, 64, dtype=torch.bfloat16).requires_grad_(False)
fuse([linear], FusedLinears(0, ["linear"], False))

def num_bytes():
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss

linear(torch.zeros(1, 64, dtype=torch.bfloat16))
before = num_bytes()
for num_rows in range(1, 401):
    linear(torch.zeros(num_rows, 64, dtype=torch.bfloat16))
print(num_bytes() - before >> 20)
"""


def test_the_caches_of_onednn_are_bounded_unless_an_operator_chose_otherwise() -> None:
    environ = {"LRU_CACHE_CAPACITY": "9"}
    bound_caches(environ)
    assert environ == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "9"}


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc to give back what is free")
def test_products_of_ever_new_shapes_do_not_add_up_in_memory() -> None:
    if not can_pack(nn.Linear(1, 1, dtype=torch.bfloat16)):
        pytest.skip("no bfloat16 products of oneDNN here")
    grown = subprocess.run([sys.executable, "-c", GROW], check=True, stdout=subprocess.PIPE, timeout=100)
    # 6 MiB; with one of the two caches as large as by default over 100.
    assert int(grown.stdout) < 50
