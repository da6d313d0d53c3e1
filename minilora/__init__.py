"""Low-rank adaptation of a GPT in plain NumPy, every gradient written by hand and checked.

    model = minilora.load_model()
    corpus = minilora.load_corpus("python", model.tokenizer)
    adapted, trained = minilora.adapt(model, corpus, minilora.LoRAConfig(rank=2))

The mathematics is in `minilora.ops`, `loss`, `lora`, `gpt2`, `network` and `keep`: read them in
this order.
"""

from minilora.adapters import LoRAConfig, lora_init
from minilora.data import load_corpus
from minilora.errors import MiniloraError
from minilora.formats import load_adapter, load_base, save_adapter, save_base
from minilora.gpt2 import GPTConfig
from minilora.keep import Plan
from minilora.lora import merge, unmerge
from minilora.mix import mix
from minilora.model import Model, complete, evaluate, load_model
from minilora.network import Net, loss_and_grads
from minilora.training.loop import TrainConfig
from minilora.training.runs import adapt

__version__ = "0.1.0"

__all__ = [
    "GPTConfig",
    "LoRAConfig",
    "MiniloraError",
    "Model",
    "Net",
    "Plan",
    "TrainConfig",
    "adapt",
    "complete",
    "evaluate",
    "load_adapter",
    "load_base",
    "load_corpus",
    "load_model",
    "lora_init",
    "loss_and_grads",
    "merge",
    "mix",
    "save_adapter",
    "save_base",
    "unmerge",
]
