"""What can be wrong with a file by chance or by malice: changes of its bytes, and of its JSON.

A change takes a random generator and bytes, and returns other bytes.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Change = Callable[[random.Random, bytes], bytes]

WRONG: list[Any] = [
    *(None, True, False, 0, 1, 3, -1, 12, 999, 1.5, "", "x", "(", "\ud800", "\0"),
    *([], [1], [[]], {}, {"a": 1}, {"": 0}, {"(.*)*": 2}, ["c_attn"] * 1000),
]
HUGE = ["9" * 400, "9" * 5000, "1e400", "-1e400", "1e-400", str(2**63), str(2**70), "1" + "0" * 30]


# --- bytes -------------------------------------------------------------------------------------


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def lengthened(rng: random.Random, data: bytes) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 50))


def bit_flipped(rng: random.Random, data: bytes) -> bytes:
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 10])):
        end = len(data) if rng.random() < 0.3 else min(len(data), 2000)
        flipped[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def overwritten(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(8) + data[start + 8 :]


def in_another_encoding(rng: random.Random, data: bytes) -> bytes:
    text = data.decode("utf-8", "replace")
    return rng.choice(
        [text.encode("utf-16"), text.encode("utf-8-sig"), b"\xff" + data, data[:-1] + b"\xe9}"]
    )


# --- JSON --------------------------------------------------------------------------------------

MARK = "@@HERE@@"


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a JSON document, as the object or list that holds it and the key there."""
    keys = document.keys() if isinstance(document, dict) else range(len(document))
    for key in list(keys)[:40]:
        yield document, key
        if isinstance(document[key], dict | list):
            yield from places(document[key])


def put(rng: random.Random, data: bytes, text: str) -> bytes:
    """JSON with a text, whatever it is, in place of one of its values."""
    document = json.loads(data)
    holder, key = rng.choice(list(places(document)))
    holder[key] = MARK
    return json.dumps(document).replace(f'"{MARK}"', text).encode()


def wrong_kind(rng: random.Random, data: bytes) -> bytes:
    return put(rng, data, json.dumps(rng.choice(WRONG)))


def huge_number(rng: random.Random, data: bytes) -> bytes:
    return put(rng, data, rng.choice(HUGE))


def not_finite(rng: random.Random, data: bytes) -> bytes:
    return put(rng, data, rng.choice(["NaN", "Infinity", "-Infinity"]))


def deep(rng: random.Random, data: bytes) -> bytes:
    depth = rng.choice([50, 900, 10**5])
    one, other = rng.choice([("[", "]"), ('{"a":', "}")])
    return put(rng, data, one * depth + "1" + other * depth)


def long_text(rng: random.Random, data: bytes) -> bytes:
    return put(rng, data, json.dumps(rng.choice(["x" * 10**6, "\x1b[2J" * 99, "é\n" * 9999])))


def value_removed(rng: random.Random, data: bytes) -> bytes:
    document = json.loads(data)
    holder, key = rng.choice(list(places(document)))
    del holder[key]
    return json.dumps(document).encode()


def value_moved(rng: random.Random, data: bytes) -> bytes:
    document = json.loads(data)
    (one, key), (other, place) = rng.choices(list(places(document)), k=2)
    other[place] = json.loads(json.dumps(one[key]))
    return json.dumps(document).encode()


def key_twice(rng: random.Random, data: bytes) -> bytes:
    """A key of the document a second time, with another value: the last one counts."""
    document = json.loads(data)
    key, value = rng.choice(sorted(document)), json.dumps(rng.choice(WRONG))
    again = f"{json.dumps(key)}: {value}"
    text = json.dumps(document)
    return rng.choice([f"{{{again}, {text[1:]}", f"{text[:-1]}, {again}}}"]).encode()


JSON_CHANGES: list[Change] = [
    *(truncated, lengthened, bit_flipped, overwritten, in_another_encoding),
    *(wrong_kind, wrong_kind, wrong_kind, huge_number, not_finite, deep, long_text),
    *(value_removed, value_moved, key_twice),
]


# --- files -------------------------------------------------------------------------------------


def exchanged(rng: random.Random, folder: Path) -> str:
    """Two files of a folder under each other's names; which they were."""
    one, other = rng.sample(sorted(path for path in folder.iterdir() if path.is_file()), k=2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"{one.name} and {other.name} exchanged"
