"""GGUF files: what is converted, and what is refused by name. Needs the gguf package."""

import json
import math
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from minilora import complete, load_model
from minilora.errors import MiniloraError
from minilora.formats import load_base
from minilora.formats.gguf import convert
from minilora.formats.gguf_tokenizer import tokenizer_files
from minilora.formats.tensors import read_tensors
from minilora.llama import LinearScaling

gguf = pytest.importorskip("gguf", reason="needs gguf: install minilora[gguf]")
tokenizers = pytest.importorskip("tokenizers")
from gguf_files import (  # noqa: E402
    BEGIN,
    BYTES,
    END,
    LAYERS,
    THINK,
    TOKENS,
    TYPES,
    C,
    F,
    G,
    H,
    K,
    V,
    a_file,
    drawn,
)  # fmt: skip


def converted(tmp_path, *args, **options):
    """The folder that a file becomes."""
    path = a_file(tmp_path / "model.gguf", *args, **options)
    convert(path, tmp_path / "out")
    return tmp_path / "out"


def tensors_of(folder):
    return read_tensors(folder / "model.safetensors")[0]


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def refused(tmp_path, match, *args, **options):
    """The file is refused in a sentence that names it, and nothing is left of the folder."""
    path = a_file(tmp_path / "model.gguf", *args, **options)
    with pytest.raises(MiniloraError, match=match) as caught:
        convert(path, tmp_path / "out")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- weights -----------------------------------------------------------------------------------


def in_halves(rows, heads):
    """Row j of a head is its row 2j in the file, row j + K/2 its row 2j + 1: written out."""
    result = np.empty_like(rows)
    for head in range(heads):
        for j in range(K // 2):
            result[head * K + j] = rows[head * K + 2 * j]
            result[head * K + K // 2 + j] = rows[head * K + 2 * j + 1]
    return result


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_rows_of_q_and_k_and_their_biases_are_put_in_halves_of_a_llama_alone(tmp_path, kind):
    biases = ("attn_q", "attn_k", "attn_v", *(["attn_output"] if kind == "llama" else []))
    found = drawn(biases=biases)
    saved = tensors_of(converted(tmp_path, found, kind=kind))
    for i in range(LAYERS):
        for theirs, ours, heads in (
            ("attn_q", "q_proj", H), ("attn_k", "k_proj", G), ("attn_v", "v_proj", None),
        ):  # fmt: skip
            for part in ("weight", "bias"):
                rows = found[f"blk.{i}.{theirs}.{part}"]
                expected = in_halves(rows, heads) if heads and kind == "llama" else rows
                actual = saved[f"model.layers.{i}.self_attn.{ours}.{part}"]
                assert np.array_equal(actual, expected), (theirs, part)
    document = config_of(tmp_path / "out")
    assert document["model_type"] == kind
    assert document.get("attention_bias", True) is True


def test_every_other_tensor_is_renamed_and_unchanged(tmp_path):
    found = drawn(head=True)
    saved = tensors_of(converted(tmp_path, found))
    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
        "blk.1.attn_norm": "model.layers.1.input_layernorm",
        "blk.1.attn_output": "model.layers.1.self_attn.o_proj",
        "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
        "blk.1.ffn_gate": "model.layers.1.mlp.gate_proj",
        "blk.1.ffn_up": "model.layers.1.mlp.up_proj",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
    }  # fmt: skip
    for theirs, ours in names.items():
        assert np.array_equal(saved[f"{ours}.weight"], found[f"{theirs}.weight"]), theirs
    assert len(saved) == len(found)
    base, config = load_base(tmp_path / "out")
    assert "head" in base, "the file has a head of its own"
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_sizes_and_constants_are_those_of_the_file(tmp_path):
    folder = converted(tmp_path, fields={"llama.attention.layer_norm_rms_epsilon": 3e-4})
    base, config = load_base(folder)
    assert "head" not in base
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (V, C, F)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_width) == (H, G, K)
    assert (config.max_position_embeddings, config.num_hidden_layers) == (64, LAYERS)
    assert (config.rms_norm_eps, config.rope_theta) == (3e-4, 1e5), "shortest decimals of float32"


def test_missing_fields_have_llama_cpp_s_defaults(tmp_path):
    fields = dict.fromkeys(("llama.rope.freq_base", "llama.rope.dimension_count"))
    assert load_base(converted(tmp_path, fields=fields))[1].rope_theta == 10000.0


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16"])
def test_types_are_dequantised(tmp_path, name):
    kind = getattr(gguf.GGMLQuantizationType, name)
    found = drawn()
    folder = converted(tmp_path, found, types={"blk.0.ffn_down.weight": kind})
    actual = tensors_of(folder)["model.layers.0.mlp.down_proj.weight"]
    error = np.abs(actual - found["blk.0.ffn_down.weight"]).max()
    assert 0 < error < {"Q8_0": 0.03, "F16": 2e-3, "BF16": 2e-2}.get(name, 0.5)


def test_the_layout_of_a_block_is_llama_cpp_s(tmp_path):
    """Q4_1: scale and minimum as float16, then values 0 to 15 in the low nibbles, 16 to 31 high."""
    found = drawn()
    d, m = np.float16(0.5), np.float16(-3.0)
    nibbles = np.arange(C * F).reshape(C, F // 32, 32) % 16
    blocks = np.concatenate(
        [
            np.broadcast_to(np.array([d, m]).view(np.uint8), (C, F // 32, 4)),
            (nibbles[..., :16] | nibbles[..., 16:] << 4).astype(np.uint8),
        ],
        axis=-1,
    ).reshape(C, -1)
    path = tmp_path / "model.gguf"
    kind = gguf.GGMLQuantizationType.Q4_1
    quantize = gguf.quantize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "quantize", lambda x, k: blocks if k == kind else quantize(x, k))
        a_file(path, found, types={"blk.0.ffn_down.weight": kind})
    convert(path, tmp_path / "out")
    actual = tensors_of(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"]
    assert np.array_equal(actual, 0.5 * nibbles.reshape(C, F) - 3.0)


def test_a_type_that_is_not_known_is_refused_by_name(tmp_path):
    found = drawn() | {"blk.0.ffn_down.weight": np.ones((C, F), np.int8)}
    refused(tmp_path, r"blk\.0\.ffn_down\.weight is of type I8", found)


def test_numbers_beyond_float16_are_refused_when_float16_is_written(tmp_path):
    found = drawn()
    found["output_norm.weight"][3] = 65536.0
    path = a_file(tmp_path / "model.gguf", found)
    with pytest.raises(MiniloraError, match=r"output_norm\.weight holds .* not finite in float16"):
        convert(path, tmp_path / "half", dtype=np.float16)
    convert(path, tmp_path / "single")
    assert tensors_of(tmp_path / "single")["model.norm.weight"][3] == 65536.0


@pytest.mark.parametrize("change", ["missing", "left over", "of the wrong shape"])
def test_tensors_that_do_not_fit_the_fields_are_listed(tmp_path, change):
    found = drawn()
    if change == "missing":
        del found["blk.1.ffn_up.weight"]
    elif change == "left over":
        found["blk.1.ffn_gate_inp.weight"] = np.ones((4, C), np.float32)
    else:
        found["blk.1.attn_k.weight"] = np.ones((H * K, C), np.float32)
    refused(tmp_path, f"{change}: blk.1", found)


# --- the angles --------------------------------------------------------------------------------


def divisors(theta, width, factor, low, high, original):
    """Llama 3's, band by band, as the paper's code has them."""
    found = []
    for j in range(width // 2):
        wavelength = 2 * math.pi * theta ** (2 * j / width)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def with_heads_of(width):
    """Fields and tensors of a Llama with heads of another width."""
    found = drawn()
    for i in range(LAYERS):
        rng = np.random.default_rng(i)
        for name, heads in (("attn_q", H), ("attn_k", G), ("attn_v", G)):
            weight = rng.standard_normal((heads * width, C)).astype(np.float32)
            found[f"blk.{i}.{name}.weight"] = weight
        found[f"blk.{i}.attn_output.weight"] = np.ones((C, H * width), np.float32)
    names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    return {f"llama.{name}": width for name in names}, found


def test_llama_3_s_divisors_become_its_scaling(tmp_path):
    fields, found = with_heads_of(64)
    table = divisors(5e5, 64, 32.0, 1.0, 4.0, 8192)
    np.testing.assert_allclose(table[14:19], [1, 1.6513, 3.2923, 9.6667, 32], rtol=1e-4)
    found["rope_freqs.weight"] = table
    folder = converted(tmp_path, found, fields={**fields, "llama.rope.freq_base": 5e5})
    assert load_base(folder)[1].rope_scaling == (32.0, 1.0, 4.0, 8192)
    assert config_of(folder)["rope_parameters"] == {
        "rope_theta": 5e5, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip


def test_other_settings_of_the_scaling_are_found_from_the_divisors(tmp_path):
    fields, found = with_heads_of(64)
    found["rope_freqs.weight"] = divisors(5e5, 64, 8.0, 2.0, 6.0, 1000)
    folder = converted(tmp_path, found, fields={**fields, "llama.rope.freq_base": 5e5})
    scaling = load_base(folder)[1].rope_scaling
    assert scaling == (8.0, 1.0, 3.0, 500), "the same as low 2, high 6, original 1000"


def test_linear_scaling_is_that_of_the_file(tmp_path):
    fields = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    folder = converted(tmp_path, fields=fields)
    assert load_base(folder)[1].rope_scaling == LinearScaling(4.0)
    assert config_of(folder)["rope_parameters"]["rope_type"] == "linear"


def test_divisors_of_one_are_no_scaling(tmp_path):
    found = drawn() | {"rope_freqs.weight": np.ones(K // 2, np.float32)}
    assert load_base(converted(tmp_path, found))[1].rope_scaling is None


@pytest.mark.parametrize("table", [[1, 3, 2, 4], [2, 2, 2, 2], [1, 1, 1], [1, 1, np.nan, 4]])
def test_divisors_that_are_no_scaling_of_llama_3_s_are_refused(tmp_path, table):
    found = drawn() | {"rope_freqs.weight": np.array(table, np.float32)}
    refused(tmp_path, r"rope_freqs\.weight", found)


# --- fields ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("general.architecture", "gemma3", "architecture is 'gemma3'"),
        ("llama.expert_count", 8, "llama.expert_count is 8"),
        ("llama.attention.sliding_window", 4096, "attention.sliding_window is 4096"),
        ("llama.attention.causal", False, "attention.causal is False"),
        ("llama.rope.scaling.type", "yarn", "rope.scaling.type is 'yarn' with a factor of 0"),
        ("llama.rope.scaling.type", "linear", r"rope_scaling LinearScaling\(factor=0.0\)"),
        ("llama.rope.scaling.factor", 4.0, "rope.scaling.type is 'none' with a factor of 4"),
        ("llama.logit_scale", 2.0, "logit_scale is 2.0"),
        ("llama.rope.dimension_count", 4, "dimension_count is 4, but the heads are of width 8"),
        ("llama.attention.value_length", 16, "value_length is 16, but the heads"),
        ("llama.attention.head_count", 4, "blk.0.attn_q.weight is"),
        ("llama.attention.head_count", [6, 6], "head_count is \\[6, 6\\]"),
        ("llama.attention.head_count", "six", "head_count is 'six'"),
        ("llama.attention.head_count", 0, "num_attention_heads 0 is too small"),
        ("llama.attention.head_count_kv", 4, "6 is not a multiple of num_key_value_heads 4"),
        ("llama.block_count", 3, "block_count is 3, but there are 2 blocks"),
        ("llama.block_count", 0, "num_hidden_layers 0 is too small"),
        ("llama.block_count", 2**24, "block_count is 16777216, but there are 2"),
        ("llama.context_length", None, "no llama.context_length"),
        ("llama.attention.layer_norm_rms_epsilon", None, "no llama.attention.layer_norm_rms"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "layer_norm_rms_epsilon is nan"),
    ],
)
def test_a_field_that_is_not_understood_is_refused(tmp_path, name, value, match):
    refused(tmp_path, match, fields={name: value})


def test_fields_that_change_nothing_are_read(tmp_path):
    fields = {
        "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0,
        "llama.attention.causal": True, "llama.vocab_size": V, "general.file_type": 3,
    }  # fmt: skip
    converted(tmp_path, fields=fields)


# --- the file itself ---------------------------------------------------------------------------


def test_every_length_of_the_metadata_and_every_alignment_is_read(tmp_path):
    expected = None
    for number, alignment in [*((n, 32) for n in range(32)), (5, 8), (5, 16), (5, 64)]:
        writer_options = {"general.note": "x" * number}
        folder = tmp_path / f"{number} {alignment}"
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            if alignment != 32:
                plain = gguf.GGUFWriter.write_header_to_file

                def aligned(self, *args, alignment=alignment, plain=plain, **options):
                    self.add_custom_alignment(alignment)
                    plain(self, *args, **options)

                patch.setattr(gguf.GGUFWriter, "write_header_to_file", aligned)
            found = tensors_of(converted(folder, fields=writer_options))
        expected = expected or found
        assert all(np.array_equal(found[name], expected[name]) for name in expected), alignment


@pytest.mark.parametrize("alignment", [0, 3])
def test_an_alignment_that_is_none_is_refused(tmp_path, alignment):
    refused(tmp_path, "damaged", fields={"general.alignment": alignment})


def test_big_endian_files_are_read_unless_they_are_quantised(tmp_path):
    big = {"endianess": gguf.GGUFEndian.BIG}
    for folder in ("big", "little"):
        (tmp_path / folder).mkdir()
    ours = tensors_of(converted(tmp_path / "big", **big))
    expected = tensors_of(converted(tmp_path / "little"))
    assert all(np.array_equal(ours[name], expected[name]) for name in expected)
    kind = {"blk.0.ffn_down.weight": gguf.GGMLQuantizationType.Q8_0}
    refused(tmp_path, r"ffn_down\.weight is of type Q8_0 in a big-endian file", types=kind, **big)


@pytest.mark.parametrize("version", [0, 1, 2, 3, 4])
def test_versions_2_and_3_are_read(tmp_path, version):
    path = a_file(tmp_path / "model.gguf")
    data = bytearray(path.read_bytes())
    data[4:8] = version.to_bytes(4, "little")
    path.write_bytes(data)
    if version in (2, 3):
        convert(path, tmp_path / "out")
    else:
        with pytest.raises(MiniloraError, match="GGUF file of version 2 or 3"):
            convert(path, tmp_path / "out")


def test_a_file_that_was_cut_off_is_refused_wherever_that_is(tmp_path):
    data = a_file(tmp_path / "model.gguf").read_bytes()
    path, step = tmp_path / "cut.gguf", len(data) // 40
    for length in [*range(0, 64, 3), *range(64, len(data), step), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(MiniloraError, match=r"cut\.gguf is no GGUF file") as caught:
            convert(path, tmp_path / "out")
        assert "\n" not in str(caught.value), length


@pytest.mark.parametrize("number", range(4))
def test_a_length_that_no_file_has_takes_no_time(tmp_path, number):
    """Whether or not the file ends with a whole entry of the list."""
    path = a_file(tmp_path / "model.gguf", fields={"tokenizer.ggml.model": "x" * number})
    data, name = bytearray(path.read_bytes()), b"tokenizer.ggml.token_type"
    length = data.index(name) + len(name) + 8  # after the types of the field and of its entries
    data[length : length + 8] = (2**60).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(MiniloraError, match="damaged"):
        convert(path, tmp_path / "out")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.gguf").write_text("hello", encoding="utf-8")
    (tmp_path / "folder.gguf").mkdir()
    for name, match in (("text", "no GGUF"), ("folder", "not a file"), ("none", "does not exist")):
        with pytest.raises(MiniloraError, match=match):
            convert(tmp_path / f"{name}.gguf", tmp_path / "out")


def test_without_the_package_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MiniloraError, match="pip install gguf"):
        convert(tmp_path / "model.gguf", tmp_path / "out")


def test_a_folder_that_holds_anything_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(MiniloraError, match=r"already holds mine\.txt"):
        convert(a_file(tmp_path / "model.gguf"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


# --- files in parts ----------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    """A file in parts, whose head is in the last of them."""
    found = drawn()
    found["output.weight"] = drawn(head=True)["output.weight"]
    a_file(tmp_path / "part.gguf", found, split_max_tensors=8)
    return sorted(tmp_path.glob("part-*-of-*.gguf"))


def test_all_parts_of_a_file_are_read(tmp_path, parts):
    assert len(parts) == 3
    a_file(tmp_path / "whole.gguf", {**drawn(), "output.weight": drawn(head=True)["output.weight"]})
    for number, path in enumerate([*parts, tmp_path / "whole.gguf"]):
        convert(path, tmp_path / f"out{number}")
        assert config_of(tmp_path / f"out{number}")["tie_word_embeddings"] is False
    expected = tensors_of(tmp_path / "out3")
    for number in range(3):
        found = tensors_of(tmp_path / f"out{number}")
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_part_that_is_missing_or_another_is_named(tmp_path, parts):
    kept = parts[2].read_bytes()
    parts[2].unlink()
    with pytest.raises(MiniloraError, match=r"part-00003-of-00003\.gguf does not exist"):
        convert(parts[0], tmp_path / "out")
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(MiniloraError, match="00003-of-00003.gguf says that it is part 1 of 3"):
        convert(parts[0], tmp_path / "out")
    parts[2].write_bytes(kept)
    renamed = parts[0].rename(tmp_path / "other.gguf")
    with pytest.raises(MiniloraError, match=r"other\.gguf is one of 3 parts"):
        convert(renamed, tmp_path / "out")


# --- the tokenizer -----------------------------------------------------------------------------

WORDS = {  # what a text is cut into before merges apply
    "gpt-2": {"a 1234": ["a", "Ġ1234"], "we'LL we'll": ["we", "'", "LL", "Ġwe", "'ll"]},
    "smollm": {"a 1234": ["a", "Ġ", "1", "2", "3", "4"], "\n\n x": ["ĊĊ", "Ġx"]},
    "llama-bpe": {
        "a 1234567": ["a", "Ġ", "123", "456", "7"], "we'LL": ["we", "'LL"],
        "x\n\n  y": ["x", "ĊĊ", "Ġ", "Ġy"], "(a) b!\n": ["(a", ")", "Ġb", "!Ċ"],
    },
    "qwen2": {
        "a 12": ["a", "Ġ", "1", "2"], "we'LL": ["we", "'LL"], "e\u0301": ["Ã©"],
        "x\n\n  y": ["x", "ĊĊ", "Ġ", "Ġy"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_a_text_is_cut_as_the_named_tokenizer_cuts_it(tmp_path, name):
    folder = converted(tmp_path, fields={"tokenizer.ggml.pre": name})
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, words in WORDS[name].items():
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        found = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert found == words, text


@pytest.mark.parametrize("name", WORDS)
def test_what_is_decoded_is_what_was_encoded(tmp_path, name):
    tokenizer = load_model(converted(tmp_path, fields={"tokenizer.ggml.pre": name})).tokenizer
    for text in ("hello world\n\t 123", "\U0001f600 \u4f60\x00\x7f", "it's <think> <|end|>\r\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("hello")) == 1, "merges apply"
    for token in (BEGIN, END, THINK):
        assert tokenizer.encode(TOKENS[token]).tolist() == [token], "added tokens are never cut"
    assert tokenizer.decode([BYTES.index("ð")]) == "\ufffd", "a byte that is no UTF-8"
    assert tokenizer.end_of_text == END


@pytest.mark.parametrize("pre", ["smaug-bpe", "default", "", None])
def test_a_way_of_cutting_that_is_not_known_is_refused_by_name(tmp_path, pre):
    refused(tmp_path, r"tokenizer\.ggml\.pre is .*--tokenizer", fields={"tokenizer.ggml.pre": pre})


def test_a_tokenizer_json_can_be_given_for_one_that_is_not_known(tmp_path):
    given = converted(tmp_path) / "tokenizer.json"
    fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    path = a_file(tmp_path / "other.gguf", fields=fields)
    with pytest.raises(MiniloraError, match=r"tokenizer\.ggml\.model is 'llama'.*--tokenizer"):
        convert(path, tmp_path / "second")
    convert(path, tmp_path / "second", tokenizer=given)
    assert (tmp_path / "second" / "tokenizer.json").read_bytes() == given.read_bytes()
    fields["tokenizer.ggml.tokens"] = [*TOKENS[:5], "?!", *TOKENS[6:]]
    path = a_file(tmp_path / "third.gguf", fields=fields)
    with pytest.raises(MiniloraError, match=r"is not the tokenizer of .*'\?!' has the id None"):
        convert(path, tmp_path / "third", tokenizer=given)


@pytest.mark.parametrize(
    ("pre", "adds", "expected"),
    [("smollm", True, 1), ("smollm", False, 0), ("smollm", None, 0), ("llama-bpe", None, 1)],
)
def test_a_text_begins_with_its_token_once_or_not_at_all(tmp_path, pre, adds, expected):
    fields = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": adds}
    folder = converted(tmp_path, fields=fields)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode("hello", add_special_tokens=True).ids
    assert ids.count(BEGIN) == expected and ids[-1] == TOKENS.index("hello")


def test_control_tokens_are_special_and_user_defined_ones_are_not(tmp_path):
    document = json.loads((converted(tmp_path) / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["content"]: token["special"] for token in document["added_tokens"]}
    assert added == {"<|begin|>": True, "<|end|>": True, "<think>": False}


def test_every_token_that_ends_a_text_is_named(tmp_path):
    folder = converted(tmp_path, fields={"tokenizer.ggml.eot_token_id": THINK})
    for name in ("config.json", "generation_config.json"):
        document = json.loads((folder / name).read_text(encoding="utf-8"))
        assert document["eos_token_id"] == [END, THINK] and document["bos_token_id"] == BEGIN
    assert load_model(folder).tokenizer.ends == {END, THINK}


def test_spare_rows_stay_and_their_names_go(tmp_path):
    found = drawn()
    spare = np.ones((3, C), np.float32)
    found["token_embd.weight"] = np.concatenate([found["token_embd.weight"], spare])
    fields = {
        "tokenizer.ggml.tokens": [*TOKENS, "[PAD1]", "[PAD2]", "[PAD3]"],
        "tokenizer.ggml.token_type": [*TYPES, 5, 5, 5],
    }
    folder = converted(tmp_path, found, fields=fields)
    base, config = load_base(folder)
    assert config.vocab_size == V + 3 and np.array_equal(base["wte"][-3:], spare)
    assert "[PAD" not in (folder / "tokenizer.json").read_text(encoding="utf-8")
    base["wte"][-2] *= 1e3  # the greatest logit or, where its sign is the other, the least
    model = load_model(folder)
    for sign in (1.0, -1.0):
        base["wte"][-2] *= sign
        drawn_ids = list(complete(replace(model, base=base), "hello", max_tokens=9, seed=1))
        assert drawn_ids and max(drawn_ids) < V


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"tokens": [*TOKENS, "more"], "token_type": [*TYPES, 1]}, f"{V + 1} tokens, but rows"),
        ({"tokens": [*TOKENS[:-1], "he"]}, "a token twice"),
        ({"tokens": None}, "no list of texts tokenizer.ggml.tokens"),
        ({"merges": None}, "no list of texts tokenizer.ggml.merges"),
        ({"merges": ["h e l"]}, "'h e l', expected two tokens"),
        ({"token_type": [1]}, "token_type has no type for each"),
        ({"eos_token_id": 9999}, "eos_token_id is 9999"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes'"),
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path, fields, match):
    named = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    refused(tmp_path, match, fields=named)


def test_a_large_vocabulary_takes_seconds(tmp_path):
    """128,000 tokens, each the merge of two before it; another program took 50 minutes for such."""
    pairs = [(a, b) for a in BYTES for b in BYTES]
    pairs = [*pairs, *((a + b, c) for a, b in pairs for c in BYTES)][: 128_000 - len(BYTES)]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*BYTES, *(a + b for a, b in pairs)],
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in pairs],
    }
    start = time.process_time()
    files = tokenizer_files(fields, 128_000, tmp_path / "model.gguf", given=None)
    tokenizer = tokenizers.Tokenizer.from_str(bytes(files["tokenizer.json"][0]).decode())
    assert time.process_time() - start < 10
    ids = tokenizer.encode("hello").ids
    assert len(ids) < 5 and tokenizer.decode(ids) == "hello"
