"""What the C library keeps of freed memory, and gives back."""

import json
import subprocess
import sys

import pytest

MEASURE = """
import json, torch
from pathlib import Path
from redundancy_trace.heap import give_back_freed_memory, keep_freed_memory

def resident():
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssAnon:"))
    return int(line.split()[1]) // 1024

keep_freed_memory()
torch.ones(1)
before = resident()
some = [torch.ones(10 * 2**20) for _ in range(5)]  # 40 MiB each
pin = torch.ones(1000)  # what stays at the end of the heap
del some
freed = resident()
give_back_freed_memory()
print(json.dumps([freed - before, resident() - before]))
"""
THREADS = """
import threading
def work():
    some = [torch.ones(2**20) for _ in range(5)]  # 4 MiB each
    del some
before = resident()
for _ in range(8):
    together = [threading.Thread(target=work) for _ in range(4)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
give_back_freed_memory()
print(json.dumps(resident() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept_until_it_is_given_back():
    told = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True).stdout
    kept, left = json.loads(told)
    assert kept > 150, "MiB, of 200"
    assert left < 20


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize(("let_go", "given_back"), [(5, True), (0, False)])
def test_the_heap_is_trimmed_where_much_is_let_go(let_go, given_back):
    """What else is free stays for the next batch, unless weights that lay between go."""
    free = f"""
from redundancy_trace.heap import letting_go
weights = [torch.ones(2**20) for _ in range({let_go})]  # 4 MiB each
some = [torch.ones(10 * 2**20) for _ in range(5)]
pin = torch.ones(1000)
before = resident()
del some
with letting_go():
    weights.clear()
print(json.dumps(before - resident()))
"""
    told = subprocess.run([sys.executable, "-c", MEASURE + free], capture_output=True, text=True, check=True).stdout
    gone = json.loads(told.splitlines()[-1])
    assert gone > 200 if given_back else gone < 20, "MiB, of 200 and 20"


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_what_threads_freed_is_given_back_too():
    """A run has a thread of its own read each checkpoint's layers: memory would grow with their number."""
    told = subprocess.run([sys.executable, "-c", MEASURE + THREADS], capture_output=True, text=True, check=True).stdout
    assert json.loads(told.splitlines()[-1]) < 10, "MiB"


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_what_the_environment_sets_stays():
    command = f"import os; os.environ['MALLOC_TRIM_THRESHOLD_'] = '131072'\n{MEASURE}"
    environment = {"MALLOC_TRIM_THRESHOLD_": "131072"}
    told = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout)[0] < 20
