"""The base that comes with minilora opens in transformers and computes the same logits there."""

import numpy as np
import pytest

import minilora

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle


# On a full context the rounding of float32 reaches 1.5e-4 in logits of size 20, in either library;
# so float32 is compared on half of it, and the whole in float64.
@pytest.mark.parametrize(
    ("dtype", "length", "atol"), [("float32", 256, 1e-4), ("float64", 512, 1e-9)]
)
@pytest.mark.parametrize(
    "text", ["It is a truth universally acknowledged, that ", "def __init__(self, name):\n    "]
)
def test_the_built_in_base_opens_in_transformers(
    text: str, dtype: str, length: int, atol: float
) -> None:
    model = minilora.load_model(dtype=dtype)
    tokens = model.tokenizer.encode(text * 20)[None, :length]
    theirs = transformers.GPT2LMHeadModel.from_pretrained(model.folder).eval()
    theirs = theirs.to(getattr(torch, dtype))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(model.logits(tokens), expected, rtol=0.0, atol=atol)
