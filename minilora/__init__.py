"""Low-rank adaptation of a GPT in plain NumPy, every gradient written by hand and checked.

    model = minilora.load_model()
    corpus = minilora.load_corpus("python", model.tokenizer)     # or corpus_from_text(text, …)
    adapted, trained = minilora.adapt(model, corpus, minilora.LoRAConfig(rank=2))
    print(adapted.generate("def "))

The mathematics is in `minilora.ops`, `loss`, `lora`, `gpt2`, `network` and `keep`: read them in
this order.
"""

import minilora.start  # noqa: F401, I001  # before all others, see there

from typing import TYPE_CHECKING

from minilora.adapters import LoRAConfig, lora_init
from minilora.data import corpus_from_text, load_corpus
from minilora.errors import MiniloraError
from minilora.formats import load_adapter, load_base, save_adapter, save_base
from minilora.formats.gguf import convert
from minilora.gpt2 import GPTConfig
from minilora.keep import Plan
from minilora.lora import merge, unmerge
from minilora.mixing import mix
from minilora.model import Model, complete, evaluate, load_model
from minilora.network import Net, loss_and_grads
from minilora.records.corpus import corpus_from_records, load_records
from minilora.training.loop import TrainConfig
from minilora.training.runs import adapt

__version__: str  # looked up when it is asked for

if TYPE_CHECKING:
    from minilora.cli.play import play
    from minilora.cli.run_report import RunReport, sampled
else:  # a type checker thinks that a module with this function has every name
    LATER = {"play": "play", "RunReport": "run_report", "sampled": "run_report"}

    def __getattr__(name):
        """What is loaded when it is asked for: `__version__`, and names of `minilora.cli`."""
        from importlib import import_module

        if name in LATER:
            return getattr(import_module(f"minilora.cli.{LATER[name]}"), name)
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import metadata

        try:
            return metadata.version("minilora")
        except metadata.PackageNotFoundError:  # a folder of sources that was never installed
            return "unknown"


__all__ = [
    "GPTConfig",
    "LoRAConfig",
    "MiniloraError",
    "Model",
    "Net",
    "Plan",
    "RunReport",
    "TrainConfig",
    "adapt",
    "complete",
    "convert",
    "corpus_from_records",
    "corpus_from_text",
    "evaluate",
    "load_adapter",
    "load_base",
    "load_corpus",
    "load_model",
    "load_records",
    "lora_init",
    "loss_and_grads",
    "merge",
    "mix",
    "play",
    "sampled",
    "save_adapter",
    "save_base",
    "unmerge",
]
