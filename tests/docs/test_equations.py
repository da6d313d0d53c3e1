"""The pages and the code say the same: tags, quoted lines, what is kept, numbers of the examples.

The examples are read from the pages. In the section "A 2 × 2 example by hand" each equation is
`name = part = … = value`, several of them side by side parted by `\\qquad`. A part that is nothing
but numbers is evaluated and compared with what the real operations give for that name: after "=" to
rounding, after "≈" to the four decimals that are printed. A part with letters is a formula and is
passed over; the last part must be numbers.
"""

import inspect
import math
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

from minilora import gpt2, keep, llama_ops, lora, loss, ops, optim
from minilora.adapters import Adapter, LoRAConfig, lora_init
from minilora.pairs import PAIRS

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path for path in sorted((ROOT / "docs" / "derivations").glob("*.md"))}
TEXT = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
HEADINGS = [
    "Forward",
    "Differentials",
    "Collecting terms",
    "What must be kept in memory",
    "A 2 × 2 example by hand",
    "Where it is in the code",
    "How it is tested",
]
each_page = pytest.mark.parametrize("page", PAGES)


# --- tags ----------------------------------------------------------------------------------------


def mentioned(text):
    """Every tag in square brackets; a range such as [LN.1-4] stands for all of its tags."""
    found = set()
    for name, first, last in re.findall(r"\[([A-Z]+)\.(\d+)(?:-(\d+))?\]", text):
        found |= {f"{name}.{i}" for i in range(int(first), int(last or first) + 1)}
    return found


def defined(text):
    """The tags of a page's equations, in order."""
    return re.findall(r"\\tag\{([^}]*)\}", text)


def tags_of_the_code():
    sources = sorted((ROOT / "minilora").rglob("*.py"))
    return {tag for path in sources for tag in mentioned(path.read_text(encoding="utf-8"))}


def test_tags_are_found():
    assert mentioned("[LN.2-4], x[LORA.10], [TAGS], [A.1-x]") == {"LN.2", "LN.3", "LN.4", "LORA.10"}
    assert defined(r"$$ y = x \tag{LIN.1} $$ \tag{LN.10}") == ["LIN.1", "LN.10"]


def test_the_tags_of_the_code_are_those_of_the_pages():
    code = tags_of_the_code()
    pages = {tag for text in TEXT.values() for tag in defined(text)}
    assert code, "no tag is found in the code"
    assert code == pages, (
        f"in minilora/ but without an equation in docs/derivations: {sorted(code - pages)}; "
        f"in docs/derivations but on no line of minilora/: {sorted(pages - code)}"
    )


def test_each_tag_stands_at_one_equation():
    places = {}
    for page, text in TEXT.items():
        for tag in defined(text):
            places.setdefault(tag, []).append(f"{page}.md")
    assert not {tag: pages for tag, pages in places.items() if len(pages) > 1}


@each_page
def test_a_page_mentions_only_tags_that_exist(page):
    everywhere = {tag for text in TEXT.values() for tag in defined(text)}
    assert mentioned(TEXT[page]) <= everywhere


@each_page
def test_a_tagged_equation_is_one_line(page):
    """A line break or an empty line inside it would be typeset without room for the tag."""
    for equation in re.findall(r"^\$\$$(.*?)^\$\$$", TEXT[page], flags=re.M | re.S):
        if defined(equation):
            assert "\\\\" not in equation and "\n\n" not in equation, equation


# --- what a page says about the code -------------------------------------------------------------


@each_page
def test_the_headings_are_the_same_on_each_page(page):
    headings = re.findall(r"^## (.*)$", TEXT[page], flags=re.M)
    assert [heading for heading in headings if heading in HEADINGS] == HEADINGS


@each_page
def test_every_name_on_a_page_exists(page):
    for name in re.findall(r"`(minilora(?:\.\w+)+)`", TEXT[page]):
        pkgutil.resolve_name(name)
    for path in re.findall(r"`((?:minilora|docs|tutorials)/[\w/.]+)`", TEXT[page]):
        assert (ROOT / path).exists(), path
    for path, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT[page]):
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{test}"


@each_page
def test_the_quoted_lines_are_those_of_the_code(page):
    quotes = re.findall(r"^\| \[([\w.]+)\] \| `([\w.]+)` \| `([^`]+)` \|$", TEXT[page], flags=re.M)
    assert sorted(tag for tag, _, _ in quotes) == sorted(defined(TEXT[page]))
    for tag, name, line in quotes:
        source = inspect.getsource(pkgutil.resolve_name(name))
        assert tag in mentioned(source), f"{name} does not name [{tag}]"
        lines = [code for code in source.splitlines() if code.strip().startswith(line)]
        assert lines, f"{name} has no line {line!r} (quoted for [{tag}] in {page}.md)"
        tagged = any(tag in mentioned(code) for code in source.splitlines() if "  # [" in code)
        assert not tagged or any(tag in mentioned(code) for code in lines), (
            f"in {name} the line {line!r} is not the one with [{tag}] (quoted in {page}.md)"
        )


# --- what is kept --------------------------------------------------------------------------------

FIELDS = {name: value for name, value in vars(keep).items() if name.isupper()}
ROWS = [
    (page, *row)
    for page, text in TEXT.items()
    for row in re.findall(r"^\| `(\w+)\.(\w+)` \| .+ \| (.+) \|$", text, flags=re.M)
]


def kinds_of_caches(cache):
    """A pair's cache, or the caches that it is made of, as types."""
    parts = [part for part in cache if hasattr(part, "_fields")]
    if not parts:
        return {type(cache)}
    return set().union(*map(kinds_of_caches, parts))


def caches_of_the_pairs():
    kinds = set()
    for pair in PAIRS.values():
        arguments, constants = pair.make(np.random.default_rng(0))
        kinds |= kinds_of_caches(pair.forward(*arguments, **constants)[1])
    return kinds


def test_the_pages_name_every_making_of_every_pair():
    made = [f"{kind.__name__}.{name}" for kind in caches_of_the_pairs() for name in kind._fields]
    assert sorted(f"{cache}.{name}" for _, cache, name, _ in ROWS) == sorted(made)


def test_the_pages_say_what_keep_drops():
    kinds = {kind.__name__: kind for kind in caches_of_the_pairs()}
    assert {"OF_WEIGHTS", "OF_FACTORS", "OF_INPUTS", "INPUTS"} == set(FIELDS)
    for page, cache, name, dropped in ROWS:
        in_code = {
            table for table, fields in FIELDS.items() if name in fields.get(kinds[cache], ())
        }
        assert set(re.findall(r"`([A-Z_]+)`", dropped)) == in_code, f"{page}.md: {cache}.{name}"


# --- the examples --------------------------------------------------------------------------------

FUNCTIONS = {
    "array": lambda rows: np.array(rows, float),
    "sqrt": math.sqrt,
    "log": math.log,
    "exp": math.exp,
}


def matrix(match):
    rows = match[1].replace("&", ",").split(r"\\")
    return "array([" + ", ".join(f"[{row.strip()}]" for row in rows) + "])"


def value_of(latex):
    """The value of a part of an equation, at least two-dimensional; None if it has letters."""
    code = re.sub(r"\\tfrac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", latex.strip())
    code = re.sub(r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)", code)
    code = re.sub(r"e\^\{([^{}]*)\}", r"exp(\1)", code)
    code = code.replace(r"\ln", "log").replace(r"\cdot", "*")
    code = re.sub(r"\\begin\{pmatrix\}(.*?)\\end\{pmatrix\}", matrix, code, flags=re.S)
    code = re.sub(r"\)\s+array", ") @ array", code)
    if "\\" in code or "^" in code or not set(re.findall(r"[A-Za-z]+", code)) <= set(FUNCTIONS):
        return None
    value = eval(" ".join(code.split()), {"__builtins__": {}}, FUNCTIONS)
    return np.atleast_2d(value).astype(float)


def name_of(latex):
    """A Python name for the left side of an equation: `\\mathrm{d}x` is dx, `\\hat x` is hatx."""
    for old, new in [
        (r"\mathrm{d}", "d"),
        (r"\operatorname{mean}", "mean_"),
        (r"\text", ""),
        (r"\|", "norm_"),
        ("'", "_prime"),
    ]:
        latex = latex.replace(old, new)
    return re.sub(r"\W", "", latex)


def example_of(page):
    """The equations of a page's example: (name, [(sign, part), …])."""
    section = TEXT[page].split("## A 2 × 2 example by hand")[1].split("\n## ")[0]
    for display in re.findall(r"^\$\$$(.*?)^\$\$$", section, flags=re.M | re.S):
        for equation in display.split(r"\qquad"):
            name, *parts = re.split(r"(=|\\approx)", equation.strip().rstrip(" ,."))
            assert parts, f"no equation in {equation!r}"
            yield name_of(name), list(zip(parts[::2], parts[1::2], strict=True))


def given(page, *names):
    """The matrices that a page's example starts from."""
    values = {}
    for name, parts in example_of(page):
        values.setdefault(name, value_of(parts[-1][1]))
    return [values[name] for name in names]


def check(page, **expected):
    """Compares every equation of a page's example with the computed values, by name."""
    shown = set()
    for name, parts in example_of(page):
        assert name in expected, f"{page}.md computes {name}, but the test does not"
        shown.add(name)
        *_, (_, end) = parts
        assert value_of(end) is not None, f"{page}.md: {name} ends in {end.strip()!r}"
        for sign, part in parts:
            value = value_of(part)
            if value is None:
                continue
            # Products of rounded factors are less exact than the rounded result at the end.
            rounding = 0.5001e-4 if part is end else 3e-4
            np.testing.assert_allclose(
                value,
                np.atleast_2d(expected[name]),
                rtol=0,
                atol=1e-9 if sign == "=" else rounding,
                err_msg=f"{page}.md: {name} {sign} {' '.join(part.split())}",
                strict=True,
            )
    assert shown == set(expected), f"{page}.md does not show {sorted(set(expected) - shown)}"


def test_parts_of_equations_are_read():
    assert value_of("1 + 2 \\cdot (-3)") == -5
    assert value_of(r"\tfrac{1}{2} \cdot \sqrt{9 + 16}") == 2.5
    assert value_of(r"\ln(e^{2})") == 2
    two = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"
    assert np.array_equal(value_of(two), [[1, 2], [3, 4]])
    assert np.array_equal(value_of(f"{two} {two}"), [[7, 10], [15, 22]])
    assert value_of(r"\mathrm{d}y\,W^\top") is None
    assert value_of(r"s \cdot 2") is None


def test_a_wrong_number_is_noticed(monkeypatch):
    section = "## A 2 × 2 example by hand\n\n$$\na = 1 + 1 = {}\n$$\n\n$$\nb \\approx {}\n$$\n"
    monkeypatch.setitem(TEXT, "page", section.format("2", "0.1235"))
    check("page", a=2.0, b=0.12345)
    with pytest.raises(AssertionError, match=r"page.md does not show \['c'\]"):
        check("page", a=2.0, b=0.12345, c=1.0)
    with pytest.raises(AssertionError, match="page.md computes b"):
        check("page", a=2.0)
    for wrong in [("3", "0.1235"), ("2", "0.1236"), ("x", "0.1235")]:
        monkeypatch.setitem(TEXT, "page", section.format(*wrong))
        with pytest.raises(AssertionError, match="page.md: "):
            check("page", a=2.0, b=0.12345)


def test_linear():
    x, W, (b,), dy = given("linear", "x", "W", "b", "dy")
    y, cache = ops.linear_forward(x, W, b)
    dx, dW, db = ops.linear_backward(dy, cache)
    check("linear", x=x, W=W, b=b, y=y, dy=dy, dx=dx, dW=dW, db=db)


def test_embedding():
    E, P, dy = given("embedding", "E", "P", "dy")
    y, cache = ops.embedding_forward(E, index=np.array([1, 1]))
    (dE,) = ops.embedding_backward(dy, cache)
    z, cache = ops.position_forward(y[:, None], P, offset=1)
    _, dP = ops.position_backward(dy[:, None], cache)
    check("embedding", E=E, y=y, dy=dy, dE=dE, P=P, z=z[:, 0], dP=dP)


def test_layer_norm():
    x, (w,), (b,), eps, dy = given("layer_norm", "x", "w", "b", "varepsilon", "dy")
    y, cache = ops.layer_norm_forward(x, w, b, eps=eps.item())
    hatx, rho = cache.normalise
    dx, dw, db = ops.layer_norm_backward(dy, cache)
    dhatx = dy * w
    along_rows = {"axis": -1, "keepdims": True}
    check(
        "layer_norm",
        **{"x": x, "w": w, "b": b, "varepsilon": eps, "hatx": hatx, "rho": rho, "y": y},
        mu=x.mean(**along_rows),
        sigma2=x.var(**along_rows),
        dy=dy,
        dhatx=dhatx,
        mean_dhatx=dhatx.mean(**along_rows),
        mean_dhatxcirchatx=(dhatx * hatx).mean(**along_rows),
        **{"dx": dx, "dw": dw, "db": db},
    )


def test_gelu():
    x, dy = given("gelu", "x", "dy")
    y, cache = ops.gelu_forward(x)
    (dx,) = ops.gelu_backward(dy, cache)
    (slope,) = ops.gelu_backward(np.ones_like(x), cache)
    kappa = math.sqrt(2 / math.pi)
    u = kappa * (x + 0.044715 * x**3)
    u_prime = kappa * (1 + 3 * 0.044715 * x**2)
    check("gelu", x=x, u=u, tanhu=np.tanh(u), y=y, u_prime=u_prime, y_prime=slope, dy=dy, dx=dx)


def test_rms_norm():
    x, (w,), dy = given("rms_norm", "x", "w", "dy")
    y, cache = llama_ops.rms_norm_forward(x, w, eps=0.0)
    hatx, rho = cache.normalise
    dx, dw = llama_ops.rms_norm_backward(dy, cache)
    dhatx = dy * w
    mean = (dhatx * hatx).mean(axis=-1, keepdims=True)
    check(
        "rms_norm",
        **{"x": x, "w": w, "rho": rho, "hatx": hatx, "y": y, "dy": dy, "dhatx": dhatx},
        **{"mean_dhatxcirchatx": mean, "dx": dx, "dw": dw},
    )


def test_swiglu():
    g, u, dy = given("swiglu", "g", "u", "dy")
    y, cache = llama_ops.swiglu_forward(g, u)
    dg, du = llama_ops.swiglu_backward(dy, cache)
    ones = np.ones_like(g)
    D = llama_ops.swiglu_gate_gradient(ones, g, ones)
    s = 1 / (1 + np.exp(-g))
    check("swiglu", g=g, u=u, s=s, y=y, D=D, dy=dy, dg=dg, du=du)


def test_rotary():
    q, dy = given("rotary", "q", "dy")
    angle = np.arange(2.0)[:, None]
    tables = {"cos": np.cos(angle), "sin": np.sin(angle)}
    y, cache = llama_ops.rotary_forward(
        q[None], cos=tables["cos"][:, None], sin=tables["sin"][:, None], heads=1
    )
    (dq,) = llama_ops.rotary_backward(dy[None], cache)
    check("rotary", q=q, c=tables["cos"], s=tables["sin"], y=y[0], dy=dy, dq=dq[0])


def test_attention():
    q, k, v, dy = given("attention", "q", "k", "v", "dy")
    (y,), cache = ops.attention_forward(np.concatenate([q, k, v], axis=1)[None], heads=1)
    S, dP = q @ k.T / math.sqrt(2), dy @ v.T
    P = ops.attention_weights(q, k, mask=ops.causal_mask(2, q))
    (dS,) = ops.softmax_backward(dP, ops.SoftmaxCache(P))
    (dqkv,) = ops.attention_backward(dy[None], cache)
    dq, dk, dv = np.split(dqkv[0], 3, axis=1)
    check("attention", q=q, k=k, v=v, S=S, P=P, y=y, dy=dy, dv=dv, dP=dP, dS=dS, dq=dq, dk=dk)


def test_head():
    x, E = given("head", "x", "E")
    z, head_cache = ops.head_forward(x, E)
    p, _ = ops.softmax_forward(z)
    L, cache = loss.cross_entropy_forward(z, targets=np.array([0, 0]))
    (dz,) = loss.cross_entropy_backward(1.0, cache)
    dx, dE = ops.head_backward(dz, head_cache)
    check("head", x=x, E=E, z=z, ell=cache.lse, L=L, p=p, dz=dz, dx=dx, dE=dE)


def test_dropout():
    x, m, dy = given("dropout", "x", "m", "dy")
    y, cache = ops.dropout_forward(x, mask=m)
    (dx,) = ops.dropout_backward(dy, cache)
    check("dropout", x=x, m=m, y=y, dy=dy, dx=dx)


def test_lora():
    x, A, B, scale, dy = given("lora", "x", "A", "B", "s", "dy")
    s = scale.item()

    def gradients(B):
        return lora.lora_backward(dy, lora.lora_forward(x, A, B, scale=s)[1])

    y, cache = lora.lora_forward(x, A, B, scale=s)
    dx, dA, dB = gradients(B)
    _, dW, _ = ops.linear_backward(dy, ops.linear_forward(x, s * A @ B, np.zeros(2))[1])

    _, dA_0, dB_0 = gradients(0 * B)
    B_1 = -0.1 * dB_0
    _, dA_1, _ = gradients(B_1)

    index = np.array([1, 1])
    y_emb, emb_cache = lora.lora_embedding_forward(A, B, index=index, scale=s)
    dA_emb, dB_emb = lora.lora_embedding_backward(dy, emb_cache)
    check(
        "lora",
        **{"x": x, "A": A, "B": B, "s": s, "h": s * x @ A, "y": y},
        **{"dy": dy, "dB": dB, "sdh": s * dy @ B.T, "dA": dA, "dx": dx},
        **{"dW": dW, "sdWBtop": dA, "sAtopdW": dB},
        **{"dA_0": dA_0, "dB_0": dB_0, "B_1": B_1, "dA_1": dA_1, "A_2": A - 0.1 * dA_1},
        **{"h_emb": s * A[index], "y_emb": y_emb, "dA_emb": dA_emb, "dB_emb": dB_emb},
    )


def test_model():
    x, W, (b,), A, B, scale, dy = given("model", "x", "W", "b", "A", "B", "s", "dy")
    s = scale.item()
    adapters = {"q": Adapter(A=A, B=B, scale=s, mask=None, columns=slice(0, 1))}
    u, cache = lora.adapted_linear_forward(x, W, b, adapters=adapters)
    through_branch, _, dlora = lora.adapted_linear_backward(dy, cache)

    E, dz = given("model", "E", "dz")
    x_0, embedding_cache = ops.embedding_forward(E, index=np.array([1, 0]))
    z, head_cache = ops.head_forward(x_0, E)
    dx_0, dE_head = ops.head_backward(dz, head_cache)
    (dE_in,) = ops.embedding_backward(dx_0, embedding_cache)
    check(
        "model",
        **{"x": x, "W": W, "b": b, "A": A, "B": B, "s": s, "h": s * x @ A, "u": u, "y": x + u},
        **{"dy": dy, "dyJtop": dy[:, :1], "sdh": s * dy[:, :1] @ B.T},
        **{"dA": dlora["q"]["A"], "dB": dlora["q"]["B"]},
        **{"fdy": through_branch, "dx": dy + through_branch},
        **{"E": E, "x_0": x_0, "z": z, "dz": dz, "dx_0": dx_0},
        **{"dE_head": dE_head, "dE_in": dE_in, "dE": dE_in + dE_head},
    )


def test_adamw():
    theta_0, g_1, g_2, g = given("adamw", "theta_0", "g_1", "g_2", "g")
    options = {"lr": 0.1, "weight_decay": 0.1}
    start = optim.adamw_init(theta_0)
    theta_1, first = optim.adamw(theta_0, g_1, start, step=1, **options)
    theta_2, second = optim.adamw(theta_1, g_2, first, step=2, **options)
    g_clipped, norm = optim.clip_by_global_norm(g, 1.0)
    rates = [optim.warmup_cosine(t, steps=6, peak=1.0, warmup=2, floor=0.1) for t in range(1, 7)]
    check(
        "adamw",
        **{"theta_0": theta_0, "theta_1": theta_1, "theta_2": theta_2},
        **{"g_1": g_1, "m_1": first.m, "v_1": first.v},
        **{"g_2": g_2, "m_2": second.m, "v_2": second.v},
        **{"g": g, "norm_gnorm_": norm, "g_clipped": g_clipped},
        **{"eta_1dotseta_6": rates, "eta_3": rates[2], "eta_4": rates[3]},
        **{"eta_5": rates[4], "eta_6": rates[5]},
    )


def test_every_page_has_a_test_of_its_example():
    assert {f"test_{page}" for page in PAGES} <= set(globals())


# --- what the LoRA page claims beyond its example ------------------------------------------------


def test_a_step_of_gradient_descent_multiplies_the_dense_gradient():
    rng = np.random.default_rng(0)
    x, A, B, dy = (rng.standard_normal(shape) for shape in [(6, 5), (5, 2), (2, 4), (6, 4)])
    s, eta = 1.5, 0.1
    _, dA, dB = lora.lora_backward(dy, lora.lora_forward(x, A, B, scale=s)[1])
    dW = x.T @ dy
    moved = s * (A - eta * dA) @ (B - eta * dB)
    first_order = s * A @ B - eta * s**2 * (dW @ B.T @ B + A @ A.T @ dW)
    np.testing.assert_allclose(moved, first_order + eta**2 * s * dA @ dB, rtol=1e-12)


@pytest.mark.parametrize("rank", [2, 8])
def test_the_first_step_of_gradient_descent_on_average(rank):
    """The mean of A Aᵀ over many fresh adapters is r / 3I times the identity."""
    config = gpt2.GPTConfig(vocab_size=4, n_positions=2, n_embd=8, n_layer=1, n_head=2)
    base = gpt2.gpt_init(config, seed=0, dtype=np.float64)
    lora_config = LoRAConfig(rank=rank, targets=("o",))
    trees = (lora_init(base, lora_config, seed=seed) for seed in range(2000))
    factors = [tree["blocks"][0]["attn"]["o"]["A"] for tree in trees]
    mean = sum(A @ A.T for A in factors) / len(factors)
    np.testing.assert_allclose(mean, rank / (3 * 8) * np.eye(8), rtol=0, atol=0.01 * rank)
