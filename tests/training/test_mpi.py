"""Two processes under mpiexec: the result of one, in the same bytes in every run.

They need mpi4py and an MPI (`pip install mpi4py mpich`, for instance); run with -m mpi.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import minilora
from minilora.formats import save_base
from minilora.formats.tensors import read_tensors
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.training.checkpoint import CHECKPOINT

pytestmark = pytest.mark.mpi

CONFIG = GPTConfig(vocab_size=256, n_positions=32, n_embd=16, n_layer=2, n_head=2)
STEPS = 12
PATIENCE = 300  # seconds; a machine may be slow, but no rank may wait forever
PROGRAM = "import sys; from minilora.cli import main; sys.exit(main(sys.argv[1:]))"
# Open MPI wants to be told that root may use it, and that there may be fewer cores than ranks.
ENVIRONMENT = os.environ | {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PYTHONPATH": str(Path(minilora.__path__[0]).parent),
    "PYTHONIOENCODING": "utf-8",
}


def start(size, *words, program=PROGRAM):
    """Start so many processes of a program in a new process group, or one without MPI."""
    command = [sys.executable, "-c", program, *map(str, words)]
    if size > 1:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        mpiexec = shutil.which("mpiexec", path=path)
        assert mpiexec, "there is no mpiexec; `pip install mpich` brings one"
        command = [mpiexec, "-n", str(size), *command]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, text=True, encoding="utf-8",
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def done(size, *words, **options):
    status, out, err = finish(start(size, *words, **options))
    assert status == 0, err
    return out, err


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of a tiny base and a text."""
    folder = tmp_path_factory.mktemp("files")
    weights = gpt_init(CONFIG, seed=0)
    weights["wte"] *= 10.0
    save_base(folder / "base", weights, CONFIG)
    lines = [f"Line {i} of a text, {i * i} squared.\n" for i in range(200)]
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def adapt(files):
    """A run with all that could go differently: dropout, an uneven share, short sequences."""
    return [
        *("adapt", files / "text.txt", "--base", files / "base", "--steps", STEPS, "--batch", 5),
        *("--context", 32, "--short-context", 16, "--short-steps", 3, "--dropout", 0.1),
        *("--rank", 2, "--warmup", 2, "--threads", 1, "--eval-every", 6, "--eval-tokens", 300),
        *("--checkpoint-every", 4, "--log-every", 1),
    ]


@pytest.fixture(scope="module")
def whole(adapt, files):
    """What two processes make of it, never stopped: folder, standard output, standard error."""
    out, err = done(2, *adapt, "--out", files / "whole", "--json", files / "whole.json")
    return files / "whole", out, err


def result_of(folder):
    """Its files but for the record, which has times, and the card, which has the folder's name."""
    told = ("training.json", "README.md")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in told}


def assert_close(folder, expected, atol):
    actual, expected = (
        read_tensors(next(path for path in f.iterdir() if path.suffix == ".safetensors"))[0]
        for f in (folder, expected)
    )
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=atol, err_msg=name)


def test_two_processes_compute_what_one_does(adapt, files, whole):
    done(1, *adapt, "--out", files / "one", "--json", files / "one.json")
    assert_close(files / "whole", files / "one", 1e-5)
    one, two = (
        json.loads((files / name).read_text(encoding="utf-8"))
        for name in ("one.json", "whole.json")
    )
    for name in ("loss_before", "loss_after"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)
    assert two["trainable_parameters"] == one["trainable_parameters"]
    assert two["processes"] == 2
    assert two["allreduce_bytes"] == 4 * one["trainable_parameters"]
    assert two["allreduce_bytes_full"] == 4 * one["base_parameters"]
    curves = [
        json.loads((files / name / "training.json").read_text(encoding="utf-8"))["history"]
        for name in ("one", "whole")
    ]
    for curve in ("train", "held_out"):
        np.testing.assert_allclose(curves[1][curve], curves[0][curve], rtol=1e-5)


def test_pretraining_is_shared_too(files):
    command = [
        *("pretrain", files / "text.txt", "--layers", 1, "--width", 16, "--heads", 2),
        *("--steps", 4, "--batch", 4, "--context", 16, "--short-steps", 0, "--warmup", 1),
        *("--threads", 1, "--eval-tokens", 200),
    ]
    for size in (1, 2):
        done(size, *command, "--out", files / f"base of {size}")
    assert_close(files / "base of 2", files / "base of 1", 1e-4)


def test_every_run_of_two_processes_gives_the_same_bytes(adapt, files, whole):
    done(2, *adapt, "--out", files / "again")
    assert result_of(files / "again") == result_of(files / "whole")


def test_the_first_speaks_for_both(whole):
    _, out, err = whole
    assert [line.split(",")[0] for line in err.splitlines()] == [
        f"adapt: step {step}/{STEPS}" for step in range(1, STEPS + 1)
    ]
    for name in ("loss after", "processes", "allreduce bytes full", "saved in"):
        assert sum(line.startswith(name) for line in out.splitlines()) == 1, out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups")
def test_killed_and_resumed_it_ends_in_the_same_bytes(adapt, files, whole, tmp_path):
    process = start(2, *adapt, "--out", tmp_path / "out")
    for _ in range(6):
        process.stderr.readline()
    os.killpg(process.pid, signal.SIGKILL)  # the ranks see their launcher go
    process.communicate(timeout=PATIENCE)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == [CHECKPOINT]
    status, _, err = finish(start(1, *adapt, "--out", tmp_path / "out", "--resume"))
    assert status == 2
    assert "processes 2, but this one has 1" in err
    done(2, *adapt, "--out", tmp_path / "out", "--resume")
    assert result_of(tmp_path / "out") == result_of(files / "whole")


# A program whose second rank does something at the draw of its fifth batch.
AT_STEP_5 = """
import os, signal, sys
from minilora import data
from minilora.training import ranks
real, steps = data.draw_batch, iter(range(1, 1000))
def draw_batch(*args, **kwargs):
    if (ranks.launched()[0], next(steps)) == (1, 5):
        {action}
    return real(*args, **kwargs)
data.draw_batch = draw_batch
from minilora.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_on_one_rank_stops_both_after_the_same_step(adapt, files, whole, tmp_path):
    program = AT_STEP_5.format(action="signal.raise_signal(signal.SIGINT)")
    status, _, err = finish(start(2, *adapt, "--out", tmp_path / "out", program=program))
    assert status == 130, err
    assert err.count("minilora: stopped at step 5; its state is saved") == 1, err
    assert read_tensors(tmp_path / "out" / CHECKPOINT)[1]["step"] == "5"
    done(2, *adapt, "--out", tmp_path / "out", "--resume")
    assert result_of(tmp_path / "out") == result_of(files / "whole")


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("raise MemoryError('no room')", "rank 1: minilora: not enough memory: no room"),
        ("raise KeyError('a bug')", "KeyError: 'a bug'"),
        ("os._exit(9)", ""),
    ],
)
def test_what_ends_one_rank_ends_both(adapt, tmp_path, action, message):
    program = AT_STEP_5.format(action=action)
    status, _, err = finish(start(2, *adapt, "--out", tmp_path / "out", program=program))
    assert status != 0
    assert "step 4/" in err
    assert "step 5/" not in err
    assert err.count(message) == 1 or not message, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapt", "no such text"], "cannot read no such text"),
        (["adapt", "--frobnicate"], "see minilora adapt --help"),
        (["gradcheck"], "2 processes were started, but only adapt and pretrain"),
    ],
)
def test_an_error_of_both_is_told_once(words, message, tmp_path):
    status, _, err = finish(start(2, *words, *(["--out", tmp_path] if "adapt" in words else [])))
    assert status == 2, err
    assert err.count("minilora: ") == err.count(message) == 1, err


SUMS = """
import os
import numpy as np
from threadpoolctl import threadpool_info
from minilora.training.ranks import find_ranks
from minilora.workers import cores
ranks = find_ranks()
leaves = [np.float32(1.5), {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}, {}]
kept = leaves[1]["x"].copy()
total = ranks.sum(leaves)
assert total[0] == 3.0 and total[0].dtype == np.float32 and total[2] == {}, total
np.testing.assert_array_equal(total[1]["x"], 2 * kept)
np.testing.assert_array_equal(leaves[1]["x"], kept)
assert ranks.sum([np.full(3, 1e300)])[0].tolist() == [2e300] * 3
assert ranks.gather(ranks.rank) == [0, 1]
assert ranks.of_first(lambda: ("made by", ranks.rank)) == ("made by", 0)
assert ranks.any(ranks.rank == 1) and not ranks.any(False)
together = set().union(*ranks.gather(os.sched_getaffinity(0))) if hasattr(
    os, "sched_getaffinity") else range(cores())
assert ranks.threads() == max(1, len(together) // 2), ranks.threads()
for library in threadpool_info():
    assert library["user_api"] != "blas" or library["num_threads"] <= ranks.threads(), library
agreed = ranks.gather(f"rank {ranks.rank} agrees")
if ranks.rank == 0:  # two at a time would print into one another
    print(*agreed, sep="\\n")
"""


def test_sums_and_messages_between_two_processes():
    out, _ = done(2, program=SUMS)
    assert out.splitlines() == ["rank 0 agrees", "rank 1 agrees"]
