"""The same case in PyTorch, with transformers and PEFT, in the fastest way that we know of.

No dropout, no key/value cache unless text is generated, the loss from the logits directly, AdamW on
the adapters alone, and both of transformers' attentions, of which the caller takes the better. Also
our matrix products in PyTorch, to see how much of a difference is due to the BLAS libraries.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from minilora.bench.case import CLIP, LEARNING_RATE, PROMPT, Case
from minilora.bench.measure import products_of, random_model, seconds_of, serve
from minilora.bench.products import prepare
from minilora.data import draw_batch
from minilora.errors import MiniloraError
from minilora.formats import llama
from minilora.gpt2 import GPTConfig
from minilora.llama import LlamaConfig

ATTENTIONS = ("sdpa", "eager")
MODULES: dict[type, dict[str, str]] = {
    GPTConfig: {
        "qkv": "attn.c_attn",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
        "embedding": "wte",
    },
    LlamaConfig: {
        **{path.rpartition(".")[2]: name for name, path in llama.MODULES.items()},
        "embedding": "embed_tokens",
    },
}


def has_adapters(case: Case) -> bool:
    """Whether what is timed has adapters: a training step of method lora."""
    return case.what == "step" and case.method == "lora"


def check(case: Case) -> None:
    """Raise MiniloraError if the comparison cannot be made."""
    for name in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            raise MiniloraError(f"--versus peft needs {name}: pip install {name}")
    modules = MODULES[type(case.config)]
    for target in case.targets if has_adapters(case) else ():
        if target not in modules:
            model = {GPTConfig: "GPT-2", LlamaConfig: "Llama"}[type(case.config)]
            raise MiniloraError(
                f"PEFT has no target {target!r} in {model}; --versus peft has {', '.join(modules)}"
            )


def measure_peft(case: Case, asked: Iterable[bytes], *, attention: str) -> None:
    """Time PEFT's step, or another case, on request (see `serve`)."""
    started = time.perf_counter()
    warnings.simplefilter("ignore")
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    figures: dict[str, Any] = {"import_seconds": time.perf_counter() - started}
    torch.set_num_threads(case.threads)
    model = make_model(case, attention)
    job = JOBS[case.what](case, model.to(case.device))
    figures["first_step_seconds"] = seconds_of(job)
    job()
    serve(job, figures, asked)


def measure_products(case: Case, asked: Iterable[bytes]) -> None:
    """Time the case's matrix products alone, each for the whole batch, on request (see `serve`)."""
    started = time.perf_counter()
    import torch

    figures: dict[str, Any] = {"import_seconds": time.perf_counter() - started}
    torch.set_num_threads(case.threads)
    products = products_in_torch(case)

    def job() -> None:
        for a, b, out in products:
            torch.matmul(a, b, out=out)
        if case.device != "cpu":
            torch.cuda.synchronize()

    figures["first_step_seconds"] = seconds_of(job)
    job()
    serve(job, figures, asked)


def products_in_torch(case: Case) -> list[list[Any]]:
    """Both operands and the result of every product of our run, in the same memory layout."""
    import torch

    items = products_of(replace(case, threads=1), random_model(case))
    return [
        [torch.from_numpy(x).to(case.device) for x in (product.a, product.b, product.out)]
        for item in prepare(items, "cpu")
        for product in item
    ]


def make_model(case: Case, attention: str) -> Any:
    """The case's model with random weights, and with adapters if they are trained."""
    import peft

    model = make_base(case.config, attention)
    if not has_adapters(case):
        return model
    modules = MODULES[type(case.config)]
    adapters = peft.LoraConfig(
        r=case.rank, lora_alpha=case.rank, lora_dropout=0.0,
        fan_in_fan_out=isinstance(case.config, GPTConfig),
        target_modules=[modules[target] for target in case.targets],
    )  # fmt: skip
    return peft.get_peft_model(model, adapters)


def make_base(c: GPTConfig | LlamaConfig, attention: str) -> Any:
    """The model of transformers with random weights and a tied head."""
    import transformers

    if isinstance(c, LlamaConfig):
        document = llama.config_document(c, "llama", tied=True, with_bias=())
        config = transformers.LlamaConfig(**document, attn_implementation=attention)
        return transformers.LlamaForCausalLM(config)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.n_positions, n_embd=c.n_embd, n_layer=c.n_layer,
            n_head=c.n_head, n_inner=c.inner, layer_norm_epsilon=c.layer_norm_epsilon,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=None, eos_token_id=None, attn_implementation=attention,
        )
    )  # fmt: skip


def training_step(case: Case, model: Any) -> Callable[[], None]:
    """The job of `measure.training_step`."""
    import torch

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    text, rng = case.text(), np.random.default_rng(0)

    def job() -> None:
        batch = draw_batch(text, batch=case.batch, context=case.context, rng=rng)
        tokens, targets = (torch.from_numpy(x).long().to(case.device) for x in batch)
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        del logits  # else they exist throughout the backward pass
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return job


def evaluation(case: Case, model: Any) -> Callable[[], None]:
    """The job of `measure.evaluation`."""
    import torch

    model.eval()
    tokens = torch.from_numpy(case.text()[: case.tokens + 1]).long().to(case.device)
    inputs = tokens[:-1].reshape(case.batch, case.context)

    def job() -> None:
        with torch.inference_mode():
            logits = model(input_ids=inputs, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:]).item()

    return job


def generation(case: Case, model: Any) -> Callable[[], None]:
    """The job of `measure.generation`."""
    import torch

    model.eval()
    prompt = torch.from_numpy(case.text()[None, :PROMPT]).long().to(case.device)

    def job() -> None:
        with torch.inference_mode():
            text = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=case.context,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        assert text.shape == (1, PROMPT + case.context)

    return job


JOBS = {"step": training_step, "evaluate": evaluation, "generate": generation}
