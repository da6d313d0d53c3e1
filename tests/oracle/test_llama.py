"""Llama and Qwen2 against transformers, with adapters against PEFT: loss, gradients, text.

transformers computes its norms and its tables of angles in float32 whatever the model's dtype.
Here both are computed in float64, and the frequencies compared by themselves.
"""

import warnings
from dataclasses import replace

import numpy as np
import pytest

from minilora import llama
from minilora.adapters import LoRAConfig
from minilora.generate import generate
from minilora.keep import Plan
from minilora.network import Net, loss_and_grads
from minilora.tree import flatten, unflatten

pytestmark = pytest.mark.oracle

TOLERANCE = 1e-9  # of each tensor's largest entry
LAYERS, HEADS, VOCABULARY = 3, 4, 61
MODULES = {  # ours, and transformers'
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
CASES = {
    "tied, groups of 1": {"kv_heads": 4},
    "tied, groups of 2": {},
    "tied, groups of 4": {"kv_heads": 1},
    "untied, groups of 1": {"kv_heads": 4, "tied": False},
    "untied, groups of 2": {"tied": False},
    "untied, groups of 4": {"kv_heads": 1, "tied": False},
    "wide heads": {"head_dim": 12},
    "a bias on every map": {"attention_bias": True, "mlp_bias": True},
    "Qwen2": {"kind": "qwen2"},
    "Qwen2, untied": {"kind": "qwen2", "kv_heads": 1, "tied": False},
}
each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def double(monkeypatch):
    """transformers' norms and angles in float64."""
    import torch
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2

    def norm(self, x):
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(mean_square + self.variance_epsilon)

    def angles(self, x, position_ids):
        K = 2 * self.inv_freq.shape[0]
        theta = self.config.rope_parameters["rope_theta"]
        half = position_ids[..., None].double() * theta ** (-torch.arange(0, K, 2).double() / K)
        angle = torch.cat((half, half), dim=-1)
        return angle.cos(), angle.sin()

    for module, name in ((modeling_llama, "Llama"), (modeling_qwen2, "Qwen2")):
        monkeypatch.setattr(getattr(module, f"{name}RMSNorm"), "forward", norm)
        monkeypatch.setattr(getattr(module, f"{name}RotaryEmbedding"), "forward", angles)


def twin(*, kind="llama", kv_heads=2, tied=True, moved=0.1, **options):
    """transformers' model in float64, no number as it was drawn, and our sizes of it."""
    import torch
    import transformers

    names = {"llama": "Llama", "qwen2": "Qwen2"}[kind]
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 44,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 128, "rms_norm_eps": 1e-3,
    }  # fmt: skip
    config = getattr(transformers, f"{names}Config")(
        **sizes, **options, rope_theta=500.0, tie_word_embeddings=tied, bos_token_id=None,
        eos_token_id=None, pad_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{names}ForCausalLM")(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    head_dim = options.get("head_dim")
    return model, llama.LlamaConfig(**sizes, rope_theta=500.0, head_dim=head_dim)


def tree_of(named, *, tied):
    """Our tree of transformers' numbers by name: its parameters, or their gradients."""
    flat = {"wte": named["model.embed_tokens.weight"], "ln_f.w": named["model.norm.weight"]}
    if not tied:
        flat["head"] = named["lm_head.weight"]
    for i in range(LAYERS):
        there, here = f"model.layers.{i}", f"blocks.{i}"
        flat[f"{here}.ln_1.w"] = named[f"{there}.input_layernorm.weight"]
        flat[f"{here}.ln_2.w"] = named[f"{there}.post_attention_layernorm.weight"]
        for end, ours in (("weight", "w"), ("bias", "b")):
            maps = {
                path: named[f"{there}.{module}.{end}"].T
                for path, module in MODULES.items()
                if f"{there}.{module}.{end}" in named
            }
            fused = [maps.pop(f"attn.{name}") for name in "qkv" if f"attn.{name}" in maps]
            maps |= {"attn.qkv": np.concatenate(fused, axis=-1)} if fused else {}
            flat |= {f"{here}.{path}.{ours}": x for path, x in maps.items()}
    return unflatten(flat)


def arrays(parameters, *, gradients=False):
    return {
        name: (parameter.grad if gradients else parameter.detach()).numpy().copy()
        for name, parameter in parameters
    }


def a_batch():
    tokens = np.random.default_rng(1).integers(VOCABULARY, size=(3, 21))
    return tokens[:, :-1], np.where(tokens[:, 1:] % 7 == 0, -100, tokens[:, 1:])


def torch_loss(model, tokens, targets):
    """The mean loss, its gradients left at the parameters."""
    import torch

    logits = model(torch.from_numpy(tokens)).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).flatten()
    )
    loss.backward()
    return loss.item()


def assert_close(found, expected):
    """Every leaf within TOLERANCE of its largest entry."""
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        error = np.abs(found[path] - x).max() / np.abs(x).max()
        assert error <= TOLERANCE, f"{path} differs by {error:.1e}"


@each_case
def test_loss_and_every_gradient_are_those_of_transformers(case, double):
    options = CASES[case]
    model, config = twin(**options)
    tied = options.get("tied", True)
    base = tree_of(arrays(model.named_parameters()), tied=tied)
    tokens, targets = a_batch()
    expected = torch_loss(model, tokens, targets)
    gradients = tree_of(arrays(model.named_parameters(), gradients=True), tied=tied)
    mean, dbase, _ = loss_and_grads(
        Net(base, config), tokens=tokens, targets=targets, plan=Plan(base=True)
    )
    assert abs(mean - expected) <= TOLERANCE * expected
    assert_close(dbase, gradients)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_adapters_on_all_seven_weights_are_those_of_peft(kind, double):
    import torch
    from peft import LoraConfig, get_peft_model

    model, config = twin(kind=kind)
    base = tree_of(arrays(model.named_parameters()), tied=True)
    wanted = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # PEFT uses what transformers deprecates
        warnings.simplefilter("ignore")
        model = get_peft_model(model, wanted).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()

    def factors(**options):
        named = arrays([(n, p) for n, p in model.named_parameters() if "lora_" in n], **options)
        return unflatten({
            f"blocks.{i}.{path}.{AB}":
                named[f"base_model.model.model.layers.{i}.{module}.lora_{AB}.default.weight"].T
            for i in range(LAYERS) for path, module in MODULES.items() for AB in "AB"
        })  # fmt: skip

    targets_of = tuple(path.partition(".")[2] for path in MODULES)
    lora_config = LoRAConfig(rank=3, alpha=6.0, targets=targets_of)
    net = Net(base, config, factors(), lora_config)
    tokens, targets = a_batch()
    expected = torch_loss(model, tokens, targets)
    mean, _, dlora = loss_and_grads(net, tokens=tokens, targets=targets)
    assert abs(mean - expected) <= TOLERANCE * expected
    assert_close(dlora, factors(gradients=True))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_greedy_text_is_that_of_transformers(kind, double):
    import torch

    model, config = twin(kind=kind, tied=False, moved=0.5)
    net = Net(tree_of(arrays(model.named_parameters()), tied=False), config)
    prompt = [5, 17, 2, 40]
    written = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 4, dtype=torch.long),
        max_new_tokens=100, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    ours = list(generate(net, prompt_ids=prompt, max_tokens=100, temperature=0.0))
    assert ours == written[0, 4:].tolist()
    assert len(set(ours)) > 10, "the text is one token after the other"


@pytest.mark.parametrize(
    "scaling, parameters",
    [
        (None, {"rope_type": "default"}),
        (llama.LinearScaling(4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            llama.Llama3Scaling(8.0, 1.0, 4.0, 64),
            {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        ),
    ],
    ids=["plain", "linear", "llama3"],
)  # fmt: skip
def test_frequencies_are_those_of_transformers(scaling, parameters):
    """To float32's precision, in which transformers computes them."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=256,
        rope_parameters={"rope_theta": 500.0, **parameters},
    )  # fmt: skip
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    ours = llama.LlamaConfig(**sizes, rope_theta=500.0, rope_scaling=scaling, rms_norm_eps=1e-6)
    found, expected = llama.frequencies(ours), LlamaRotaryEmbedding(theirs).inv_freq.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    plain = llama.frequencies(replace(ours, rope_scaling=None))
    assert np.allclose(found, plain) == (scaling is None), "the scaling changes nothing"
