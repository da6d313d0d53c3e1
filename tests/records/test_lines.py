"""Every line is checked: what is refused is named by file, line and reason."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import MiniloraError
from minilora.records.lines import Message, Record, read_records, record_of, records_of

PAIR = '{"prompt": "a", "completion": "b"}'
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def chat(*changed):
    """A chat of one question and one answer, with other messages in their place."""
    return {"messages": [*CHAT[: 2 - len(changed)], *changed]}


REFUSED = {
    "a comma at the end": ('{"prompt": "a", "completion": "b",}', "not JSON"),
    "single quotes": ("{'prompt': 'a', 'completion': 'b'}", "not JSON"),
    "two objects": (PAIR + " " + PAIR, "not JSON"),
    "half an object": (PAIR[:-1], "not JSON"),
    "NaN": (PAIR[:-1] + ', "score": NaN}', "NaN is no number"),
    "Infinity": (PAIR[:-1] + ', "score": -Infinity}', "-Infinity is no number"),
    "a long number": ('{"text": %s}' % ("9" * 5000), "a number is too long"),
    "deep": ('{"text": ' + "[" * 100_000, "nested too deeply"),
    "a list": ('["a", "b"]', "begins a list"),
    "a list over lines": ("[\n" + PAIR + "\n]", "begins a list"),
    "a string": ('"only a string"', "is a string; expected an object"),
    "null": ("null", "is null; expected an object"),
    "a number as answer": ({"prompt": "a", "completion": 7}, "completion is a number; expected"),
    "null as answer": ({"prompt": "a", "completion": None}, "completion is null"),
    "true as prompt": ({"prompt": True, "completion": "b"}, "prompt is true"),
    "no answer": ({"prompt": "a"}, "has the keys 'prompt'; expected"),
    "no prompt": ({"completion": "a"}, "has the keys 'completion'; expected"),
    "another form's names": ({"prompt": "a", "response": "b"}, "the keys 'prompt', 'response'"),
    "capitals": ({"Prompt": "a", "Completion": "b"}, "the keys 'Prompt', 'Completion'"),
    "no key": ({}, "has the keys none"),
    "an empty answer": ({"prompt": "a", "completion": ""}, "completion is empty"),
    "an empty text": ({"text": ""}, "text is empty"),
    "a key twice": ('{"prompt": "a", "completion": "b", "prompt": "c"}', "key 'prompt' twice"),
    "half a surrogate pair": ('{"text": "\\ud83d"}', "half of a surrogate pair"),
    "NUL": ({"text": "a\0"}, "NUL"),
    "two forms": ({"prompt": "a", "completion": "b", "text": "c"}, "both prompt and text"),
    "no messages": ({"messages": []}, "messages is an empty list"),
    "messages as object": ({"messages": {}}, "messages is an object"),
    "a question at the end": ({"messages": CHAT[:1]}, "the last message is of the role 'user'"),
    "null as content": (chat({"role": "assistant", "content": None}), "message 2: content is null"),
    "no role": (chat({"content": "b"}), "message 2 is not an object with a role and content"),
    "a tool call": (
        chat({"role": "assistant", "content": "b", "tool_calls": [{}]}),
        "message 2 has tool_calls",
    ),
    "a picture": (
        chat({"role": "assistant", "content": [{"type": "image", "url": "x"}]}),
        "message 2: content has a part that is not text",
    ),
    "a blank answer": (chat({"role": "assistant", "content": " \n"}), "message 2, an answer, is"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("before", [0, 2], ids=["first", "third"])
def test_a_bad_line_is_named_with_the_reason(write, what, before):
    bad, reason = REFUSED[what]
    if before and "list" in what and what.startswith("a list"):
        reason = "not JSON" if "lines" in what else "is a list"
    path = write(*[PAIR] * before, bad)
    with pytest.raises(MiniloraError) as caught:
        read_records(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {before + 1}") and reason in message, message
    assert len(message) < 400 + len(str(path)), "a long line is not printed whole"


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(PAIR.encode() + b'\n\n{"text": "caf\xe9"}\n')
    with pytest.raises(MiniloraError, match="line 3 is not UTF-8"):
        read_records(path)


@pytest.mark.parametrize("content", [b"", b"\n \n\t\r\n"])
def test_a_file_without_records_is_refused(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(MiniloraError, match=r"x\.jsonl has no records"):
        read_records(tmp_path / "x.jsonl")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MiniloraError, match=r"cannot read .*missing\.jsonl"):
        read_records(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [b"", b"\n", b"\r\n\r\n"])
def test_mark_line_ends_and_blank_lines_change_nothing_but_the_numbers(tmp_path, mark, end, last):
    lines = [PAIR.encode(), b"", b"  \t", PAIR.replace("b", "c").encode()]
    (tmp_path / "x.jsonl").write_bytes(mark + end.join(lines) + last)
    found = read_records(tmp_path / "x.jsonl")
    assert [(r.prompt, r.completion, r.place[-6:]) for r in found] == [
        ("a", "b", "line 1"),
        ("a", "c", "line 4"),
    ]


@given(st.lists(st.tuples(st.text(), st.text(min_size=1)), min_size=1, max_size=5))
def test_any_text_comes_back_as_it_was_written(tmp_path_factory, texts):
    """U+2028, U+0085, carriage returns and the like stand within a record and end no line."""
    clean = [tuple(t.replace("\0", "") for t in pair) for pair in texts]
    pairs = [(p, a) for p, a in clean if a] or [("", "\u2028\x85\r")]
    path = tmp_path_factory.mktemp("any") / "x.jsonl"
    rows = [json.dumps({"prompt": p, "completion": a}, ensure_ascii=False) for p, a in pairs]
    path.write_bytes("\n".join(rows).encode("utf-8"))
    assert [(r.prompt, r.completion) for r in read_records(path)] == pairs


def test_the_parts_of_a_message_are_joined_and_unknown_keys_ignored():
    parts = [{"type": "text", "text": "Ti"}, {"type": "text", "text": "de?"}]
    value = {"messages": [{"role": "user", "content": parts, "name": None}, CHAT[1]], "tools": None}
    record = record_of(value, "here")
    assert record.messages == (Message("user", "Tide?"), Message("assistant", "b"))


def test_each_form_has_its_name():
    found = records_of([{"prompt": "", "completion": "b"}, {"text": "b"}, {"messages": CHAT}])
    assert [record.form for record in found] == ["prompt", "text", "messages"]
    assert found[0] == Record("record 1", "", "b") and found[1].prompt is None


def test_a_program_s_own_object_is_checked_alike():
    with pytest.raises(MiniloraError, match="record 2: completion is a number"):
        records_of([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 1}])
