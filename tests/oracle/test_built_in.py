"""The base that comes with minilora opens in transformers and computes the same logits there."""

import numpy as np
import pytest

import minilora

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

# float32 rounding grows with the logits, which reach 20: either side is within some 1.5e-4 of the
# exact value on a full context, so that only float64 tells equal from nearly equal.
TOLERANCES = {"float32": {"rtol": 1e-4, "atol": 1e-4}, "float64": {"rtol": 1e-9, "atol": 1e-9}}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "text", ["It is a truth universally acknowledged, that ", "def __init__(self, name):\n    "]
)
def test_the_built_in_base_opens_in_transformers(text: str, dtype: str) -> None:
    model = minilora.load_model(dtype=dtype)
    tokens = model.tokenizer.encode(text * 20)[None, : model.config.n_positions]
    theirs = transformers.GPT2LMHeadModel.from_pretrained(model.folder).eval()
    theirs = theirs.to(getattr(torch, dtype))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(model.logits(tokens), expected, **TOLERANCES[dtype])
