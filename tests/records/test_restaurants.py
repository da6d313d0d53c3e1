"""Made-up restaurants: every sentence has its table's facts, and the metric sees each mistake."""

import pytest

from minilora.records.restaurants import SENTENCES, VALUES, facts, is_right, restaurants


def test_every_sentence_is_right_about_its_own_table_and_about_no_other():
    records = restaurants(60)
    for record in records:
        assert is_right(record["prompt"], record["completion"]), record
    assert not any(
        is_right(one["prompt"], other["completion"])
        for one in records[:10]
        for other in records
        if one is not other
    )


def test_all_restaurants_differ_and_a_seed_repeats_them():
    prompts = [record["prompt"] for record in restaurants(1152)]
    assert len(set(prompts)) == 1152
    assert restaurants(20) == restaurants(20) != restaurants(20, seed=1)
    with pytest.raises(ValueError, match=r"1,152 restaurants, not 1,153"):
        restaurants(1153)


@pytest.mark.parametrize("slot", VALUES)
@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_wrong_a_missing_and_a_second_value_are_seen(slot, sentence):
    table = {name: values[0] for name, values in VALUES.items()}
    prompt = "; ".join(table.values())
    assert is_right(prompt, sentence.format(**table))
    for wrong in (VALUES[slot][1], "", f"{VALUES[slot][0]} and {VALUES[slot][1]}"):
        assert not is_right(prompt, sentence.format(**{**table, slot: wrong})), wrong


def test_no_value_is_part_of_another():
    for slot, values in VALUES.items():
        for value in values:
            assert facts(value)[slot] == {value}
