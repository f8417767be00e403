"""Weights and batches of the golden training trajectories, made from names alone: the same bits on every machine.

Every number of `weights` and `batch` is k / 1024, with k drawn by numpy's RandomState(crc32 of a name), so fp32 and
float64 hold the same value. Tensors have the names of the official code. Image and text tower are 128 wide, with 2
layers and heads of 64.
"""

import zlib

import numpy as np

VOCAB, MASK, SOT, EOT, CONTEXT = 600, 597, 598, 599, 77                 # words are 1 ... 596, padding is 0
WIDTH, LAYERS, PATCH, EMBED, DEPTH = 128, 2, 16, 128, 2
BATCH, STEPS, PERSONS = 8, 10, 11
SIZE = {
    "tbps-clip": (64, 64),
    "tbps-clip-simplified": (64, 64),
    "baseline": (64, 64),
    "irra": (96, 32),
    "uit": (96, 32),
}
LOGIT_SCALE = {"tbps-clip": 4716, "tbps-clip-simplified": 2723, "baseline": 2723}  # / 1024; the first is above log 100


def generator(name):
    """The random numbers that belong to a name."""
    return np.random.RandomState(zlib.crc32(name.encode()))


def norms(*names, width=WIDTH):
    """Shapes of layer norms."""
    return {f"{name}.{part}": (width,) for name in names for part in ("weight", "bias")}


def linear(name, outputs, inputs):
    """Shapes of a linear layer; `name` ends in the separator before "weight"."""
    return {name + "weight": (outputs, inputs), name + "bias": (outputs,)}


def blocks(tower, layers, width=WIDTH):
    """Shapes of transformer blocks under OpenAI's names."""
    shapes = {}
    for i in range(layers):
        block = f"{tower}.resblocks.{i}"
        shapes |= linear(f"{block}.attn.in_proj_", 3 * width, width)
        shapes |= norms(f"{block}.ln_1", f"{block}.ln_2")               # here, for the fingerprint goes by this order
        shapes |= linear(f"{block}.attn.out_proj.", width, width)
        shapes |= linear(f"{block}.mlp.c_fc.", 4 * width, width) | linear(f"{block}.mlp.c_proj.", width, 4 * width)
    return shapes


def shapes(method):
    """{official name: shape} of all tensors that the method uses."""
    (height, width), D = SIZE[method], EMBED
    patches = (height // PATCH) * (width // PATCH)
    out = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (1 + patches, WIDTH),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "visual.proj": (WIDTH, D),
        "token_embedding.weight": (VOCAB, WIDTH),
        "positional_embedding": (CONTEXT, WIDTH),
        "text_projection": (WIDTH, D),
    }
    out |= norms("visual.ln_pre", "visual.ln_post", "ln_final")
    out |= blocks("visual.transformer", LAYERS) | blocks("transformer", LAYERS)
    if method == "tbps-clip":
        out |= linear("simclr_mlp.0.", 128, D) | linear("simclr_mlp.2.", D, 128)
    if method in ("irra", "uit"):
        cross, tower = {"irra": ("cross_attn.", "cross_modal_transformer"),
                        "uit": ("cross_attn_Text.", "cross_modal_transformer_mae")}[method]
        out |= linear("classifier.", PERSONS, D)
        out |= linear(cross + "in_proj_", 3 * D, D) | linear(cross + "out_proj.", D, D) | blocks(tower, DEPTH, D)
    if method == "irra":
        out |= linear("mlm_head.dense.", D, D) | linear("mlm_head.fc.", VOCAB, D)
        out |= norms("ln_pre_t", "ln_pre_i", "ln_post", "mlm_head.ln")
    if method == "uit":
        out |= {"mask_token": (1, 1, D)} | linear("decoder_embed.", D, D) | linear("decoder_pred.", 3 * PATCH ** 2, D)
        out |= norms("norm_1", "norm_2", "norm_4", "norm_6", "norm_7")
    return out


def weights(method):
    """{official name: float64 array}. Matrices have variance 1 / inputs; biases, class token and positions are below
    0.1, gains of norms within 0.2 of 1, token embeddings below 0.2."""
    made = {"logit_scale": np.float64(LOGIT_SCALE[method] / 1024)} if method in LOGIT_SCALE else {}
    for name, shape in shapes(method).items():
        inputs = shape[0] if name in ("visual.proj", "text_projection") else int(np.prod(shape[1:]))  # stored (in, out)
        is_gain = len(shape) == 1 and name.endswith("weight")
        if len(shape) in (2, 4) and "embedding" not in name:
            bound = round(1024 * (3 / inputs) ** 0.5)
        else:
            bound = 205 if is_gain or name.startswith("token") else 102
        made[name] = is_gain + generator(name).randint(-bound, bound + 1, size=shape, dtype=np.int64) / 1024
    return made


def batch(method, step):
    """What step 0 ... 9 is fed:

    pixels (4, 8, 3, H, W)  in [-2, 2]: the view, the second view, two for self-supervision
    tokens (8, 77)          start, words, end, padding; the first caption fills all positions, the second has one word
    masked, labels (8, 77)  the same with some words masked, and the true ids of these words (0 elsewhere)
    pid (8,)                one person is there twice and one three times; all differ for the baseline
    order (8, N)            the patches; the first ones stay visible (UIT)"""
    (height, width), random = SIZE[method], generator(f"batch {step}")
    tokens = np.zeros((BATCH, CONTEXT), np.int64)
    for row, n in zip(tokens, [CONTEXT - 2, 1, *random.randint(2, 25, size=BATCH - 2, dtype=np.int64)]):
        row[:n + 2] = [SOT, *random.randint(1, MASK, size=n, dtype=np.int64), EOT]
    is_word = (tokens > 0) & (tokens < MASK)
    chance = np.where(is_word, random.randint(0, 1000, size=tokens.shape, dtype=np.int64), 1000)
    chance[chance.min(axis=1) >= 150, 1] = 0                            # at least one word, the first
    other = random.randint(1, MASK, size=tokens.shape, dtype=np.int64)
    masked = np.select([chance < 120, chance < 135], [MASK, other], tokens)      # 80 % masked, 10 % replaced, 10 % kept
    persons = np.arange(BATCH) if method == "baseline" else [0, 1, 1, 2, 3, 2, 2, 4]
    pid = random.permutation(PERSONS)[persons]
    patches = (height // PATCH) * (width // PATCH)
    order = np.stack([random.permutation(patches) for _ in range(BATCH)])
    size = (4, BATCH, 3, height, width)
    pixels = generator(f"pixels {step}").randint(-2048, 2049, size=size, dtype=np.int64) / 1024
    return dict(
        pixels=pixels, tokens=tokens, masked=masked, labels=np.where(chance < 150, tokens, 0), pid=pid, order=order
    )


def positions(grid, width):
    """UIT's fixed decoder positions in float64, (1 + rows * columns, width): zeros for the class token, then sin and
    cos of the column in one half, of the row in the other."""
    frequency = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = (x.reshape(-1, 1) * frequency for x in np.indices(grid))
    patches = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)
    return np.concatenate([np.zeros((1, width)), patches])


def crc(arrays):
    """The fingerprint of inputs that a golden file holds."""
    return zlib.crc32(b"".join(np.round(np.asarray(x) * 1024).astype("<i4").tobytes() for x in arrays))
