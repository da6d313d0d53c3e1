"""`minilora bench` at sizes that take no time: its processes, its figures and its errors."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minilora.bench import command, peft
from minilora.bench.case import PROMPT, Case
from minilora.bench.command import Process, bench
from minilora.bench.measure import TO_ANSWER, blas, peak_rss
from minilora.cli import main
from minilora.errors import MiniloraError
from minilora.gpt2 import GPTConfig
from minilora.llama import LinearScaling, Llama3Scaling, LlamaConfig

CONFIG = GPTConfig(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2)
MICRO = Case(CONFIG, batch=2, context=8, rank=2, steps=2)
LLAMA = LlamaConfig(11, 8, 12, 2, 4, 2, 16, rms_norm_eps=1e-5)
EVERY_MAP = ("q", "k", "v", "o", "gate", "up", "down", "embedding")
MICROS = {
    "GPT-2": MICRO,
    "Llama": replace(MICRO, config=LLAMA, targets=("q", "v")),
    "Llama, every map": replace(MICRO, config=LLAMA, targets=EVERY_MAP),
}
FIGURES = {
    "what": str,
    "method": str,
    "batch": int,
    "context": int,
    "rank": int,
    "targets": list,
    "device": str,
    "threads": int,
    "steps": int,
    "recompute": bool,
    "step_seconds_median": float,
    "step_seconds_minimum": float,
    "tokens_per_second": float,
    "floor_seconds": float,
    "floor_seconds_minimum": float,
    "floor_gflop": float,
    "step_to_floor": float,
    "peak_rss_bytes": int,
    "idle_rss_bytes": int,
    "page_faults": int,
    "import_seconds": float,
    "first_step_seconds": float,
    "blas": str,
    "blas_kernel": str,
    "blas_threads": int,
    "machine": str,
    "breakdown": list,
}


def check_figures(figures, parts=("linear_forward", "gelu_forward")):
    for name, kind in FIGURES.items():
        assert isinstance(figures[name], kind), name
        if kind in (int, float):
            assert figures[name] >= 0 if name == "page_faults" else figures[name] > 0, name
    assert figures["step_seconds_minimum"] <= figures["step_seconds_median"]
    assert figures["idle_rss_bytes"] <= figures["peak_rss_bytes"]
    assert figures["floor_seconds_minimum"] <= figures["floor_seconds"]
    for row in figures["breakdown"]:
        assert set(row) == {"operation", "calls", "seconds", "products_seconds"}
    names = [row["operation"] for row in figures["breakdown"]]
    assert {*parts, "all else, and waiting"} <= set(names)
    assert len(set(names)) == len(names)


def test_the_command_writes_its_figures(tmp_path, capsys):
    words = "bench --shape tiny --batch 2 --context 2 --rank 1 --targets q,v --threads 2 --steps 2"
    assert main([*words.split(), "--json", str(tmp_path / "x.json")]) == 0
    figures = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    check_figures(figures)
    assert figures["shape"] == "tiny"
    assert figures["targets"] == ["q", "v"]
    assert (figures["rank"], figures["threads"], figures["steps"]) == (1, 2, 2)
    assert figures["blas_threads"] == 1  # the threads share the batch instead
    out = capsys.readouterr().out
    assert "4 blocks of width 256, vocabulary 512: lora step, 2 × 2 tokens, rank 1 on q,v" in out
    for line in ("time  ", "floor  ", "time / floor", "tokens/s", "peak memory", "linear_backward"):
        assert line in out, line


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "full"},
        {"what": "evaluate"},
        {"what": "generate", "context": 4},
        {"threads": 1},
        {"recompute": True},
        {"batch": 1, "context": 1, "threads": 3, "steps": 1},
        *(
            {"config": LLAMA, "targets": ("q", "gate"), **changes}
            for changes in ({}, {"method": "full"}, {"what": "generate", "context": 4})
        ),
    ],
)
def test_everything_can_be_timed(changes):
    case = Case(**{**vars(MICRO), **changes})
    figures = bench(case)
    of_llama = "matmul_forward", "swiglu_forward", "rms_norm_forward"
    check_figures(figures, *([of_llama] if case.config is LLAMA else []))
    tokens = 4 if figures["what"] == "generate" else figures["batch"] * figures["context"]
    assert figures["tokens_per_second"] * figures["step_seconds_median"] == pytest.approx(tokens)
    if figures["threads"] == 1:
        assert figures["blas_threads"] == 1


@pytest.mark.parametrize(
    ("versus", "names"),
    [("1", {"threads: 2", "one thread"}), ("recompute", {"kept", "recomputed"})],
)
def test_two_ways_of_ours_take_turns(versus, names, capsys):
    figures = bench(MICRO, versus=versus, rounds=3)
    (key,) = (key for key in figures if key.startswith("versus"))
    ratios = figures[key].pop("ratios")
    assert set(figures[key]) == names
    for way in figures[key].values():
        assert len(way["turns"]) == 3
        assert way["blas_threads"] == 1
    assert ratios["step_seconds"] > 0 and ratios["peak_rss_bytes"] > 0
    assert "times the time of" in capsys.readouterr().out


@pytest.mark.oracle
@pytest.mark.parametrize(
    "changes",
    [{}, {"method": "full"}, {"what": "evaluate"}, {"what": "generate", "context": 4},
     {"targets": ("qkv", "o", "up", "down", "embedding")},
     {"config": LLAMA, "targets": ("q", "v")}, {"config": LLAMA, "method": "full"},
     {"config": LLAMA, "what": "generate", "context": 4}],
)  # fmt: skip
def test_peft_takes_turns_with_ours(changes):
    pytest.importorskip("peft")
    figures = bench(Case(**{**vars(MICRO), **changes}), versus="peft", rounds=1)["versus_peft"]
    ratios = figures.pop("ratios")
    assert list(figures) == ["minilora", "peft, sdpa", "peft, eager", "products", "products, torch"]
    ours, sdpa, eager, products, in_torch = (way["turns"][0] for way in figures.values())
    assert ratios["step_seconds"] == pytest.approx(ours / min(sdpa, eager))
    assert ratios["step_to_products"] == pytest.approx(ours / products)
    assert ratios["products"] == pytest.approx(products / in_torch)
    assert ratios["products_to_step"] == pytest.approx(in_torch / min(sdpa, eager))
    for name, key in (("peak_rss_bytes",) * 2, ("start_seconds",) * 2):
        best = min(figures[f"peft, {way}"][key] for way in peft.ATTENTIONS)
        assert ratios[name] == pytest.approx(figures["minilora"][key] / best)


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("micro", MICROS.values(), ids=MICROS)
def test_the_products_in_torch_are_those_of_the_step(micro, method):
    pytest.importorskip("torch")
    from minilora.bench import budget

    case = replace(micro, method=method)
    lora_config = case.lora_config if method == "lora" else None
    products = peft.products_in_torch(case)
    assert all(out.shape == (a @ b).shape for a, b, out in products)
    assert case.tokens in {len(a) for a, _, _ in products}  # all rows, whatever the threads
    flops = sum(2 * out.numel() * a.shape[-1] for a, _, out in products)
    assert flops == budget.flops(budget.Step(case.config, lora_config, 2, 8)).total


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("micro", MICROS.values(), ids=MICROS)
def test_peft_trains_as_many_numbers(micro):
    pytest.importorskip("peft")
    from minilora.bench import budget

    model = peft.make_model(micro, "eager")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == budget.Step(micro.config, micro.lora_config, 2, 8).trainable_parameters
    full = peft.make_model(replace(micro, method="full"), "eager")
    count = sum(p.numel() for p in full.parameters() if p.requires_grad)
    assert count == budget.base_parameters(micro.config)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--batch 0", "batch 0 is too small; the minimum is 1"),
        ("--steps 0", "steps 0 is too small; the minimum is 1"),
        (f"--batch {10**400}", "0 is too large; the maximum is 2,147,483,647"),
        ("--rounds 0 --versus 1", "rounds 0 is too small; the minimum is 1"),
        ("--rank -1", "rank -1 is too small; the minimum is 1"),
        ("--context 1025", "context 1025 exceeds the model's context of 1024"),
        ("--context 1024 --what generate", "context 1024 after a prompt of 8 tokens exceeds"),
        ("--targets nowhere", "unknown target 'nowhere'"),
        ("--rank 257", "minilora: --rank 257 is above the smaller side of blocks.0.attn.qkv"),
        ("--shape huge", "not 'huge'"),
        ("--device gpu", "--device 'gpu' is not one of cpu, cuda, auto"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(words, sentence, capsys):
    assert main(["bench", *words.split()]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1 and "Traceback" not in err


def test_a_missing_oracle_is_named(monkeypatch, capsys):
    monkeypatch.setattr(peft.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--versus", "peft"]) == 2
    assert "--versus peft needs torch: pip install torch" in capsys.readouterr().err


def test_a_target_that_peft_does_not_know_is_named(monkeypatch, capsys):
    monkeypatch.setattr(peft.importlib.util, "find_spec", lambda name: name)
    assert main(["bench", "--versus", "peft", "--targets", "q,v"]) == 2
    assert "PEFT has no target 'q' in GPT-2" in capsys.readouterr().err
    assert main(["bench", "--versus", "peft", "--shape", "smollm2"]) == 2
    assert "PEFT has no target 'qkv' in Llama; --versus peft has q, k" in capsys.readouterr().err


@pytest.mark.parametrize("question", [None, "1"])
def test_a_process_that_fails_says_why(question):
    program = "import sys; sys.exit('first line\\nthere is no more room')"
    with (
        pytest.raises(MiniloraError, match="the measured process failed: there is no more room"),
        Process(program, MICRO, "alone") as process,
    ):
        process.answer(question)


def test_a_process_is_ended_when_it_is_left():
    with Process("import time; time.sleep(600)", MICRO, "alone") as process:
        pass
    assert process.process.returncode is not None


def is_alive(pid):
    """Whether a process runs; one that has ended may still wait to be reaped."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


PARENT = """
import sys
from minilora.bench.case import Case
from minilora.bench.command import OURS, Process
with Process(OURS, Case.from_json(sys.argv[1]), how := sys.argv[2]) as process:
    if how != "floor":
        process.answer("0")
    print(process.process.pid, flush=True)
    process.answer(None if how == "floor" else "1000000000")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill is another thing there")
@pytest.mark.parametrize(
    ("how", "name"), [("floor", "SIGKILL"), ("alone", "SIGKILL"), ("alone", "SIGTERM")]
)
def test_a_process_ends_with_its_parent_even_while_it_computes(how, name):
    case = Case(**{**vars(MICRO), "steps": 10**9})
    command = [sys.executable, "-c", PARENT, case.to_json(), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.send_signal(getattr(signal, name))
    deadline = time.monotonic() + 30
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    if is_alive(child):
        os.kill(child, signal.SIGKILL)
        pytest.fail(f"it still ran {TO_ANSWER} seconds and more after its parent's {name}")


@pytest.mark.parametrize(
    ("changes", "in_blas"), [({}, 1), ({"threads": 1}, 1), ({"what": "generate", "context": 4}, 2)]
)
def test_the_threads_of_a_case_are_all_that_there_are(changes, in_blas):
    case = Case(**{**vars(MICRO), **changes})
    with Process(command.OURS, case, "alone") as process:
        assert process.end()["blas_threads"] == in_blas


def test_a_case_survives_the_way_to_its_process():
    scalings = None, LinearScaling(2.0), Llama3Scaling(8.0, 1.0, 4.0, 8192)
    llamas = [replace(LLAMA, rope_scaling=scaling) for scaling in scalings]
    for config in (CONFIG, *llamas):
        case = replace(MICRO, config=config)
        assert Case.from_json(case.to_json()) == case
    assert Case.from_json(
        Case(CONFIG, batch=np.int64(2), context=8, rank=2, steps=2).to_json()
    ) == (MICRO)
    assert MICRO.tokens == 16
    assert Case(CONFIG, what="generate", context=16 - PROMPT).tokens == 8


# --- the machine ---------------------------------------------------------------------------------


def test_the_peak_is_that_of_the_process_in_bytes():
    code = (
        "import numpy as np; from minilora.bench.measure import peak_rss; before = peak_rss(); "
        "np.ones(2**26, np.uint8); after = peak_rss(); np.ones(2**10, np.uint8); "
        "print(after - before, peak_rss() - after)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, later = map(int, run.stdout.split())
    assert 0.9 * 2**26 < grown < 1.5 * 2**26
    assert later < 2**20
    assert peak_rss() > 2**24


def test_the_blas_is_named():
    found = blas()
    assert found["blas"] != "unknown" and found["blas_threads"] >= 1


def test_every_program_is_valid_python():
    for program in (command.OURS, command.THEIRS):
        compile(program, "program", "exec")
