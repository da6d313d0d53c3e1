"""Corrupted folders end in one clear sentence or in a correct load, and change nothing."""

import json
import random
import struct
import time

import numpy as np
import pytest

from minilora.errors import MiniloraError
from minilora.formats import load_adapter, load_base, save_adapter, save_base
from minilora.gpt import GPTConfig, gpt_init
from minilora.lora import LoRAConfig, lora_init
from minilora.tree import flatten

CONFIG = GPTConfig(vocab_size=5, n_positions=3, n_embd=4, n_layer=2, n_head=2, n_inner=6)
LORA = LoRAConfig(rank=2, targets=("q", "v", "o", r"1\.mlp\.up", "embedding"), alpha=4.0)
CASES = 200  # for each of the two formats


def split(data):
    """The header and the bytes behind it of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def pick(rng, header):
    return rng.choice([name for name in header if name != "__metadata__"])


def truncated(rng, data):
    return data[: rng.randrange(len(data))]


def lengthened(rng, data):
    return data + rng.randbytes(rng.randrange(1, 50))


def bit_flipped(rng, data):
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 10])):
        end = len(data) if rng.random() < 0.3 else min(len(data), 2000)
        flipped[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def overwritten(rng, data):
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(8) + data[start + 8 :]


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


def exchanged(rng, data):
    header, body = split(data)
    one, two = pick(rng, header), pick(rng, header)
    header[one], header[two] = header[two], header[one]
    return join(header, body)


TENSOR_CHANGES = [
    *(truncated, lengthened, bit_flipped, overwritten, absurd_length, absurd_offsets),
    *(absurd_shape, transposed, other_dtype, renamed, removed, exchanged),
]


def json_value(rng, data):
    document = json.loads(data)
    name = rng.choice(sorted(document))
    values = [None, True, False, 0, 1, 3, -1, 2**70, 1e300, float("nan"), "", "(", "x", [], [1], {}]
    document[name] = rng.choice([*values, {"a": 1}, [[]], {"(.*)*": 2}, ["c_attn"] * 1000])
    return json.dumps(document).encode()


def json_removed(rng, data):
    document = json.loads(data)
    del document[rng.choice(sorted(document))]
    return json.dumps(document).encode()


JSON_CHANGES = [truncated, lengthened, bit_flipped, overwritten, json_value, json_removed]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A good base and a good adapter."""
    base = gpt_init(CONFIG, seed=0)
    root = tmp_path_factory.mktemp("good")
    save_base(root / "base", base, CONFIG)
    save_adapter(root / "adapter", lora_init(base, LORA, seed=0), LORA, CONFIG)
    return root


@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_corrupted_files(tmp_path, folders, kind):
    good = {path.name: path.read_bytes() for path in (folders / kind).iterdir()}
    load = load_base if kind == "base" else lambda folder: load_adapter(folder, CONFIG)
    shapes = {path: leaf.shape for path, leaf in flatten(load(folders / kind)[0]).items()}
    refused = 0
    for case in range(CASES):
        rng = random.Random(f"{kind} {case}")
        name = rng.choice([*good, next(n for n in good if n.endswith("safetensors"))])
        change = rng.choice(JSON_CHANGES if name.endswith("json") else TENSOR_CHANGES)
        what = f"case {case}: {change.__name__} {name}"
        bad = good | {name: change(rng, good[name])}
        for file, data in bad.items():
            (tmp_path / file).write_bytes(data)
        start = time.process_time()
        try:
            tree, config = load(tmp_path)
        except MiniloraError as error:
            refused += 1
            assert str(tmp_path) in str(error), what
        except BaseException as error:
            raise AssertionError(what) from error
        else:  # what loads is whole: a changed number, or a field that changes no shape
            found = flatten(tree)
            assert {path: leaf.shape for path, leaf in found.items()} == shapes, what
            assert all(np.isfinite(leaf).all() for leaf in found.values()), what
        assert time.process_time() - start < 2.0, what
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == bad, what
    assert CASES * 0.6 < refused < CASES, "the changes are too mild, or nothing loads"
