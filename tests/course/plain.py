"""Each exercise as a student might solve it: in plain NumPy, without the package's own helpers."""

PLAIN = {
    "numeric_gradient": """
def numeric_gradient(f, x, dy, *, h=2.0**-10):
    dx = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        e = np.zeros_like(x)
        e[i] = h
        up, down = f(x + e), f(x - e)
        dx[i] = np.sum(dy * (up - down)) / (2 * h)
    return dx
""",
    "linear": """
def linear_backward(dy, cache):
    x, w = cache
    dx = dw = db = None
    if w is not None:
        dx = dy @ w.T
    if x is not None:
        X, dY = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dw = X.T @ dY
        db = dY.sum(0)
    return dx, dw, db
""",
    "embedding": """
def embedding_backward(dy, cache):
    index, table = cache
    if table is None:
        return (None,)
    dtable = np.zeros_like(table)
    for v, d in zip(index.ravel(), dy.reshape(-1, dy.shape[-1])):
        dtable[v] += d
    return (dtable,)
""",
    "position": """
def position_backward(dy, cache):
    wpe, offset = cache
    dx = dy
    if wpe is None:
        return dx, None
    dwpe = np.zeros_like(wpe)
    for t in range(dy.shape[1]):
        dwpe[offset + t] = dy[:, t].sum(0)
    return dx, dwpe
""",
    "affine": """
def affine_backward(dy, cache):
    x, w, b = cache
    dx = dy * w
    if x is None:
        return dx, None, None
    axes = tuple(range(x.ndim - 1))
    dw = (dy * x).sum(axes)
    db = dy.sum(axes)
    return dx, dw, db
""",
    "normalise": """
def normalise_backward(dxhat, cache):
    xhat, rstd = cache
    m1 = dxhat.mean(-1, keepdims=True)
    m2 = (dxhat * xhat).mean(-1, keepdims=True)
    dx = (dxhat - m1 - xhat * m2) * rstd
    return (dx,)
""",
    "layer_norm": """
def layer_norm_backward(dy, cache):
    (xhat, rstd), (x, w, b) = cache
    C = dy.shape[-1]
    dxhat = dy * w
    m1 = dxhat.mean(-1, keepdims=True)
    m2 = (dxhat * xhat).mean(-1, keepdims=True)
    dx = (dxhat - m1 - xhat * m2) * rstd
    if x is None:
        return dx, None, None
    axes = tuple(range(dy.ndim - 1))
    dw = (dy * xhat).sum(axes)
    db = dy.sum(axes)
    return dx, dw, db
""",
    "rms_norm": """
def rms_norm_forward(x, w, *, eps=1e-5):
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    y = w * x * r
    return y, (x, w, r)

def rms_norm_backward(dy, cache):
    x, w, r = cache
    xhat = x * r
    g = dy * w
    m = (g * xhat).mean(-1, keepdims=True)
    dx = (g - xhat * m) * r
    dw = (dy * xhat).reshape(-1, len(w)).sum(0)
    return dx, dw
""",
    "gelu": """
def gelu_backward(dy, cache):
    (x,) = cache
    k, a = GELU_SCALE, GELU_CUBIC
    u = k * (x + a * x**3)
    t = np.tanh(u)
    du = k * (1 + 3 * a * x**2)
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * du
    return (dy * slope,)
""",
    "softmax": """
def softmax_backward(dy, cache):
    (y,) = cache
    along = (dy * y).sum(-1, keepdims=True)
    dx = y * (dy - along)
    return (dx,)
""",
    "attend": """
def attend_backward(dy, cache):
    q, k, v, P = cache
    K = q.shape[-1]
    T = lambda x: x.swapaxes(-1, -2)
    dv = T(P) @ dy
    dP = dy @ T(v)
    along = (dP * P).sum(-1, keepdims=True)
    dS = P * (dP - along)
    dq = dS @ k / K**0.5
    dk = T(dS) @ q / K**0.5
    return dq, dk, dv
""",
    "attention": """
def attention_backward(dy, cache):
    q, k, v = cache
    B, H, n, K = q.shape
    T = lambda x: x.swapaxes(-1, -2)
    dy = dy.reshape(B, n, H, K).transpose(0, 2, 1, 3)
    S = q @ T(k) / K**0.5
    S = np.where(np.tri(n, dtype=bool), S, -np.inf)
    P = np.exp(S - S.max(-1, keepdims=True))
    P = P / P.sum(-1, keepdims=True)
    dv = T(P) @ dy
    dP = dy @ T(v)
    along = (dP * P).sum(-1, keepdims=True)
    dS = P * (dP - along)
    dq = dS @ k / K**0.5
    dk = T(dS) @ q / K**0.5
    heads = [x.transpose(0, 2, 1, 3).reshape(B, n, H * K) for x in (dq, dk, dv)]
    return (np.concatenate(heads, -1),)
""",
    "head": """
def head_backward(dy, cache):
    x, table = cache
    dx = dy @ table
    if x is None:
        return dx, None
    X, dY = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dtable = dY.T @ X
    return dx, dtable
""",
    "cross_entropy": """
def cross_entropy_backward(dloss, cache):
    logits, lse, target, weight = cache
    z = logits.reshape(-1, logits.shape[-1])
    p = np.exp(z - lse)
    onehot = np.zeros_like(z)
    onehot[np.arange(len(z)), target] = 1
    dz = (p - onehot) * weight[:, None] * dloss
    return (dz.reshape(logits.shape),)
""",
    "dropout": """
def dropout_backward(dy, cache):
    (mask,) = cache
    if mask is None:
        return (dy,)
    dx = dy * mask
    return (dx,)
""",
    "lora": """
def lora_backward(dy, cache):
    x, h, A, B, s = cache
    dY = dy.reshape(-1, dy.shape[-1])
    dx = dA = dB = None
    dh = dY @ B.T
    g = s * dh
    if h is not None:
        dB = h.T @ dY
    if x is not None:
        X = x.reshape(-1, x.shape[-1])
        dA = X.T @ g
    if A is not None:
        dx = g @ A.T
        dx = dx.reshape(*dy.shape[:-1], len(A))
    return dx, dA, dB
""",
    "lora_embedding": """
def lora_embedding_backward(dy, cache):
    index, h, A, B, s = cache
    dY = dy.reshape(-1, dy.shape[-1])
    dA = dB = None
    if h is not None:
        H = h.reshape(-1, h.shape[-1])
        dB = H.T @ dY
    if A is not None:
        g = s * (dY @ B.T)
        dA = np.zeros_like(A)
        np.add.at(dA, index.ravel(), g)
    return dA, dB
""",
    "adapted_linear": """
def adapted_linear_backward(dy, cache):
    x, w = cache.linear
    flat = lambda a: a.reshape(-1, a.shape[-1])
    dx = dw = db = None
    if w is not None:
        dx = dy @ w.T
    if x is not None:
        dw = flat(x).T @ flat(dy)
        db = flat(dy).sum(0)
    grads = {}
    for name, (dropout, lora, columns) in cache.adapters.items():
        mask = dropout.mask
        kept, h, A, B, s = lora
        own = dy[..., columns]
        g = s * (own @ B.T)
        dA = None if kept is None else flat(kept).T @ flat(g)
        dB = None if h is None else h.T @ flat(own)
        grads[name] = {"A": dA, "B": dB}
        if dx is not None and A is not None:
            path = g @ A.T
            if mask is not None:
                path = path * mask
            dx = dx + path
    return dx, {"w": dw, "b": db}, grads
""",
    "block": """
def block_backward(dy, cache):
    back = adapted_linear_backward
    dh, ddown, down = back(dy, cache["down"])
    (dh,) = ops.gelu_backward(dh, cache["gelu"])
    dh, dup, up = back(dh, cache["up"])
    dblock = {"mlp": {"up": dup, "down": ddown}}
    dadapters = {"mlp": {**up, **down}}
    if dh is None:
        return None, dblock, dadapters
    dh, w2, b2 = ops.layer_norm_backward(dh, cache["ln_2"])
    dblock["ln_2"] = {"w": w2, "b": b2}
    mid = dy + dh
    dh, do, o = back(mid, cache["o"])
    (dh,) = ops.attention_backward(dh, cache["attention"])
    dh, dqkv, qkv = back(dh, cache["qkv"])
    dblock["attn"] = {"qkv": dqkv, "o": do}
    dadapters["attn"] = {**qkv, **o}
    if dh is None:
        return None, dblock, dadapters
    dh, w1, b1 = ops.layer_norm_backward(dh, cache["ln_1"])
    dblock["ln_1"] = {"w": w1, "b": b1}
    dx = mid + dh
    return dx, dblock, dadapters
""",
    "adamw": """
def _adamw_leaf(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
    t = step
    decay = weight_decay if p.ndim >= 2 else 0.0
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    mhat = m / (1 - beta1**t)
    vhat = v / (1 - beta2**t)
    move = lr * mhat / (np.sqrt(vhat) + eps)
    p = p - lr * decay * p - move
    return p, m, v
""",
    "clipping": """
def clip_by_global_norm(grads, max_norm):
    flat = list(tree.flatten(grads).values())
    norm = np.sqrt(sum((g * g).sum() for g in flat))
    scale = min(1.0, max_norm / (norm + 1e-6))
    return tree.map_leaves(lambda g: g * scale, grads), norm
""",
    "merging": """
def merge(base, lora, config, sign=1):
    flat, width = dict(flatten(base)), base["wte"].shape[1]
    for path, ab in adapters(lora).items():
        if path == "embedding" and "head" not in base:
            raise MiniloraError("the head is tied")
        s = config.scale_of(path)
        name, columns = weight_of(path, width)
        flat[name] = flat[name].copy()
        flat[name][:, columns] += sign * s * ab["A"] @ ab["B"]
    return unflatten(flat)

def unmerge(base, lora, config):
    return merge(base, lora, config, sign=-1)
""",
    "mixing": """
def mix(parts, weights):
    check_weights(len(parts), weights)
    n = len(parts[0][0]["blocks"])
    As, Bs = {}, {}
    for (lora, config), weight in zip(parts, weights):
        if len(lora["blocks"]) != n:
            raise MiniloraError("adapters of different bases")
        for path, ab in adapters(lora).items():
            if path in As and len(As[path][0]) != len(ab["A"]):
                raise MiniloraError("adapters of different bases")
            s = config.scale_of(path)
            As.setdefault(path, []).append(ab["A"])
            Bs.setdefault(path, []).append(weight * s * ab["B"])
    flat, ranks = {}, {}
    for path in As:
        flat[path + ".A"] = np.concatenate(As[path], 1)
        flat[path + ".B"] = np.concatenate(Bs[path], 0)
        ranks[re.escape(path)] = len(flat[path + ".B"])
    return adapter_tree(flat, n), _unscaled(ranks)
""",
}
