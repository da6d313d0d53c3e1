"""Files at the border: safetensors, bases as Hugging Face stores them, adapters as PEFT does.

A base and an adapter are folders in the ecosystem's own layouts. Nothing is ever unpickled, every
file is replaced in one step, and a file that does not fit is refused in one sentence.
"""

from minilora.formats.base import load_base, save_base
from minilora.formats.peft import fused_blocks, load_adapter, save_adapter

__all__ = ["fused_blocks", "load_adapter", "load_base", "save_adapter", "save_base"]
