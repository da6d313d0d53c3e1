"""Freed memory is used again by the next arrays, where the C library can be told to do so."""

import platform
import subprocess
import sys

import pytest

# Faults of pages while a thread makes and frees 128 MB of arrays ten times, in its own process.
PROGRAM = """
import resource, sys, threading
import numpy as np
from minilora.workers import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def make_and_free():
    [np.ones(2**18) for _ in range(64)]

def work():
    make_and_free()
    before = faults()
    for _ in range(10):
        make_and_free()
    print(faults() - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_a_thread_s_arrays_are_not_zeroed_anew_by_the_system():
    kept, given_back = (
        int(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, word], check=True, capture_output=True
            ).stdout
        )
        for word in ("kept", "given back")
    )
    assert kept < 500, f"{kept} page faults"
    assert given_back > 5000, f"{given_back} without the call: the test sees nothing"
