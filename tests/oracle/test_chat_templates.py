"""A chat is rendered as transformers renders it, and has the ids that transformers gives it."""

import json
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.formats.tokenizer import load_tokenizer
from minilora.records.chat import Template
from minilora.records.corpus import corpus_from_records
from minilora.records.lines import Message

pytestmark = pytest.mark.oracle

TEXT = "the cat sat on the mat; system user assistant <é> 2024"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "blocks": """\
{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}
[S] {{ m.content | trim }} [/S]
    {%- elif m['role'] == 'user' %}
        {%- if loop.index0 > 6 %}{% continue %}{% endif %}
[Q] {{ m['content'] }}
    {%- else %}
{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}
[A]
{% endif %}
""",
    "as JSON": "{{ messages | tojson }}{{ messages | tojson(indent=1) }}{{ tools }}",
    "a namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{{ ns.n }}{{ m.content }}{% endfor %}{{ missing }}"
    ),
}
CONTENT = st.sampled_from([*TEXT.split(), " a\n", "<b>&", "{{ x }}", '"', "é"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base's folder with a tokenizer of transformers' own, with chat marks."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("chat")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([TEXT] * 3, 300, 1, special_tokens=["<|endoftext|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    config = {"model_type": "gpt2", "vocab_size": 310, "eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def theirs(folder, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_rendered_as_transformers_does(folder, name):
    (folder / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    tokenizer = theirs(folder, TEMPLATES[name])
    with Template(folder, date(2024, 2, 29)) as template:

        @given(st.lists(CONTENT, min_size=2, max_size=9), st.booleans(), st.booleans())
        def same(contents, system, generation):
            roles = ["system"] * system + ["user", "assistant"] * 5
            chat = [Message(*pair) for pair in zip(roles, contents, strict=False)]
            expected = tokenizer.apply_chat_template(
                [message._asdict() for message in chat],
                tokenize=False, add_generation_prompt=generation,
            )  # fmt: skip
            assert template.render(chat, generation=generation) == expected

        same()


def test_the_ids_of_a_record_are_those_of_the_rendered_chat(folder):
    """The marks that the template writes are special tokens, and each stands once."""

    class Model:
        tokenizer = load_tokenizer(folder, 310)

    Model.folder = folder
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    chat = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "on"},
        {"role": "assistant", "content": "the mat"},
    ]
    (example,) = corpus_from_records(
        [{"messages": chat}], Model, context=200, held_out=0, today=date(2024, 2, 29)
    ).train
    tokenizer = theirs(folder, CHATML)
    found = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    pieces = ["<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n", "sat<|im_end|>\n"]
    pieces += ["<|im_start|>user\non<|im_end|>\n<|im_start|>assistant\n", "the mat<|im_end|>\n"]
    apart = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
    assert example.tokens.tolist() == sum(apart, [])
    assert tokenizer.decode(example.tokens) == tokenizer.decode(found)
    ends = example.tokens == tokenizer.eos_token_id
    assert ends.sum() == 4 and example.counts[ends].tolist() == [False, True, False, True]
    assert tokenizer.decode(example.tokens[example.counts]) == "sat<|im_end|>\nthe mat<|im_end|>\n"


def test_the_name_of_a_special_token_in_a_record_is_text(folder):
    """Else a record could end its own answer."""

    class Model:
        tokenizer = load_tokenizer(folder, 310)

    Model.folder = folder
    record = {"prompt": "a<|endoftext|>", "completion": "b<|im_end|>c"}
    (example,) = corpus_from_records([record], Model, context=200, held_out=0).train
    tokenizer = theirs(folder, CHATML)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert special & set(example.tokens.tolist()) == {tokenizer.eos_token_id}
    assert example.tokens.tolist().index(tokenizer.eos_token_id) == len(example.tokens) - 1
    assert tokenizer.decode(example.tokens) == "a<|endoftext|>b<|im_end|>c<|im_end|>"
