"""A complete Llama in float64 NumPy, written from the equations alone: what kllama is compared with.

Slow on purpose: heads, positions and keys are Python loops, so that no shape trick is shared with what is tested.
It imports neither kllama nor a framework.
"""

import math

import numpy as np

ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def rms_norm(x, scale, epsilon):
    """Normalize (..., D) by the root mean square."""
    x = np.asarray(x, "float64")
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def rope_frequencies(head_dim, theta, scaling=None, max_length=None, length=None):
    """Give the inverse frequencies (H / 2,) and the factor of cosines and sines, as each rope type defines them."""
    scaling = dict(scaling or {"rope_type": "default"})
    pairs = np.arange(head_dim // 2, dtype="float64")
    default = theta ** (-2 * pairs / head_dim)
    original = scaling.get("original_max_position_embeddings") or max_length
    factor = scaling.get("factor") or (max_length / original if original else None)
    match scaling["rope_type"]:
        case "default":
            return default, 1.0
        case "linear":
            return default / factor, 1.0
        case "dynamic":
            stretch = factor * max(length, max_length) / max_length - (factor - 1)
            return (theta * stretch ** (head_dim / (head_dim - 2))) ** (-2 * pairs / head_dim), 1.0
        case "llama3":
            turns = original * default / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept = np.clip((turns - low) / (high - low), 0, 1)
            return kept * default + (1 - kept) * default / factor, 1.0
        case "longrope":
            stretch = np.array(scaling["long_factor" if length > original else "short_factor"])
            magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            return default / stretch, scaling.get("attention_factor") or magnitude
        case "yarn":
            return default * _yarn_blend(scaling, head_dim, theta, original, factor), _yarn_magnitude(scaling, factor)


def _yarn_blend(scaling, head_dim, theta, original, factor):
    def pair(turns):
        return head_dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = pair(scaling.get("beta_fast", 32)), pair(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    slowed = np.clip((np.arange(head_dim // 2) - low) / (high - low or 0.001), 0, 1)
    return 1 - slowed + slowed / factor


def _yarn_magnitude(scaling, factor):
    def magnitude(scale):
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1)


def rotate(x, positions, frequencies, factor=1.0):
    """Turn pairs (i, i + H / 2) of (B, T, N, H) by position * frequency, as multiplications of complex numbers."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    turned = pairs * factor * np.exp(1j * np.outer(positions, frequencies))[None, :, None]
    return np.concatenate([turned.real, turned.imag], -1)


def allowed_keys(num_queries, num_keys, padding_mask=None, start=0, window=math.inf):
    """Say which keys (B or 1, S) each query at position `start` + t may see: (B or 1, T, S)."""
    real = np.ones((1, num_keys), bool) if padding_mask is None else np.asarray(padding_mask) > 0
    allowed = np.zeros((len(real), num_queries, num_keys), bool)
    for b, t, s in np.ndindex(allowed.shape):
        allowed[b, t, s] = s == start + t or (s < start + t < s + window and real[b, s])
    return allowed


def attend(query, key, value, allowed):
    """Attend (B, T, N, H) to (B, S, K, H) where `allowed` (B or 1, T, S): query head n reads key head n // (N / K)."""
    query, key, value = (np.asarray(x, "float64") for x in (query, key, value))
    context = np.zeros(query.shape)
    for n in range(query.shape[2]):
        k = n // (query.shape[2] // key.shape[2])
        scores = query[:, :, n] @ key[:, :, k].swapaxes(1, 2) / math.sqrt(query.shape[-1])
        scores = np.where(allowed, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        context[:, :, n] = weights / weights.sum(-1, keepdims=True) @ value[:, :, k]
    return context


def feed_forward(x, gate, up, down, activation="silu"):
    """Apply the gated feed-forward network; each projection is a function."""
    return down(ACTIVATIONS[activation](gate(x)) * up(x))


def hidden_states(weights, config, token_ids, padding_mask=None):
    """Run the decoder.

    Args:
        weights: array of each variable path.
        config: arguments of `LlamaBackbone`.
        token_ids: (B, T).
        padding_mask: (B, T), or None.

    Returns:
        Hidden states (B, T, D) after the final normalization.
    """
    weights = {path: np.asarray(weight, "float64") for path, weight in weights.items()}
    length = np.shape(token_ids)[1]
    if padding_mask is not None:
        length = int(np.max(np.where(padding_mask, np.arange(length) + 1, 0)))
    rope = rope_frequencies(
        config["head_dim"], config["rope_max_wavelength"], config["rope_scaling"], config["max_sequence_length"], length
    )
    num_positions = np.shape(token_ids)[1]
    types = config["layer_types"] or ["sliding_attention"] * config["num_layers"]
    x = weights["token_embedding/embeddings"][token_ids]
    for i, kind in enumerate(types):
        window = config["sliding_window"] if kind == "sliding_attention" else None
        allowed = allowed_keys(num_positions, num_positions, padding_mask, window=window or math.inf)
        x = decoder_layer(weights, f"transformer_layer_{i}/", config, x, rope, allowed)
    return rms_norm(x, weights["sequence_output_layernorm/scale"], config["layer_norm_epsilon"])


def decoder_layer(weights, layer, config, x, rope, allowed):
    """Run the layer whose weights' paths begin with `layer`, on (B, T, D)."""
    epsilon = config["layer_norm_epsilon"]
    normalized = rms_norm(x, weights[layer + "self_attention_layernorm/scale"], epsilon)
    x = x + _self_attention(weights, layer, normalized, rope, allowed, epsilon)
    return x + feed_forward(
        rms_norm(x, weights[layer + "feedforward_layernorm/scale"], epsilon),
        _projection(weights, layer + "feedforward_gate_dense", "btd,df->btf"),
        _projection(weights, layer + "feedforward_intermediate_dense", "btd,df->btf"),
        _projection(weights, layer + "feedforward_output_dense", "btf,fd->btd"),
        config["activation"],
    )


def _self_attention(weights, layer, x, rope, allowed, epsilon):
    def project(name, equation, x):
        return _projection(weights, f"{layer}self_attention/{name}", equation)(x)

    def normalize(name, x):
        path = f"{layer}self_attention/{name}/scale"
        return rms_norm(x, weights[path], epsilon) if path in weights else x

    positions = np.arange(x.shape[1])
    query = rotate(normalize("query_norm", project("query", "btd,dnh->btnh", x)), positions, *rope)
    key = rotate(normalize("key_norm", project("key", "btd,dkh->btkh", x)), positions, *rope)
    context = attend(query, key, project("value", "btd,dkh->btkh", x), allowed)
    return project("attention_output", "btnh,nhd->btd", context)


def _projection(weights, path, equation):
    return lambda x: np.einsum(equation, x, weights[path + "/kernel"]) + weights.get(path + "/bias", 0.0)


def logits(weights, config, token_ids, padding_mask=None):
    """Run the decoder and the head; logits (B, T, V)."""
    if config["tie_word_embeddings"]:
        head = np.transpose(weights["token_embedding/embeddings"])
    else:
        head = weights["token_embedding/reverse_embeddings"]
    return hidden_states(weights, config, token_ids, padding_mask) @ np.asarray(head, "float64")


def relative_error(actual, expected, mask=None):
    """Give max |difference| / max |expected|, over the positions where the mask is not 0."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    if mask is not None:
        actual, expected = actual[np.asarray(mask) > 0], expected[np.asarray(mask) > 0]
    assert actual.shape == expected.shape
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def random_weight(path, shape, rng):
    """Draw a weight at which every part of the maths shows: gains near 1, all else around 0, biases included."""
    return rng.normal(1.0 if path.endswith("scale") else 0.0, 0.3, shape).astype("float32")


def randomize(model, seed=0):
    """Give every weight of a Keras model random values, and return them by path."""
    rng = np.random.default_rng(seed)
    values = {weight.path: random_weight(weight.path, weight.shape, rng) for weight in model.weights}
    for weight in model.weights:
        weight.assign(values[weight.path])
    return values
