"""What only a GPU can get wrong: python -m pytest -q .ci/test_gpu.py, where MLX's device is one.

bfloat16 has 8 bits: a number is off by up to 0.4 %, and what a few roundings do to a sum, or to a
small model's logits, stays below 3 %.
"""

import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import bench  # a tokenizer, and a bank of filters where there is no mistral-common

import test_voxtral as T
import voxtral as V

if mx.default_device() != mx.gpu:
    pytest.skip("needs a GPU", allow_module_level=True)


def test_a_cache_of_the_real_sizes(steps: int = 10_100, window: int = 8192) -> None:
    """Attention in bfloat16 against float32, as the window fills and is moved.

    In MLX 0.32.4 some views of some buffers are wrong by 7 % or NaN: see KVCache.
    """
    args = replace(T.ARGS, n_heads=32, n_kv_heads=8, head_dim=128, sliding_window=window,
                   rope_theta=1e6)
    mx.random.seed(0)
    q, k, v = (mx.random.normal((h, steps + 39, 128)).astype(mx.bfloat16) for h in (32, 8, 8))
    cache = V.KVCache(args)
    cache.update(q[None, :, :39], k[None, :, :39], v[None, :, :39])
    checked = {1, 300, 5000, 9000, 9950, 10_050, steps, *range(8140, 8201, 3)}
    for at in range(39, steps + 39):
        new = [x[None, :, at : at + 1] for x in (q, k, v)]
        turned, keys, values, mask = cache.update(*new)
        got = mx.fast.scaled_dot_product_attention(turned, keys, values, scale=128**-0.5)
        mx.eval(got, cache.keys, cache.values)
        assert mask is None
        if at - 38 in checked:
            last = slice(max(0, at + 1 - window), at + 1)
            expected = last_attention(q[:, at : at + 1], k[:, last], v[:, last])
            assert T.close(got[0, :, 0], expected, 2e-2), at - 38


def last_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """float32 attention of one query [32, 1, 128] to all keys [8, T, 128] -> [32, 128]."""
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    end = mx.concatenate([mx.zeros((32, k.shape[1] - 1, 128)), q], axis=1)
    q = T.rotate(end, 1e6)[:, -1].reshape(8, 4, 128)
    scores = (q[:, :, None] * T.rotate(k, 1e6)[:, None]).sum(-1) / 128**0.5  # [8, 4, T]
    return (mx.softmax(scores, axis=-1)[..., None] * v[:, None]).sum(2).reshape(32, 128)


@pytest.mark.parametrize("shape,first,dtype", [
    ((128, 32, 749, 64), 275, mx.bfloat16), ((128, 32, 749, 64), 275, mx.float16),
    ((64, 8, 8191, 128), 8193, mx.bfloat16), ((64, 8, 8191, 128), 8193, mx.float16),
    ((1, 8, 8191, 128), 8193, mx.float32)])
def test_keys_are_turned_back(shape: tuple, first: int, dtype: mx.Dtype) -> None:
    """In the real shapes. What a few roundings do to a number is below 2 %."""
    B, heads, n, head_dim = shape
    memory = mx.device_info().get("memory_size", 0)
    if B > 1 and mx.metal.is_available() and memory < 64e9:  # type: ignore[operator]
        pytest.skip("needs a buffer of 4.3 GB, and several of them")
    args = replace(T.ARGS, head_dim=head_dim, sliding_window=n + 1, rope_theta=1e6)
    mx.random.seed(0)
    k = mx.random.normal((B, heads, first + n, head_dim)).astype(dtype)
    cache = V.KVCache(args, B)
    cache.keys = cache.values = cache.rope(k, offset=0)
    cache.length = first + n
    cache.renew(1)
    expected = cache.rope(k[:, :, first:], offset=0)
    wrong = mx.abs(cache.keys[:, :, :n].astype(mx.float32) - expected.astype(mx.float32)).max()
    limit = {mx.bfloat16: 2e-2, mx.float16: 3e-3, mx.float32: 1e-5}[dtype]
    assert cache.length == n and (wrong <= limit * mx.abs(expected).max()).item()
    assert T.close(expected[-1], T.rotate(k[-1, :, first:].astype(mx.float32), 1e6), 2e-2)


def half_precision(head_dim: int, window: int) -> V.Voxtral:
    encoder = {"head_dim": head_dim, "dim": 64, "sliding_window": 750}
    model = T.make_model(encoder=encoder, dim=128, head_dim=head_dim, sliding_window=window)
    model.set_dtype(mx.bfloat16)
    return model


def test_700_lengths() -> None:
    """MLX plans kernels for each shape, and raises "Cache thrashing" after 256 of one kind."""
    model = half_precision(128, 8192)
    samples = np.random.RandomState(0).randn(740 * 1280).astype(np.float32) * 0.1
    for i in range(700):
        n = 1280 * (40 + i)
        audio_embeds = bench.encode(model, samples[: n + 40])
        assert audio_embeds.shape[1] == 32 + 40 + i
        if i % 50 == 0:
            text = V.transcribe(model, bench.Tokenizer(), samples[:n], delay_ms=480)
            assert len(text.tokens) == 40 + i + 11


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_batch_equals_one_by_one(head_dim: int, steps: int = 1100) -> None:
    """Before and after the decoder's window of 512 is full."""
    model = half_precision(head_dim, 512)
    mx.random.seed(0)
    mel = mx.random.normal((3, 1600, 128))
    audio_embeds = model.embed_audio(mel, V.EncoderState(model.encoder_args, 3))
    for b in range(3):
        one = model.embed_audio(mel[b : b + 1], V.EncoderState(model.encoder_args))
        assert T.close(audio_embeds[b], one[0], 3e-2)
    audio_embeds = (mx.random.normal((3, steps + 39, 128)) * 0.3).astype(mx.bfloat16)
    ids = mx.random.randint(0, 1400, (3, steps + 39))
    scales = model.scales(6)
    caches = [[V.KVCache(model.decoder_args, b) for _ in scales] for b in (3, 1, 1, 1)]
    start = 0
    for n in [39] + [1] * steps:
        new = slice(start, start + n)
        start += n
        together, *alone = (
            model(ids[rows, new], audio_embeds[rows, new], scales, cache)
            for rows, cache in zip([slice(3), slice(0, 1), slice(1, 2), slice(2, 3)], caches))
        assert T.close(together, mx.concatenate(alone), 3e-2), start
