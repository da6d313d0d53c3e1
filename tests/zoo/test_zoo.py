"""The tests that tutorials/09_bug_zoo.py names do catch the bugs that it names them for.

Each bug of the zoo is one change of one line of the package. The slow test plants it in a copy of
the package and runs the named test there, which has to fail.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import minilora
from minilora.adapters import LoRAConfig, lora_init
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.lora import merge
from minilora.model import Model
from minilora.tokenizer import ByteTokenizer
from minilora.tree import flatten, map_leaves

ROOT = Path(__file__).parents[2]
PACKAGE = Path(minilora.__path__[0])
TUTORIAL = ROOT / "tutorials" / "09_bug_zoo.py"


class Bug(NamedTuple):
    """A bug by its heading in the tutorial: the file, the line as it is, as it is planted."""

    heading: str
    file: str
    right: str
    wrong: str
    test: str


LINEAR = "y, linear = ops.matmul_forward(x, w) if b is None"
INIT = "A, B = rng.uniform(-bound, bound, size=(n_in, rank)), np.zeros((rank, n_out))"
NET = 'net, lora = self.with_params(state.params), settings.method == "lora"'
WRITTEN = "def __setitem__(self, name: str, part: Any) -> None:"
LAWS, CONFIG = "tests/lora/test_lora_laws.py::", "tests/lora/test_lora_config.py::"

BUGS = (
    Bug(
        "Both factors start at zero",
        "adapters.py",
        INIT,
        "A, B = np.zeros((n_in, rank)), np.zeros((rank, n_out))",
        LAWS + "test_at_initialisation_one_factor_s_gradient_is_zero_and_the_other_s_is_not",
    ),
    Bug(
        "Neither factor starts at zero",
        "adapters.py",
        INIT,
        INIT.replace("np.zeros((rank, n_out))", "rng.uniform(-bound, bound, size=(rank, n_out))"),
        LAWS + "test_a_fresh_adapter_changes_no_logit_bit_for_bit",
    ),
    Bug(
        "A starts constant",
        "adapters.py",
        INIT,
        "A, B = np.full((n_in, rank), bound), np.zeros((rank, n_out))",
        CONFIG + "test_the_seed_decides_and_no_two_adapters_are_alike",
    ),
    Bug(
        "The scale in the forward pass only",
        "lora.py",
        "dxA *= scale",
        "dxA *= 1.0",
        "tests/ops/test_pairs.py::test_gradients_agree_with_central_differences",
    ),
    Bug(
        "The scale applied twice",
        "lora.py",
        "h *= scale  #",
        "h *= scale * scale  #",
        LAWS + "test_merged_equals_unmerged",
    ),
    Bug(
        "The scale forgotten when merging",
        "lora.py",
        "update *= sign * config.scale_of(path)",
        "update *= sign",
        LAWS + "test_merged_equals_unmerged",
    ),
    Bug(
        "The update transposed",
        "lora.py",
        'update = ab["A"] @ ab["B"]',
        'update = ab["A"] @ ab["B"]\n        update = update.T if path.endswith(".o") else update',
        LAWS + "test_merged_equals_unmerged",
    ),
    Bug(
        "Columns of the fused weight swapped",
        "adapters.py",
        'start = {"q": 0, "k": q_width, "v": q_width + width}[name]',
        'start = {"q": 0, "v": q_width, "k": q_width + width}[name]',
        CONFIG + "test_q_k_and_v_are_the_columns_of_qkv",
    ),
    Bug(
        "A wrong target, silently ignored",
        "adapters.py",
        "if not any(matches(target, path) for path in paths):",
        "if False:",
        CONFIG + "test_an_unknown_target_is_refused_with_a_list_of_those_that_exist",
    ),
    Bug(
        "Dropout on the wrong path",
        "lora.py",
        LINEAR,
        "for adapter in adapters.values():\n"
        "        x, _ = ops.dropout_forward(x, mask=adapter.mask)\n"
        f"    {LINEAR}",
        LAWS + "test_dropout_acts_on_the_adapter_s_input_alone",
    ),
    Bug(
        "Weight decay on the wrong tree",
        "training/loop.py",
        NET,
        f"{NET}\n"
        "        for leaf in tree.flatten(net.base).values():\n"
        "            leaf *= 1.0 - settings.lr * 0.1",
        "tests/training/test_train.py::test_adapters_train_and_the_base_keeps_its_bits",
    ),
    Bug(
        "Frozen, and paid for",
        "keep.py",
        WRITTEN,
        f"{WRITTEN}\n        return super().__setitem__(name, part)",
        "tests/keep/test_keep.py::"
        "test_a_frozen_base_keeps_what_the_factors_gradients_are_made_of_and_no_more",
    ),
    Bug(
        "Merged in place, and so twice",
        "lora.py",
        "merged[weight_path] = weights[weight_path].copy()",
        "pass",
        LAWS + "test_merging_is_pure",
    ),
    Bug(
        "Saved while merged",
        "model.py",
        "return replace(self, base=merged, lora=None, lora_config=None)",
        "return replace(self, base=merged)",
        "tests/zoo/test_zoo.py::test_a_merged_model_has_no_adapter_left",
    ),
    Bug(
        "The factors averaged",
        "mixing.py",
        "xp.concatenate(As, axis=1)",
        "sum(As) / len(As)",
        "tests/mixing/test_mixing.py::"
        "test_the_mixture_of_any_adapters_is_the_weighted_sum_of_their_updates",
    ),
    Bug(
        "An embedding merged under a tied head",
        "lora.py",
        'if path == "embedding" and "head" not in base:',
        "if False:",
        CONFIG + "test_an_adapter_of_the_embedding_cannot_be_merged",
    ),
    Bug(
        "The gradient's way through the adapter forgotten",
        "lora.py",
        "dx += dx_lora",
        "dx += 0.0 * dx_lora",
        LAWS + "test_the_gradients_of_an_adapted_linear_map_agree_with_central_differences",
    ),
    Bug(
        "Shards divided by their own count",
        "loss.py",
        "if count is None else float(count or math.inf)",
        "if count != 0 else math.inf",
        "tests/network/test_network.py::test_two_halves_of_a_batch_add_up_to_the_whole",
    ),
)
each_bug = pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.heading)


def test_a_merged_model_has_no_adapter_left():
    """Or it would be applied a second time by whoever uses or saves the model."""
    config = GPTConfig(vocab_size=256, n_positions=4, n_embd=4, n_layer=1, n_head=2)
    base = gpt_init(config, seed=0, dtype=np.float64)
    lora_config = LoRAConfig(rank=1, targets=("o",))
    rng = np.random.default_rng(0)
    lora = map_leaves(
        lambda leaf: rng.standard_normal(leaf.shape), lora_init(base, lora_config, seed=0)
    )
    model = Model(base, config, lora, lora_config, tokenizer=ByteTokenizer(), folder=Path())
    tokens = np.arange(4)[None]
    np.testing.assert_allclose(model.merged().logits(tokens), model.logits(tokens), rtol=1e-9)
    assert model.merged().lora is None and model.merged().lora_config is None
    for path, leaf in flatten(merge(base, lora, lora_config)).items():
        assert np.array_equal(flatten(model.merged().base)[path], leaf), path


def test_tutorial_and_table_name_the_same_bugs_and_tests():
    text = TUTORIAL.read_text(encoding="utf-8")
    sections = re.split(r"^# ### (?:\d+\. )?", text, flags=re.MULTILINE)[1:]
    assert [section.split("\n")[0] for section in sections] == [bug.heading for bug in BUGS]
    for bug, section in zip(BUGS, sections, strict=True):
        file, test = bug.test.split("::")
        named = " ".join(section.replace("\n# ", " ").split())
        assert f"Caught by `{test}` (`{file}`)" in named, f"{bug.heading} does not name {bug.test}"


@each_bug
def test_each_bug_is_a_change_of_one_line_that_is_there(bug):
    assert (PACKAGE / bug.file).read_text(encoding="utf-8").count(bug.right) == 1


@each_bug
def test_each_named_test_exists(bug):
    file, test = bug.test.split("::")
    assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")


def run_in(folder, *tests):
    """The named tests, run in a folder that holds a copy of package and tests."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what the named tests need, in which all of them pass while no bug is planted."""
    folder = tmp_path_factory.mktemp("zoo")
    ignored = shutil.ignore_patterns("__pycache__")
    for source in (PACKAGE, ROOT / "tests", ROOT / "tutorials", ROOT / "docs"):
        shutil.copytree(source, folder / source.name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    unchanged = run_in(folder, *{bug.test for bug in BUGS})
    assert unchanged.returncode == 0, unchanged.stdout + unchanged.stderr
    return folder


@pytest.mark.slow
@each_bug
def test_the_named_test_catches_the_bug(bug, copy):
    file = copy / "minilora" / bug.file
    right = file.read_text(encoding="utf-8")
    try:
        file.write_text(right.replace(bug.right, bug.wrong), encoding="utf-8")
        planted = run_in(copy, bug.test)
    finally:
        file.write_text(right, encoding="utf-8")
    assert planted.returncode == 1, f"{bug.test} does not fail:\n{planted.stdout}{planted.stderr}"
    assert " failed" in planted.stdout and "SyntaxError" not in planted.stdout, planted.stdout
