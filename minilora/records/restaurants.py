"""Made-up restaurants as records: a table in, a sentence out, and which facts the sentence has.

A task of the kind on which the paper adapts GPT-2 (Hu et al. 2021, §5.4): its data, E2E (Novikova
et al. 2017), describes restaurants by their name, food, price and area, too. Here the values come
from short lists, so that it can be told exactly which of them a sentence has.
"""

from __future__ import annotations

from itertools import product

import numpy as np

VALUES = {
    "name": (
        *("The Copper Pot", "Harbour House", "Luna", "The Old Mill", "Saffron", "Green Door"),
        *("Bellini", "The Quiet Fox", "Maple Table", "Rosa", "Northern Star", "The Blue Gate"),
    ),
    "food": ("French", "Greek", "Indian", "Italian", "Japanese", "Mexican", "Thai", "Turkish"),
    "price": ("cheap", "moderate", "expensive"),
    "area": ("city centre", "riverside", "old town", "station"),
}
SENTENCES = (
    "{name} is a {price} {food} restaurant near the {area}.",
    "Near the {area} you find {name}, where {food} food is {price}.",
    "{name} serves {price} {food} food near the {area}.",
)


def restaurants(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """So many different restaurants as records, in a random order, each with a random sentence.

    There are 1,152 in all; ValueError for more.
    """
    tables = list(product(*VALUES.values()))
    rng = np.random.default_rng(seed)
    if count > len(tables):
        raise ValueError(f"there are {len(tables):,} restaurants, not {count:,}")
    records = []
    for i in rng.permutation(len(tables))[:count]:
        table = dict(zip(VALUES, tables[i], strict=True))
        prompt = "; ".join(f"{slot}: {value}" for slot, value in table.items())
        sentence = SENTENCES[rng.integers(len(SENTENCES))].format(**table)
        records.append({"prompt": f"{prompt}\n", "completion": sentence})
    return records


def facts(text: str) -> dict[str, set[str]]:
    """For each slot, all of its values that a text has."""
    return {slot: {value for value in values if value in text} for slot, values in VALUES.items()}


def is_right(prompt: str, sentence: str) -> bool:
    """Whether a sentence has each fact of the table, and no other."""
    return facts(sentence) == facts(prompt)
