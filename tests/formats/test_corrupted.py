"""Corrupted folders end in one clear sentence or in a correct load, and change nothing."""

import json
import os
import random
import struct
import time
import tracemalloc

import numpy as np
import pytest
from damage import JSON_CHANGES, bit_flipped, lengthened, overwritten, truncated
from damage import exchanged as files_exchanged

from minilora.adapters import LoRAConfig, lora_init
from minilora.errors import MiniloraError
from minilora.formats import load_adapter, load_base, save_adapter, save_base
from minilora.formats.card import CARD
from minilora.formats.tensors import read_tensors, write_tensors
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.tree import flatten

CONFIG = GPTConfig(vocab_size=5, n_positions=3, n_embd=4, n_layer=2, n_head=2, n_inner=6)
LORA = LoRAConfig(rank=2, targets=("q", "v", "o", r"1\.mlp\.up", "embedding"), alpha=4.0)
KINDS = ["base", "sharded", "adapter"]
SOME, ALL = range(120), range(120, 340)  # cases of each kind: 1,020 with the slow ones


def split(data):
    """The header and the bytes behind it of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def pick(rng, header):
    return rng.choice([name for name in header if name != "__metadata__"])


def absurd_length(rng, data):
    return struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(data)])) + data[8:]


def absurd_offsets(rng, data):
    header, body = split(data)
    numbers = [0, -1, 1, 4, 2**31, 2**53, 2**63, len(body), 10**30, 1.5, "4", None]
    header[pick(rng, header)]["data_offsets"] = rng.choices(numbers, k=rng.choice([1, 2, 2, 3]))
    return join(header, body)


def absurd_shape(rng, data):
    header, body = split(data)
    sides = [0, 1, 2, 4, 5, -4, 2**40, 2**63, 10**30, 2.0, "4", None]
    header[pick(rng, header)]["shape"] = rng.choices(sides, k=rng.randrange(4))
    return join(header, body)


def transposed(rng, data):
    header, body = split(data)
    header[pick(rng, header)]["shape"].reverse()
    return join(header, body)


def other_dtype(rng, data):
    header, body = split(data)
    info = header[pick(rng, header)]
    info["dtype"] = rng.choice(["I32", "U32", "F64", "F16", "BF16", "BOOL", "F8_E4M3", "X", 3])
    return join(header, body)


def renamed(rng, data):
    header, body = split(data)
    name = pick(rng, header)
    others = ["", "a\nb", "../../x", "h.10.attn.bias", name[:-1], name + "\0", name.upper()]
    header[rng.choice(others)] = header.pop(name)
    return join(header, body)


def removed(rng, data):
    header, body = split(data)
    del header[pick(rng, header)]
    return join(header, body)


def added(rng, data):
    header, body = split(data)
    name = rng.choice(["x", "lm_head.weight", "h.2.ln_1.bias", "h.0.attn.bias", "\n", "a" * 1000])
    start = len(body)
    header[name] = {"dtype": "F32", "shape": [5, 4], "data_offsets": [start, start + 80]}
    return join(header, body + rng.randbytes(80))


def exchanged(rng, data):
    header, body = split(data)
    one, two = pick(rng, header), pick(rng, header)
    header[one], header[two] = header[two], header[one]
    return join(header, body)


TENSOR_CHANGES = [
    *(truncated, lengthened, bit_flipped, overwritten, absurd_length, absurd_offsets),
    *(absurd_shape, transposed, other_dtype, renamed, removed, added, exchanged),
]


def hostile_pattern(rng, data):
    parts = [
        "(.*)",
        ".*",
        "(a|a)*",
        "(.+)+",
        r"\\w+",
        ".{0,9}",
        "(t|.)?",
        "c_attn",
        "!",
        "(",
        "*",
        "[",
    ]
    pattern = "".join(rng.choices(parts, k=rng.randrange(1, 12)))
    name = rng.choice(["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
    document = json.loads(data)
    document[name] = {pattern: 2, "h." + pattern: 3} if name.endswith("n") else pattern
    return json.dumps(document).encode()


def tricky_path(rng, data):
    document = json.loads(data)
    paths = ["/etc/passwd", "../outside.safetensors", "..", "a/../model.safetensors", "~", "C:\\x"]
    paths += ["", ".", "\0", "x" * 5000 + ".safetensors", "none.safetensors", "/dev/zero", 3, None]
    weight_map = document["weight_map"]
    weight_map[rng.choice(sorted(weight_map))] = rng.choice(paths + sorted(weight_map.values())[:1])
    return json.dumps(document).encode()


OWN_CHANGES = {
    "adapter_config.json": [hostile_pattern] * 3,
    "model.safetensors.index.json": [tricky_path] * 6,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A good base, the same in two files, and a good adapter, each in its folder."""
    base = gpt_init(CONFIG, seed=0)
    root = tmp_path_factory.mktemp("good")
    for kind in ("base", "sharded"):
        save_base(root / kind, base, CONFIG)
    save_adapter(root / "adapter", lora_init(base, LORA, seed=0), LORA, CONFIG)
    whole = root / "sharded" / "model.safetensors"
    tensors, _ = read_tensors(whole)
    whole.unlink()
    weight_map = {name: f"model-{len(name) % 2}.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        write_tensors(
            whole.with_name(file), {n: t for n, t in tensors.items() if weight_map[n] == file}
        )
    index = whole.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root


def files_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def contents(folder):
    """The files of a folder that loading reads: all but an adapter's card."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != CARD}


def loader(kind):
    return (lambda folder: load_adapter(folder, CONFIG)) if kind == "adapter" else load_base


@pytest.mark.parametrize(
    "cases", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_corrupted_files(tmp_path, folders, kind, cases):
    good = contents(folders / kind)
    load, folder = loader(kind), tmp_path / "folder"
    shapes = {path: leaf.shape for path, leaf in flatten(load(folders / kind)[0]).items()}
    (tmp_path / "outside.safetensors").write_bytes(good[max(good)])
    folder.mkdir()
    refused = 0
    tracemalloc.start()
    for case in cases:
        rng = random.Random(f"{kind} {case}")
        name = rng.choice([*good, *(n for n in good if n.endswith("safetensors"))])
        is_json = name.endswith("json")
        change = rng.choice(JSON_CHANGES + OWN_CHANGES.get(name, []) if is_json else TENSOR_CHANGES)
        what = f"case {case}: {change.__name__} {name}"
        for file, data in (good | {name: change(rng, good[name])}).items():
            (folder / file).write_bytes(data)
        if rng.random() < 0.02:
            what += f", {files_exchanged(rng, folder)}"
        before = files_below(tmp_path)
        tracemalloc.reset_peak()
        start, memory = time.process_time(), tracemalloc.get_traced_memory()[0]
        try:
            tree, _ = load(folder)
        except MiniloraError as error:
            refused += 1
            assert str(folder) in str(error), what
        except BaseException as error:
            raise AssertionError(what) from error
        else:  # what loads is whole: a changed number, or a field that changes no shape
            found = flatten(tree)
            assert {path: leaf.shape for path, leaf in found.items()} == shapes, what
            assert all(np.isfinite(leaf).all() for leaf in found.values()), what
        assert time.process_time() - start < 5.0, what
        assert tracemalloc.get_traced_memory()[1] - memory < 4e6, what  # what a pattern may take
        assert files_below(tmp_path) == before, what
    tracemalloc.stop()
    assert len(cases) * 0.6 < refused < len(cases), "the changes are too mild, or nothing loads"


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX systems")
@pytest.mark.parametrize(
    "what", ["folder", "nowhere", "itself", "pipe", "/dev/zero", "/etc/passwd"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_file_is_not_read(tmp_path, folders, kind, what):
    good = contents(folders / kind)
    for name in good:
        folder = tmp_path / name
        folder.mkdir()
        for file, data in good.items():
            if file != name:
                (folder / file).write_bytes(data)
        if what == "folder":
            (folder / name).mkdir()
        elif what == "pipe":
            os.mkfifo(folder / name)
        else:
            (folder / name).symlink_to(name if what == "itself" else what)
        with pytest.raises(MiniloraError) as caught:
            loader(kind)(folder)
        assert str(folder) in str(caught.value)
