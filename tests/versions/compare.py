"""Compares what this checkout computes with what another one does, bit for bit.

    git worktree add ../other 65f72d7
    python tests/versions/compare.py ../other

Loss and every gradient over ten sets of targets, each trained tree, with and without recomputing
and dropout, in float64 and float32; then ten steps of training and the adapter's file. Each
checkout computes in a process of its own, with one thread and the same BLAS kernel.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TARGETS = (
    ("qkv",),
    ("q", "v"),
    ("k",),
    ("o",),
    ("up",),
    ("down",),
    ("qkv", "o", "up", "down"),
    ("qkv", "q", "k", "v", "o", "up", "down", "embedding"),
    ("embedding",),
    ("1.attn.qkv", "2.mlp.up", "2.mlp.down"),
)
TRAINED = ("lora", "base", "both")
LENGTHS = (16, 150)  # within a tile of queries, and beyond
VOCABULARY = 2100  # more than a chunk
STEPS = 10


def results() -> dict[str, np.ndarray]:
    """All that is compared, by name, computed with the package on the path."""
    import minilora
    from minilora.tree import flatten, map_leaves

    package = Path(minilora.__path__[0])
    assert package.parent == Path.cwd(), f"{package} is not the package of this checkout"
    if (package / "network.py").exists():
        from minilora.adapters import LoRAConfig, dropout_masks, lora_init
        from minilora.gpt2 import GPTConfig, gpt_init
        from minilora.keep import Plan
        from minilora.network import Net, loss_and_grads
    else:  # up to 65f72d7
        from minilora.gpt import GPTConfig, gpt_init, loss_and_grads

        from minilora.lora import LoRAConfig, dropout_masks, lora_init

        Net = None

    def gradients(base, lora, config, lora_config, trained, recompute, **batch):
        if Net is None:
            return loss_and_grads(
                base, lora, config=config, lora_config=lora_config, wrt=trained,
                recompute=recompute, **batch,
            )  # fmt: skip
        plan = Plan(trained != "lora", trained != "base", recompute=recompute)
        return loss_and_grads(Net(base, config, lora, lora_config), plan=plan, **batch)

    found = {}
    config = GPTConfig(VOCABULARY, 160, n_embd=64, n_layer=3, n_head=4)
    cases = itertools.product(TARGETS, TRAINED, (False, True), (0.0, 0.3), ("float64", "float32"))
    for targets, trained, recompute, dropout, dtype in cases:
        name = f"{'+'.join(targets)} {trained} recompute={recompute} dropout={dropout} {dtype}"
        lora_config = LoRAConfig(rank=3, alpha=5.0, targets=targets, dropout=dropout)
        rng = np.random.default_rng(0)

        def moved(x, rng=rng):
            return (x + 0.05 * rng.standard_normal(x.shape)).astype(x.dtype)

        base = map_leaves(moved, gpt_init(config, seed=0, dtype=np.dtype(dtype)))
        lora = map_leaves(moved, lora_init(base, lora_config, seed=1))
        for length in LENGTHS:
            text = rng.integers(VOCABULARY, size=(2, length + 1))
            inputs, outputs = text[:, :-1], np.where(text[:, 1:] % 7 == 0, -100, text[:, 1:])
            masks = dropout_masks(lora, lora_config, rng=rng, shape=inputs.shape)
            loss, dbase, dlora = gradients(
                base, lora, config, lora_config, trained, recompute,
                tokens=inputs, targets=outputs, masks=masks,
            )  # fmt: skip
            found[f"{name} T={length}: loss"] = np.asarray(loss)
            for tree, leaves in (("base", dbase), ("lora", dlora)):
                for path, leaf in flatten(leaves if leaves is not None else {}).items():
                    found[f"{name} T={length}: {tree} {path}"] = leaf
    return found | training()


def training() -> dict[str, np.ndarray]:
    """Ten steps of the built-in base on a text of this file, and the files of its adapter."""
    from minilora.cli import main

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        # The defaults are not the same in every version.
        options = ["--steps", str(STEPS), "--context", "128", "--eval-tokens", "512"]
        options += ["--warmup", "20"]
        lora = ["--rank", "2", "--lr", "5e-3"]
        sources = [str(Path(__file__).with_name("compare.py"))] * 12
        for name, more in {
            "qkv": ["--targets", "qkv", *lora],
            "all, dropout": ["--targets", "qkv,o,up,down", "--dropout", "0.1", *lora],
            "full": ["--method", "full", "--lr", "1e-3"],
        }.items():
            out = Path(folder) / name
            assert main(["adapt", *sources, *options, *more, "--out", str(out)]) == 0
            for file in sorted(out.glob("*.safetensors")):
                found[f"{STEPS} steps, {name}: {file.name}"] = np.frombuffer(
                    file.read_bytes(), np.uint8
                )
    return found


def computed_by(checkout: Path, file: Path) -> dict[str, np.ndarray]:
    """The results of a checkout, through a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(checkout.resolve())}
    program = Path(__file__).resolve()
    subprocess.run(
        [sys.executable, str(program), "--into", str(file)],
        cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    with np.load(file) as arrays:
        return dict(arrays)


def main(checkout: str) -> int:
    """Print how many arrays are equal, and those that are not; 1 if any differs by over 1e-12."""
    from threadpoolctl import threadpool_info

    here = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        ours = computed_by(here, Path(folder) / "here.npz")
        theirs = computed_by(Path(checkout), Path(folder) / "there.npz")
    kernels = {library.get("architecture") for library in threadpool_info()}
    print(f"BLAS kernel {kernels}; {len(ours)} arrays here, {len(theirs)} there")
    print("only on one side:", sorted(ours.keys() ^ theirs.keys())[:10])
    worst, different = 0.0, []
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        if a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b):
            continue
        if a.shape != b.shape:
            error = np.inf
        else:
            a, b = a.astype(np.float64), b.astype(np.float64)
            error = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300))
        different.append((error, name))
        worst = max(worst, error)
    print(f"{len(ours) - len(different)} equal bit for bit, {len(different)} not")
    for error, name in sorted(different, reverse=True)[:20]:
        print(f"    {error:.1e}  {name}")
    return int(ours.keys() != theirs.keys() or worst > 1e-12)


if __name__ == "__main__":
    if sys.argv[1] == "--into":
        np.savez(sys.argv[2], **results())
    else:
        sys.exit(main(sys.argv[1]))
