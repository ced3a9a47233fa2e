"""The allocator keeps what a stream of chunks frees."""

import subprocess
import sys

CHURN = """
import resource
from ebbflow.common.allocator import keep_chunks

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(200):
        first = bytearray(1 << 20)
        second = bytes(first)
        del first, second
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if {keep}:
    assert keep_chunks()
faults()
print(faults())
"""


def test_chunks_cost_no_page_faults() -> None:
    faults = [
        int(subprocess.run([sys.executable, "-c", CHURN.format(keep=keep)], check=True, capture_output=True).stdout)
        for keep in (False, True)
    ]
    assert faults[1] < faults[0] / 10
