"""Tests of voxtral.py. Nothing is downloaded; the weights are small, random and seeded.

    python -m pytest test_voxtral.py            # all; the cross-check runs live if transformers is there
    python test_voxtral.py golden               # record anew what the cross-check falls back on

Tolerances: float32 has 24 bits, sums of a few hundred terms lose 5 or 6 of them, so two orders of
summation agree to about 1e-5 of the largest value; 1e-4 leaves room for a few layers.
"""

import ast
import base64
import contextlib
import faulthandler
import io
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx import optimizers as optim
from mlx.utils import tree_flatten, tree_map

import voxtral as V

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # slow; no file for one line
HERE = Path(__file__).parent
DIGITS = HERE.parent / "shared" / "digits"
needs_digits = pytest.mark.skipif(not DIGITS.is_dir(), reason="the digits checkpoint is not here")


def config(**decoder):
    """A small model: two windows of the encoder are 24 frames, of the decoder 80 tokens."""
    mel = {"num_mel_bins": 128, "hop_length": 160, "window_size": 400, "global_log_mel_max": 1.5}
    encoder = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 48,
               "rope_theta": 1e4, "norm_eps": 1e-5, "sliding_window": 12, "audio_encoding_args": mel}
    whisper = {"encoder_args": encoder, "downsample_args": {"downsample_factor": 4}}
    return {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 64,
            "rope_theta": 1e4, "norm_eps": 1e-5, "sliding_window": 40, "vocab_size": 1400,
            "ada_rms_norm_t_cond": True, "ada_rms_norm_t_cond_dim": 32,
            "multimodal": {"whisper_model_args": whisper}, **decoder}


def make_model(seed=0, **changes):
    model, rng = V.Voxtral(config(**changes)), np.random.RandomState(seed)
    weights = []
    for name, w in sorted(tree_flatten(model.parameters())):
        scale = 0.3 if w.ndim == 1 else 1.5 / math.sqrt(math.prod(w.shape[1:]))
        scale *= 0.3 if "embed_tokens" in name else 1  # so that sound decides, not the last token
        value = rng.randn(*w.shape) * scale + ("norm" in name and w.ndim == 1)
        weights.append((name, mx.array(value.astype(np.float32))))
    model.load_weights(weights)
    return model


def write_tekken(folder, vocab_size=1400, version="v13", audio_is_there=True, words=None, **audio):
    """A tokenizer of mistral-common's format: 1,000 special ids, 256 bytes, and some made-up words."""
    words = [bytes([i]) for i in range(256)] + (words or [b" word%d" % i for i in range(vocab_size - 1256)])
    vocab = [{"rank": i, "token_bytes": base64.b64encode(w).decode(), "token_str": None}
             for i, w in enumerate(words)]
    named = {0: "<unk>", 1: "<s>", 2: "</s>", 32: "[STREAMING_PAD]", 33: "[STREAMING_WORD]"}
    special = [{"rank": i, "token_str": named.get(i, f"<SPECIAL_{i}>"), "is_control": True} for i in range(1000)]
    settings = {"pattern": r"\s+|\S+", "num_vocab_tokens": len(vocab), "default_vocab_size": vocab_size,
                "default_num_special_tokens": 1000, "version": version}
    mel = {"num_mel_bins": 128, "hop_length": 160, "window_size": 400}
    audio = {"sampling_rate": 16000, "frame_rate": 12.5, "audio_encoding_config": mel, "chunk_length_s": None,
             "transcription_format": "streaming", "transcription_delay_ms": 480, "streaming_look_ahead_ms": 2.5,
             "streaming_look_back_ms": 52.5, "streaming_n_left_pad_tokens": 32, **audio}
    text = {"config": settings, "vocab": vocab, "special_tokens": special} | ({"audio": audio} if audio_is_there else {})
    Path(folder, "tekken.json").write_text(json.dumps(text))


def their_names(model, layout):
    """The model's weights under another layout's names: the loader's work, done backwards."""
    column = V.NAMES[0].index(layout)
    out = {}
    for name, w in tree_flatten(model.parameters()):
        module, _, kind = name.rpartition(".")
        decoder = name.startswith("language_model")
        rows = {row[0]: row[column] for row in (V.NAMES[1:] if decoder else V.NAMES[:0:-1])}  # the last wins
        if ".layers." in module:
            head, _, rest = module.partition(".layers.")
            index, _, inside = rest.partition(".")
            theirs = rows[f"{head}.layers.N"].replace("N", index) + rows["." + inside]
        else:
            theirs = rows[module]
        if layout in ("original", "transformers") and w.ndim == 3:
            w = w.swapaxes(1, 2)
        if layout == "transformers" and inside_rotary(module):
            D = 16
            w = w.reshape(-1, D // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
        if layout == "original" and not decoder or theirs == "tok_embeddings":
            theirs = "mm_streams_embeddings.embedding_module." + theirs
        out[f"{theirs}.{kind}"] = mx.contiguous(w)
    return out


def inside_rotary(module):
    return module.endswith((".q_proj", ".k_proj"))


def write_original(folder, model):
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(config()))
    mx.save_safetensors(str(folder / "consolidated.safetensors"), their_names(model, "original"))
    write_tekken(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_original(tmp_path_factory.mktemp("model"), make_model())


@pytest.fixture(scope="session")
def loaded(checkpoint):
    return V.load_voxtral_model(checkpoint)


@pytest.fixture(scope="session")
def noise():
    rng = np.random.RandomState(1)  # noise whose loudness and colour change every 50 ms
    return np.concatenate([np.convolve(rng.randn(800), rng.randn(9) * 2 ** rng.uniform(-9, -1), "same")
                           for _ in range(120)]).clip(-1, 1).astype(np.float32)


def close(a, b, tolerance=1e-4):
    a, b = np.array(a), np.array(b)
    return a.shape == b.shape and np.abs(a - b).max() <= tolerance * np.abs(b).max()


# ------------------------------------------------------------------------------------------- audio


def test_log_mel_is_the_definition(noise):
    from mistral_common.audio import mel_filter_bank

    x = np.pad(noise[:4000].astype(np.float64), 200)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    dft = np.exp(-2j * np.pi * np.outer(np.arange(201), np.arange(400)) / 400)
    power = np.stack([np.abs(dft @ (x[f * 160 : f * 160 + 400] * window)) ** 2 for f in range(25)])
    bank = mel_filter_bank(201, 128, 0.0, 8000.0, 16000)
    expected = (np.maximum(np.log10(np.maximum(power @ bank, 1e-10)), 1.5 - 8) + 4) / 4
    mel = np.array(V.log_mel_spectrogram(noise[:4000]))
    assert mel.shape == (25, 128) and mel.dtype == np.float32
    assert np.abs(mel - expected).max() < 1e-4  # log10 of float32 power
    assert np.array(V.log_mel_spectrogram(np.zeros(1600, np.float32))).max() == (1.5 - 8 + 4) / 4


@pytest.mark.parametrize("kernel,stride", [(1, 1), (2, 1), (3, 1), (3, 2), (5, 3), (7, 5), (8, 7), (8, 8), (4, 4)])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 8, None])
def test_carry_gives_every_window_once(kernel, stride, chunk):
    rng, zeros = np.random.RandomState(kernel * stride), kernel - 1
    x = np.arange(1, 62, dtype=np.float32)[:, None]
    padded = np.concatenate([np.zeros((zeros, 1), np.float32), x])
    expected = [padded[i : i + kernel, 0].tolist() for i in range(0, len(padded) - kernel + 1, stride)]
    for xp in (np.array, mx.array):
        carry, got, at = V.Carry(kernel, stride, zeros), [], 0
        while at < len(x):
            n = chunk or rng.randint(1, 13)
            y = np.array(carry(xp(x[at : at + n])))[:, 0]
            got += [y[i : i + kernel].tolist() for i in range(0, len(y) - kernel + 1, stride)]
            at += n
        assert got == expected


def test_load_audio_and_what_is_wrong_with_files(tmp_path, noise):
    import soundfile

    for name, rate, channels, subtype in (("a.wav", 16000, 1, "FLOAT"), ("b.wav", 44100, 6, "PCM_24"),
                                          ("c.flac", 8000, 2, "PCM_16"), ("d.wav", 384000, 1, "DOUBLE")):
        sound = np.repeat(noise[: rate // 4, None], channels, 1)
        soundfile.write(tmp_path / name, sound, rate, subtype=subtype)
        assert abs(len(V.load_audio(tmp_path / name)) - 4 * len(sound) * 4000 / rate) <= 40
    assert np.array_equal(V.load_audio(tmp_path / "a.wav"), noise[:4000])
    for name in ("w.wav", "f.flac", "o.ogg", "m.mp3"):
        soundfile.write(tmp_path / name, noise, 16000)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
        with pytest.raises(V.VoxtralError):
            V.load_audio(tmp_path / name)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, math.nan]), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "slow.wav", noise, 1)
    soundfile.write(tmp_path / "none.wav", noise[:0], 16000)
    (tmp_path / "text.wav").write_text("hello")
    (tmp_path / "empty.wav").touch()
    for name in ("nan.wav", "slow.wav", "none.wav", "text.wav", "empty.wav"):
        with pytest.raises(V.VoxtralError):
            V.load_audio(tmp_path / name)


# ------------------------------------------------------------------------------ attention and model


def test_rotary_pairs_are_neighbours():
    cache = V.KVCache(make_model().encoder_args)
    x = np.random.RandomState(0).randn(1, 2, 5, 16).astype(np.float32)
    got = np.array(cache.rope(mx.array(x), offset=7))
    angle = np.arange(7, 12)[:, None] * 1e4 ** (-np.arange(8) / 8)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    assert close(got[..., 0::2], pairs.real) and close(got[..., 1::2], pairs.imag)


def test_cache_stays_bounded_and_right_far_from_the_origin():
    """A day and more: scores against float64 angles of absolute positions, which only differ."""
    args = make_model().encoder_args
    cache, rng = V.KVCache(args), np.random.RandomState(0)
    ks, q = rng.randn(200, 16).astype(np.float32), rng.randn(16).astype(np.float32)
    values = rng.randn(200, 16).astype(np.float32)
    for at in range(200):
        out = cache(*(mx.array(x[None, None, None]) for x in (q, ks[at], values[at])))
        assert cache.keys.shape[2] <= 2 * 12 and cache.length <= 2 * 12
    # Positions never exceed two windows, so the error at hour 24 is that at position 24.
    z = lambda x: x[..., 0::2] + 1j * x[..., 1::2]
    distance = np.arange(11, -1, -1)[:, None]
    turned = z(ks[188:].astype(np.float64)) * np.exp(-1j * distance * 1e4 ** (-np.arange(8) / 8))
    weights = np.exp((turned * z(q).conj()).real.sum(-1) / 4)
    expected = weights @ values[188:] / weights.sum()
    assert np.abs(np.array(out)[0, 0, 0] - expected).max() < 1e-3 * np.abs(expected).max()


def test_encoder_and_decoder_forget_what_is_outside_their_windows():
    model = make_model(n_layers=1)
    mel = np.random.RandomState(0).randn(1, 160, 128).astype(np.float32)
    model.encoder.layers = model.encoder.layers[:1]
    frames = np.array(model.encoder(mx.array(mel), model.audio_memory()))
    changed = mel.copy()
    changed[:, 40] += 1  # mel frame 40 enters encoder frames 20 and 21, through conv2 and conv1
    other = np.array(model.encoder(mx.array(changed), model.audio_memory()))
    differs = np.flatnonzero(np.abs(other - frames).max(1) > 0)
    assert differs.min() == 20 and differs.max() == 21 + 11  # a window of 12 sees 11 back
    x = np.random.RandomState(1).randn(120, 64).astype(np.float32)
    run = lambda x: np.array(model.language_model(mx.array(x), model.language_model.ffn_weights(6),
                                                  [V.KVCache(model.decoder_args)]))
    a, x[30] = run(x), 5
    differs = np.flatnonzero(np.abs(run(x) - a).max(1) > 0)
    assert differs.min() == 30 and differs.max() == 30 + 39


def test_causal_and_chunked_equals_whole():
    model, rng = make_model(), np.random.RandomState(3)
    mel = mx.array(rng.randn(1, 400, 128).astype(np.float32))
    whole = model.encode(mel[0])
    assert whole.shape == (50, 64) and [len(model.encode(mel[0, :n])) for n in (0, 7, 8, 15)] == [0, 0, 1, 1]
    changed = mx.concatenate([mel[:, :240], mel[:, 240:] + 1], axis=1)
    assert mx.array_equal(model.encode(changed[0])[:29], whole[:29])
    for sizes in ([8] * 50, [24, 40, 8, 328], [16] * 25, [400]):
        memory, parts, at = model.audio_memory(), [], 0
        for n in sizes:
            parts.append(model.embed_audio(mel[:, at : at + n], memory))
            at += n
        assert close(mx.concatenate(parts), whole)


def test_cached_decoding_equals_recomputation():
    model, rng = make_model(), np.random.RandomState(4)
    decoder, weights = model.language_model, model.language_model.ffn_weights(6)
    x = mx.array(rng.randn(200, 64).astype(np.float32))
    fresh = lambda: [V.KVCache(model.decoder_args) for _ in decoder.layers]
    whole = decoder(x, weights, fresh())
    # ... and the definition: full attention with a banded mask, nothing cached.
    for sizes in ([1] * 200, [39] + [1] * 161, [7, 60, 2, 131]):
        caches, parts, at = fresh(), [], 0
        for n in sizes:
            parts.append(decoder(x[at : at + n], weights, caches))
            at += n
        assert close(mx.concatenate(parts), whole)


@contextlib.contextmanager
def fused():
    """On a CPU rms_norm, rope and attention are made of dozens of operations; here each is one, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "rms_norm", lambda x, *_: mx.abs(x))
        patch.setattr(mx.fast, "rope", lambda x, *_, **__: mx.abs(x))
        patch.setattr(mx.fast, "scaled_dot_product_attention", lambda q, k, v, **_: mx.depends(q, [k, v]))
        yield


def operations(caches, *outputs):
    """The number of operations that wait to be submitted, with those on the buffers of the caches."""
    with tempfile.TemporaryDirectory() as folder:
        mx.export_to_dot(f"{folder}/graph", *outputs, *(x for cache in caches for x in (cache.keys, cache.values)))
        return Path(folder, "graph").read_text().count("shape=rectangle")


def layer_operations(step):
    """What a decoder layer adds to a step: `step` makes one of a model with so many layers, not yet evaluated."""
    with fused():
        one, two = (operations(*step(n_layers)) for n_layers in (1, 2))
    return two - one


def our_step(n_layers):
    model = make_model(n_layers=n_layers)
    steps = Steps(model, 40)
    for n in (40, 1):  # prompt and first token make the buffers
        steps._token = steps._generate(mx.zeros((n, 64)))
    mx.eval(steps._token)
    return steps._caches, model.language_model(mx.zeros((1, 64)), steps._ffn_weights, steps._caches)


def test_a_step_submits_few_operations():
    # On a GPU a step waits for the processor that submits it, so each operation counts. In a layer 17 kernels: 7
    # products, 2 norms, 2 rotations, 2 writes to the cache, attention, gate, 2 sums. And 13 views: 7 transposed
    # weights, 2 slices of the cache, and the heads of q, k, v, and of the output, undone.
    assert layer_operations(our_step) == 30


def test_adaptive_norm_folds_and_hears_the_delay():
    model = make_model()
    decoder = model.language_model
    half = np.arange(32) / 32
    t = np.concatenate([np.cos(6 * 1e4 ** -half), np.sin(6 * 1e4 ** -half)]).astype(np.float32)
    layer = decoder.layers[0]
    x = mx.array(np.random.RandomState(0).randn(3, 64).astype(np.float32))
    ada = layer.ada_norm.linear_out(nn.gelu(layer.ada_norm.linear_in(mx.array(t)[None])))
    folded = mx.fast.rms_norm(x, decoder.ffn_weights(6)[0], 1e-5)
    assert close(folded, layer.ffn_norm(x) * (1 + ada))
    assert not close(decoder.ffn_weights(1)[0], decoder.ffn_weights(30)[0])


def test_no_activation_leaves_the_type_of_the_weights():
    model = make_model()
    model.set_dtype(mx.bfloat16)
    x = model.encode(mx.zeros((64, 128)))
    decoder = model.language_model
    caches = [V.KVCache(model.decoder_args) for _ in decoder.layers]
    y = decoder(decoder.embed_tokens(mx.zeros(8, mx.int32)) + x, decoder.ffn_weights(6), caches)
    assert {x.dtype, y.dtype, decoder.embed_tokens.as_linear(y).dtype, caches[0].keys.dtype} == {mx.bfloat16}


# ------------------------------------------------------------------------------------- checkpoints

FULL = {"dim": 3072, "n_layers": 26, "head_dim": 128, "hidden_dim": 9216, "n_heads": 32, "n_kv_heads": 8,
        "rope_theta": 1e6, "sliding_window": 8192, "vocab_size": 131072}
FULL_ENCODER = {"dim": 1280, "n_layers": 32, "head_dim": 64, "hidden_dim": 5120, "n_heads": 32, "n_kv_heads": 32,
                "rope_theta": 1e6, "sliding_window": 750}


def test_full_size_has_711_tensors_and_8859358720_bytes():
    full = config(**FULL)
    full["multimodal"]["whisper_model_args"]["encoder_args"] |= FULL_ENCODER
    model = V.Voxtral(full)  # lazy: nothing is allocated
    leaves = tree_flatten(model.parameters())
    assert sum(2 * w.size for _, w in leaves) == 8_859_358_720
    names = their_names(model, "original")
    table = {row[1]: row[0] for row in V.NAMES[1:]}
    assert len(names) == 711 and {V.converted_name(n, table) for n in names} == {n for n, _ in leaves}


@pytest.mark.parametrize("bits", [None, 4, 6, 8])
def test_converted_checkpoints_load_and_equal_quantisation_in_memory(checkpoint, tmp_path, bits, noise):
    V.convert(checkpoint, tmp_path / "out", bits=bits)
    model, tokenizer, _ = V.load_voxtral_model(tmp_path / "out")
    expected = make_model()
    if bits:
        nn.quantize(expected, 64, bits, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 64 == 0)
    for (name, a), (other, b) in zip(sorted(tree_flatten(model.parameters())), sorted(tree_flatten(expected.parameters()))):
        assert name == other and mx.array_equal(a, b)
    assert V.transcribe(model, tokenizer, noise[:16000]).tokens == V.transcribe(expected, tokenizer, noise[:16000]).tokens
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]
    with pytest.raises(V.VoxtralError, match="not an empty folder"):
        V.convert(checkpoint, tmp_path / "out")


def test_sharded_checkpoint(checkpoint, tmp_path):
    model, _, cfg = V.load_voxtral_model(checkpoint)
    weights, index = sorted(tree_flatten(model.parameters())), {}
    for i in range(3):
        mx.save_safetensors(str(tmp_path / f"model-{i}.safetensors"), dict(weights[i::3]))
        index |= {name: f"model-{i}.safetensors" for name, _ in weights[i::3]}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    write_tekken(tmp_path)
    V.load_voxtral_model(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(V.VoxtralError, match="model-1"):
        V.load_voxtral_model(tmp_path)


def damage(folder, what):
    path = folder / "consolidated.safetensors"
    weights = dict(mx.load(str(path)))
    params = json.loads((folder / "params.json").read_text())
    if what == "missing":
        del weights["norm.weight"]
    elif what == "unexpected":
        weights["extra.weight"] = mx.zeros(3)
    elif what == "shape":
        weights["norm.weight"] = mx.zeros(3)
    elif what == "field":
        del params["dim"]
    elif what == "type":
        params["n_heads"] = "many"
    elif what == "absurd":
        params["n_layers"] = 10**9
    elif what == "offline":
        del params["ada_rms_norm_t_cond_dim"]
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)
    (folder / "params.json").write_text("{" if what == "json" else json.dumps(params))
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif what == "garbage":
        path.write_bytes(b"\xff" * 1000)
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "tokenizer":
        (folder / "tekken.json").unlink()
    elif what == "vocabulary":
        write_tekken(folder, 1300)
    elif what == "weights":
        path.unlink()


@pytest.mark.parametrize("what", ["missing", "unexpected", "shape", "field", "type", "absurd", "offline", "json",
                                  "truncated", "garbage", "empty", "tokenizer", "vocabulary", "weights"])
def test_damaged_checkpoints_end_in_one_clear_error(tmp_path, what):
    folder = write_original(tmp_path / "model", make_model())
    damage(folder, what)
    with pytest.raises(V.VoxtralError) as error:
        V.load_voxtral_model(folder)
    named = {"missing": "language_model.norm.weight", "unexpected": "extra.weight", "shape": "norm.weight"}
    assert str(folder) in str(error.value) and named.get(what, "") in str(error.value)


def test_one_set_of_weights_is_downloaded():
    mistral = ["README.md", "params.json", "consolidated.safetensors", "config.json", "model.safetensors", "tekken.json"]
    assert V.choose_files(mistral, {"model_type": "voxtral_realtime"}) == [
        "consolidated.safetensors", "params.json", "tekken.json"]
    shards = ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "tekken.json"]
    assert V.choose_files([*shards, "x.md"], {"multimodal": {}}) == shards
    assert V.choose_files([*mistral], {"multimodal": {}}) == ["config.json", "model.safetensors", "tekken.json"]


# ------------------------------------------------------------------------------------------ stream


def test_any_chunking_gives_the_tokens_of_one_feed(loaded, noise):
    model, tokenizer, _ = loaded
    whole = V.transcribe(model, tokenizer, noise, delay_ms=160)
    assert len(set(whole.tokens)) > 5 and "".join(word.text for word in whole.words) == whole.text
    rng = np.random.RandomState(5)
    for largest in (3, 700, 5000, 40000):
        stream, at, text = V.Stream(model, tokenizer, delay_ms=160), 0, ""
        samples = noise if largest > 3 else noise[:4000]
        while at < len(samples):
            n = rng.randint(1, largest + 1)
            text += stream.feed(samples[at : at + n])
            at += n
        text += stream.finish()
        expected = whole if largest > 3 else V.transcribe(model, tokenizer, samples, delay_ms=160)
        assert (stream.tokens, stream.words, stream.text, text) == (
            expected.tokens, expected.words, expected.text, expected.text)


def test_a_token_comes_with_the_feed_that_makes_it_possible(loaded, noise):
    model, tokenizer, _ = loaded
    for delay in (80, 480):
        stream, frames = V.Stream(model, tokenizer, delay_ms=delay), delay // 80
        for k in range(30):
            stream.feed(noise[k * 1280 : k * 1280 + 40])  # token k - frames - 1 looks 2.5 ms ahead
            assert len(stream.tokens) == max(0, k - frames)
            stream.feed(noise[k * 1280 + 40 : (k + 1) * 1280])
            assert len(stream.tokens) == max(0, k - frames)


@pytest.mark.parametrize("delay", range(80, 2401, 80))
def test_delay_sets_prompt_and_padding(loaded, delay):
    model, tokenizer, _ = loaded
    stream, n = V.Stream(model, tokenizer, delay_ms=delay), delay // 80
    assert stream._token.tolist() == [1] + [32] * (32 + n) and stream._right_pad == n + 11


def test_impossible_delays_and_samples(loaded):
    model, tokenizer, _ = loaded
    for delay in (0, -80, 81, 2480, 479.5):
        with pytest.raises(V.VoxtralError, match="multiple of 80"):
            V.Stream(model, tokenizer, delay_ms=delay)
    for samples in (np.zeros(5, np.int16), np.zeros((5, 2)), np.array([math.nan])):
        with pytest.raises(V.VoxtralError):
            V.Stream(model, tokenizer).feed(samples)


class Scripted(V.Stream):
    """A stream whose model says what the test wants: token k is script[k]."""

    def take(self, tokens):
        for token in tokens:
            self._take(token)
        return self


def test_characters_split_over_tokens_and_words(loaded):
    model, tokenizer, _ = loaded
    byte = lambda text: [1000 + b for b in text.encode()]
    stream = Scripted(model, tokenizer).take([32, 33, *byte(" é"), 32, 33, *byte(" 八"), *byte("九!"), 2, 33, *byte(" x y")])
    assert stream.text == "é 八九! x y" and stream.tokens.count(2) == 1
    assert [word.text for word in stream.words] == ["é", " 八九!", " x y"]
    assert [word.end for word in stream.words][:2] == [0.16, 0.56]
    assert stream.words[0].start == 0 and stream.words[1].start == 0.16
    broken = Scripted(model, tokenizer).take([33, 1000 + 0xE5, 32])
    assert broken.text == "" and broken.finish() == "\ufffd"


def test_a_stream_may_be_fed_from_several_threads(checkpoint, noise, tmp_path):
    # An audio callback has its own thread, and MLX computes nothing in one that was asked for in another. In a process
    # of its own, with compilation off: at exit MLX 0.32 at times aborts after mx.compile was used in a thread.
    np.save(tmp_path / "noise.npy", noise)
    code = """if True:
        import sys, threading, numpy as np, voxtral as V
        (model, tokenizer, _), x = V.load_voxtral_model(sys.argv[1]), np.load(sys.argv[2])
        def elsewhere(work):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        one, two, three = (V.Stream(model, tokenizer, temperature=t) for t in (0.0, 0.0, 0.5))
        model.encode(V.log_mel_spectrogram(x))  # never computed: what it leaves behind must not matter
        elsewhere(lambda: (one.feed(x), one.finish()))
        for i in range(0, len(x), 3000):
            for stream in (two, three):
                (elsewhere if i % 9000 else lambda work: work())(lambda: stream.feed(x[i : i + 3000]))
        two.finish(), three.finish()
        print(len(one.tokens) > 0, one.tokens == two.tokens, len(one.tokens) == len(three.tokens))"""
    done = subprocess.run([sys.executable, "-c", code, checkpoint, tmp_path / "noise.npy"], capture_output=True, check=False,
                          timeout=120, env=os.environ | {"MLX_DISABLE_COMPILE": "1", "PYTHONPATH": str(HERE)})
    assert done.stdout.decode().split() == ["True"] * 3, done.stderr.decode()[-800:]


def test_flush_keeps_the_stream_open_and_its_silence_out_of_times(loaded, noise):
    model, tokenizer, _ = loaded
    stream = V.Stream(model, tokenizer, delay_ms=160)
    stream.feed(noise[:20000])
    stream.flush()
    assert stream.flush() == "" and stream.time == 20000 / 16000
    tokens = len(stream.tokens)
    stream.feed(noise[:32000])
    stream.finish()
    assert len(stream.tokens) > tokens + 20 and stream.words[-1].end <= 52000 / 16000
    tokens = len(stream.tokens)
    assert stream.finish() == stream.flush() == "" and len(stream.tokens) == tokens
    with pytest.raises(V.VoxtralError, match="finished"):
        stream.feed(noise)
    ends = [word.end for word in stream.words]
    assert ends == sorted(ends)


def test_end_of_sequence_ends_only_in_the_final_padding(loaded):
    model, tokenizer, _ = loaded
    stream = Scripted(model, tokenizer, delay_ms=80)
    stream._end = 10  # frames
    stream.take([32] * 8 + [2, 32, 2, 32])  # at k = 8 frame 9 is the last heard; k = 9 hears padding
    assert stream.tokens == [32] * 8 + [2, 32] and stream._ended


# ------------------------------------------------------------------------------------------ output


def test_subtitles_are_readable():
    def words(*groups):
        return [V.Word(text, start, end) for text, start, end in groups]

    speech = words(("Hello", 0, 0.4), (" world.", 0.4, 0.8), (" Again", 0.9, 1.3), (" later", 3.0, 3.4))
    speech += words(*((f" number{i}", 4 + i * 0.5, 4.4 + i * 0.5) for i in range(40)))
    speech += words(("八" * 100, 30, 31), (" " + "x" * 100, 31, 32))
    for kind in ("srt", "vtt"):
        subtitles, out = V.Subtitles(kind), ""
        for i in range(len(speech) + 1):
            out += subtitles.update(speech[:i], speech[i - 1].end if i else 0)
        out += subtitles.update(speech)
        once = V.Subtitles(kind).update(speech)
        assert out == once and out.startswith("1\n00:00:00,000 --> 00:00:00,800\nHello world.\n\n" if kind == "srt" else "WEBVTT\n\n00:00:00.000")
        last = -1.0
        for cue in out.removeprefix("WEBVTT\n\n").strip().split("\n\n"):
            times, *lines = cue.split("\n")[kind == "srt" :]
            start, end = (sum(float(x) * 60**i for i, x in enumerate(reversed(t.replace(",", ".").split(":")))) for t in times.split(" --> "))
            assert last <= start < end <= start + 7.001 and 1 <= len(lines) <= 2
            assert all(V.columns(line) <= 42 for line in lines)
            last = end


def run(*args, stdin=b"", **kwargs):
    done = subprocess.run([sys.executable, HERE / "voxtral.py", *map(str, args)], input=stdin,
                          capture_output=True, timeout=120, check=False, **kwargs)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_command_line(checkpoint, tmp_path, noise):
    import soundfile

    good, spaced = tmp_path / "good.wav", tmp_path / "a b\nc 🎙.wav"
    for path in (good, spaced):
        soundfile.write(path, noise[:16000], 16000, subtype="FLOAT")
    code, out, err = run("--model", checkpoint, "--quiet", "--format", "json", good, spaced)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and err == "" and [r["file"] for r in records] == [str(good), str(spaced)]
    assert records[0]["duration"] == 1.0 and records[0]["delay_ms"] == 480 and set(records[0]) == {
        "file", "model", "delay_ms", "duration", "text", "words", "tokens"}
    code, out, err = run("--model", checkpoint, "--quiet", tmp_path / "no.wav", tmp_path, good)
    assert code == 1 and out.strip() == records[0]["text"].strip() and len(err.splitlines()) == 2
    pcm = (noise[:16000] * 32767).astype("<i2").tobytes()
    soundfile.write(tmp_path / "pcm.wav", np.frombuffer(pcm, "<i2"), 16000, subtype="PCM_16")
    results = [run("--model", checkpoint, "--quiet", "-", stdin=data)
               for data in (pcm, pcm + b"x", (tmp_path / "pcm.wav").read_bytes())]
    assert results[0][0] == 0 and results[0] == results[1] == results[2]
    for stdin in (b"", b"x", b"RIFF\0\0\0\0WAVEfmt "):
        code, out, err = run("--model", checkpoint, "--quiet", "-", stdin=stdin)
        assert code == 1 and out == "" and len(err.splitlines()) == 1 and "Traceback" not in err
    for args, expected in ((["--delay", "100"], 1), (["--bits", "5"], 2), (["-", "-"], 2), (["--convert", "x", good], 2)):
        code, _, err = run("--model", checkpoint, *args, *([] if "-" in args or "--convert" in args else [good]))
        assert code == expected and "Traceback" not in err
    assert run()[0] == 2
    for model in (tmp_path / "nowhere", tmp_path, good):
        code, out, err = run("--model", model, good)
        assert code == 1 and len(err.splitlines()) == 1 and "Traceback" not in err



def call(*args):
    """The command line in this process: exit code, standard output, lines of standard error."""
    with contextlib.redirect_stdout(Output()) as out, contextlib.redirect_stderr(Output()) as err:
        try:
            code = V.main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
    return code, out.text(), err.text().splitlines()


class Output(io.TextIOWrapper):
    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def text(self):
        return self.buffer.getvalue().decode()


def sound_file(folder, what, noise):
    """A file with something special about it, and what the message about it must say ("" if it is good)."""
    import soundfile

    x, kind, _, option = noise[:8000], *what.partition(" ")
    path = folder / f"x.{kind}"
    if option == "text":
        path.write_text("this is not sound")
    elif option == "m4a":
        path.write_bytes(b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom" + bytes(1000))
    elif option == "name":
        path = folder / "a b\n\N{STUDIO MICROPHONE}é.wav"
        soundfile.write(path, x, 16000)
    elif option == "folder":
        path.mkdir()
    elif option in ("nan", "inf"):
        soundfile.write(path, np.append(x, np.float32(option)), 16000, subtype="FLOAT")
    elif option == "one":
        soundfile.write(path, x[:1], 16000)
    elif option == "none":
        soundfile.write(path, x[:0], 16000)
    elif option == "channels":
        soundfile.write(path, np.repeat(x[:, None], 6, 1), 16000)
    elif option.endswith("Hz"):
        soundfile.write(path, x, int(option[:-2]), subtype="PCM_16")
    elif option in ("PCM_U8", "PCM_24", "PCM_32", "DOUBLE"):
        soundfile.write(path, x, 16000, subtype=option)
    else:  # cut
        soundfile.write(path, noise, 16000)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * float(option))])
    return path


SOUNDS = {  # what is special: what the one line must say
    "wav text": "ffmpeg -i", "wav m4a": "ffmpeg -i", "m4a m4a": "ffmpeg -i", "wav folder": "directory",
    "wav nan": "NaN", "wav inf": "infinite", "wav none": "no samples", "wav 1Hz": "sample rate", "wav 999Hz": "sample rate",
    "wav 0.6": "cut short", "flac 0.6": "", "mp3 0.6": "cut short", "ogg 0.6": "cut short", "wav 0.001": "",
    "flac 0.001": "", "mp3 0.001": "", "ogg 0.001": "",
}


@pytest.mark.parametrize("what", SOUNDS)
def test_bad_sound_is_one_clear_line(checkpoint, tmp_path, noise, what):
    path = sound_file(tmp_path, what, noise)
    code, out, err = call("--model", checkpoint, "--quiet", "--format", "json", path)
    assert code == 1 and out == "" and len(err) == 1
    assert path.name in err[0] and SOUNDS[what] in err[0]


@pytest.mark.parametrize("what", ["wav name", "wav one", "wav channels", "wav 1000Hz", "wav 8000Hz", "wav 44100Hz",
                                  "wav 384000Hz", "wav PCM_U8", "wav PCM_24", "wav PCM_32", "wav DOUBLE"])
def test_unusual_sound_is_transcribed(checkpoint, tmp_path, noise, what):
    code, out, err = call("--model", checkpoint, "--quiet", "--format", "json", sound_file(tmp_path, what, noise))
    assert code == 0 and err == [] and json.loads(out)["duration"] > 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(checkpoint, tmp_path, noise):
    path = sound_file(tmp_path, "wav one", noise)
    path.chmod(0)
    code, out, err = call("--model", checkpoint, "--quiet", path)
    assert (code, out, len(err)) == (1, "", 1) and "ermission" in err[0]


def strange_folder(folder, what, checkpoint):
    """A model folder that cannot work, made from one that does."""
    config = {"voxtral": {"model_type": "voxtral"}, "whisper": {"model_type": "whisper"}, "list": [1], "number": 3}
    if what == "mixed":  # params.json of Mistral's layout, weights of transformers'
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        (folder / "consolidated.safetensors").unlink()
        mx.save_safetensors(str(folder / "model.safetensors"), their_names(make_model(), "transformers"))
    elif what in config:
        (folder / "config.json").write_text(json.dumps(config[what]))
        mx.save_safetensors(str(folder / "model.safetensors"), {"x": mx.zeros(3)})
    elif what != "empty":
        V.convert(checkpoint, folder, bits=4)
        path = folder / "config.json"
        text = json.loads(path.read_text())
        if what == "outside":
            shutil.copy(folder / "model.safetensors", folder.parent / "other.safetensors")
            index = {"weight_map": {"a": "../other.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        elif what == "unquantised":
            del text["quantization"]
        elif what == "bits":
            text["quantization"]["bits"] = 8
        elif what == "group":
            text["quantization"]["group_size"] = 48
        elif what == "no audio":
            write_tekken(folder, audio_is_there=False)
        elif what == "old":
            write_tekken(folder, version="v99")
        path.write_text(json.dumps(text))
    return folder


STRANGE = {
    "empty": "not a model folder", "mixed": "not a model folder", "voxtral": "a voxtral checkpoint; needed: Voxtral Mini 4B Realtime",
    "whisper": "a whisper checkpoint", "list": "", "number": "", "outside": "../other.safetensors", "unquantised": "quantization",
    "bits": "", "group": "", "no audio": "tekken.json", "old": "tekken.json",
}


@pytest.mark.parametrize("what", STRANGE)
def test_strange_checkpoints_are_one_clear_line(checkpoint, tmp_path, noise, what):
    (tmp_path / "model").mkdir()
    folder = strange_folder(tmp_path / "model", what, checkpoint)
    code, out, err = call("--model", folder, "--quiet", sound_file(tmp_path, "wav one", noise))
    assert code == 1 and out == "" and len(err) == 1 and str(folder) in err[0] and STRANGE[what] in err[0]


def test_wrong_commands(checkpoint, tmp_path, noise):
    good = sound_file(tmp_path, "wav one", noise)
    for args in ([], ["-", "-"], ["--convert", "x", good], ["--format", "doc", good], ["--bits", "5", "--convert", "x"]):
        code, out, err = call("--model", checkpoint, *args)
        assert code == 2 and out == "" and "usage" in err[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for folder in ("full", "full/file"):
        code, out, err = call("--model", checkpoint, "--convert", tmp_path / folder)
        assert (code, out, len(err)) == (1, "", 1) and "not an empty folder" in err[0]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
    code, out, err = call("--model", "nobody/nothing", "--quiet", good)  # no network here, or no such repository
    assert (code, out, len(err)) == (1, "", 1) and "nobody/nothing" in err[0]


def test_an_interrupted_conversion_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    def full(*_):
        raise RuntimeError("[write] Unable to write 99 bytes to file.")

    for where, name, what, expected in ((V.os, "replace", interrupted, 130), (V.mx, "save_safetensors", full, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, what)
            code, out, err = call("--model", checkpoint, "--convert", tmp_path / "out", "--bits", "4")
        assert code == expected and out == "" and len(err) <= 1 and list(tmp_path.iterdir()) == []


def test_closed_standard_output(checkpoint, tmp_path, noise):
    import soundfile

    soundfile.write(tmp_path / "x.wav", noise, 16000)
    files = " ".join([str(tmp_path / "x.wav")] * 3)
    command = f"{sys.executable} {HERE / 'voxtral.py'} --quiet --model {checkpoint} --format json {files} | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert len(done.stdout) == 1 and done.stderr == "voxtral.py: standard output was closed\n"


def wav_bytes(pcm, size, channels=1, rate=16000, extra=b""):
    """A WAV stream as programs write it to a pipe; sox and ffmpeg put large sizes of their own there."""
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2, channels * 2, 16)
    return (b"RIFF" + struct.pack("<I", size) + b"WAVEfmt " + struct.pack("<I", 16) + form + extra
            + b"data" + struct.pack("<I", size) + pcm)


@pytest.mark.slow
def test_pipes(checkpoint, noise):
    pcm = (noise[:16000] * 32767).astype("<i2").tobytes()
    ffmpeg = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.16.100\0"
    streams = [pcm, pcm + b"x", wav_bytes(pcm, 0xFFFFFFFF, extra=ffmpeg), wav_bytes(pcm, 0x7FFFF000 + 36),
               wav_bytes(pcm + b"x", 0xFFFFFFFF), wav_bytes(pcm, len(pcm))]
    results = [run("--model", checkpoint, "--quiet", "--format", "json", "-", stdin=data) for data in streams]
    assert all((code, err) == (0, "") for code, _, err in results)
    records = [json.loads(out) for _, out, _ in results]
    assert records[0]["duration"] == 1 and records == records[:1] * len(streams)
    for data in (b"", b"x", wav_bytes(b"", 0xFFFFFFFF)[:30], wav_bytes(b"", 0xFFFFFFFF)):
        code, out, err = run("--model", checkpoint, "--quiet", "--format", "json", "-", stdin=data)
        assert code == 1 and out == "" and len(err.splitlines()) == 1 and "Traceback" not in err


def test_a_killed_writer_loses_nothing_that_was_heard(checkpoint, noise):
    pcm = (noise * 32767).astype("<i2").tobytes()
    command = [sys.executable, HERE / "voxtral.py", "--quiet", "--model", checkpoint, "--format", "json", "-"]
    whole = run(*command[2:], stdin=pcm)
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writer = "import sys, os, signal; sys.stdout.buffer.write(sys.stdin.buffer.read()); sys.stdout.flush(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", writer], input=wav_bytes(pcm, 0xFFFFFFFF), stdout=program.stdin, check=False)
    out, err = program.communicate(timeout=120)
    assert (program.returncode, err, json.loads(out)) == (0, b"", json.loads(whole[1]))


@pytest.mark.slow
def test_two_processes_share_the_files(checkpoint, tmp_path, noise):
    import soundfile

    names = [tmp_path / f"{i}.wav" for i in range(3)]
    for i, name in enumerate(names):
        soundfile.write(name, noise[i * 16000 : (i + 1) * 16000], 16000)
    command = [HERE / "voxtral.py", "--quiet", "--model", checkpoint, "--format", "json", *names]
    launch = [Path(sys.executable).parent / "mlx.launch", "-n", "2", "--backend", "ring", "--python", sys.executable]
    done = subprocess.run([*launch, *command], capture_output=True, text=True, timeout=120, check=False)
    one = run(*command[1:])[1].splitlines()
    assert done.returncode == 0 and len(one) == 3
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("{")) == sorted(one)


def mutate(rng, data, reach):
    """A few bytes changed, left out or put in, within the first `reach`."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        i, what = rng.randrange(max(1, min(len(data), reach))), rng.random()
        if what < 0.6:
            data[i : i + 1] = bytes([rng.choice((rng.randrange(256), *b'0123456789-"'))])
        elif what < 0.8:
            del data[i : i + rng.randrange(1, 9)]
        else:
            data[i:i] = bytes(rng.choice(b'0123456789-"{}[],') for _ in range(rng.randrange(1, 6)))
    return bytes(data)


@pytest.mark.slow
def test_damage_of_any_kind_ends_in_a_clear_error_or_in_success(tmp_path, noise):
    """3,000 damaged checkpoints and as many recordings; a crash or a hang of 20 s ends the test."""
    import soundfile

    folder, rng, seen = write_original(tmp_path / "model", make_model()), random.Random(0), set()
    for kind in ("wav", "flac", "ogg", "mp3"):
        soundfile.write(tmp_path / f"a.{kind}", noise[:16000], 16000)
    checkpoints = {path: path.read_bytes() for path in folder.iterdir()}
    sounds = {path: path.read_bytes() for path in tmp_path.glob("a.*")}
    for _ in range(3000):
        faulthandler.dump_traceback_later(20, exit=True)
        path, data = rng.choice(list(checkpoints.items()))
        header = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(mutate(rng, data, header if path.suffix == ".safetensors" else len(data)))
        sound, heard = rng.choice(list(sounds.items()))
        sound.write_bytes(mutate(rng, heard, rng.choice((200, len(heard)))))
        for attempt in (partial(V.load_voxtral_model, folder), partial(V.load_audio, sound)):
            try:
                attempt()
                seen.add("success")
            except V.VoxtralError as error:
                assert str(error).strip()
                seen.add("error")
        path.write_bytes(data)
    faulthandler.cancel_dump_traceback_later()
    assert seen == {"success", "error"}


@pytest.mark.slow
def test_memory_and_work_do_not_grow(noise, tmp_path):
    """A long stream: nothing but tokens, words and text is larger at its end than after ten windows."""
    write_tekken(tmp_path)
    model = make_model(n_layers=1)
    model.encoder.layers = model.encoder.layers[:1]
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    stream = V.Stream(model, Tekkenizer.from_file(tmp_path / "tekken.json"))
    active = []
    for _ in range(40):  # 40 x 6 s; the decoder's window is 3.2 s, the encoder's 0.24 s
        stream.feed(noise)
        mx.eval([c.keys for c in stream._caches])
        active.append(mx.get_active_memory())
        caches = [*stream._caches, *stream._memory[2]]
        assert all(cache.keys.shape[2] <= 3 * cache.window + 40 and cache.length < 1000 for cache in caches)
    assert max(active[10:]) <= 1.05 * max(active[:10])
    assert len(stream.tokens) == 40 * 75 - 7


@needs_digits
@pytest.mark.slow
def test_digits_after_a_flush_have_their_times():
    model, tokenizer, _ = V.load_voxtral_model(DIGITS / "original", "float32")
    samples = V.load_audio(DIGITS / "clips/pause.flac")
    truth = json.loads((DIGITS / "clips/pause.json").read_text())["words"]
    pause = max(range(1, len(truth)), key=lambda i: truth[i]["start"] - truth[i - 1]["end"])
    cut = int(8000 * (truth[pause]["start"] + truth[pause - 1]["end"]))
    stream = V.Stream(model, tokenizer, delay_ms=480)
    stream.feed(samples[:cut])
    stream.flush()
    assert len(stream.words) == pause  # all that was said is there
    stream.feed(samples[cut:])
    stream.finish()
    assert [word.text.strip() for word in stream.words] == [word["word"] for word in truth]
    ends, starts = (np.median([abs(getattr(word, side) - true[side]) for word, true in zip(stream.words, truth)])
                    for side in ("end", "start"))
    assert ends <= 0.08 and starts <= 0.15


@needs_digits
@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 6, 4])
def test_digits_converted_equal_quantised_in_memory(tmp_path, bits):
    V.convert(DIGITS / "original", tmp_path / "out", bits=bits)
    samples = V.load_audio(DIGITS / "clips/short.wav")
    model, tokenizer, _ = V.load_voxtral_model(tmp_path / "out", "float32")
    tokens = V.transcribe(model, tokenizer, samples).tokens
    model, _ = V.prepare_model(DIGITS / "original", None)
    if bits:
        nn.quantize(model, 64, bits, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 64 == 0)
    model.load_weights([(name, w if w.dtype == mx.uint32 else w.astype(mx.float32)) for name, w in tree_flatten(model.parameters())])
    assert V.transcribe(model, tokenizer, samples).tokens == tokens


@needs_digits
@pytest.mark.parametrize("bits", [None, 6, 4])
def test_voxmlx_loads_what_we_convert(tmp_path, bits):
    pytest.importorskip("voxmlx")
    from voxmlx.weights import load_model

    V.convert(DIGITS / "original", tmp_path / "out", bits=bits)
    theirs, _ = load_model(str(tmp_path / "out"))
    ours, _, _ = V.load_voxtral_model(tmp_path / "out")
    ours, theirs = (dict(tree_flatten(model.parameters())) for model in (ours, theirs))
    assert ours.keys() == theirs.keys() and all(mx.array_equal(w, theirs[name]) for name, w in ours.items())



# ----------------------------------------------------------------------------- learning to transcribe
# How does such a model learn? From recordings in which it is known when each word ends. The target is
# a stream of tokens, one per 80 ms: where a word ends in frame k, target k is [STREAMING_WORD], and
# the word's tokens follow; everywhere else it is [STREAMING_PAD]. The delay enters twice. A prompt of
# BOS and [STREAMING_PAD], as long as the left padding and the delay, shifts the target behind the
# sound: at the position that has heard frame k + delay the model is to write token k. And the norms
# of the decoder are told the delay, since by nothing else could it know which frame is due.
#
# Here the "words" are the keys of a telephone: two tones each, of random length, loudness and pause,
# in some noise. The model has about 100,000 parameters and starts from random numbers.

KEYS = "1234567890"
LEFT, FRAMES, DELAYS = 2, 20, (1, 2)  # left padding, length of a training clip, delays: in tokens
PAD, WORD, KEY = 32, 33, 1256  # token ids; KEY + 3 is " 3"
USED = [1, PAD, WORD, *range(KEY, KEY + 10)]  # 1 is BOS
LEARNER = {"dim": 48, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96, "rope_theta": 100.0, "sliding_window": 16,
           "vocab_size": 1266, "ada_rms_norm_t_cond_dim": 8}
LEARNER_ENCODER = {"dim": 48, "n_layers": 1, "hidden_dim": 96, "rope_theta": 100.0, "sliding_window": 16}


def learner():
    """The model that is to learn, with 2 decoder layers: the delay enters after the first one's attention."""
    cfg = config(**LEARNER)
    encoder = cfg["multimodal"]["whisper_model_args"]["encoder_args"]
    encoder |= {**LEARNER_ENCODER, "audio_encoding_args": {**encoder["audio_encoding_args"], "num_mel_bins": 64}}
    model, rng, weights = V.Voxtral(cfg), np.random.RandomState(0), []
    for name, w in tree_flatten(model.parameters()):
        value = rng.randn(*w.shape) * (1.4 if "conv" in name else 1) / math.sqrt(math.prod(w.shape[1:]))
        if w.ndim == 1:
            value = np.full(w.shape, float("norm" in name))
        elif "embed" in name:  # ids that never occur stay at zero: a logit of 0 each
            value = rng.randn(*w.shape) * 0.1 * np.isin(np.arange(len(w)), USED)[:, None]
        weights.append((name, mx.array(value.astype(np.float32))))
    model.load_weights(weights)
    return model, cfg


def telephone(rng, seconds):
    """Somebody presses keys: samples, and (key, when it ends in seconds) of each."""
    x = rng.randn(int(seconds * 16000)) * 10 ** rng.uniform(-3.5, -2)
    keys, at = [], rng.uniform(0.05, 0.4)
    while (end := at + rng.uniform(0.08, 0.2)) < seconds - 0.02:
        key = rng.randint(10)
        row, column = divmod(KEYS.index(str(key)), 3) if key else (3, 1)
        now = np.arange(int(at * 16000), int(end * 16000))
        tones = (697, 770, 852, 941)[row], (1209, 1336, 1477)[column]
        x[now] += 10 ** rng.uniform(-1.3, -0.5) * sum(np.sin(2 * np.pi * f * now / 16000) for f in tones)
        keys.append((str(key), end))
        at = end + rng.uniform(0.1, 0.4)
    return x.astype(np.float32), keys


def training_clip(rng, mel):
    """Log-mel, the target stream, and for each frame of sound the key that ends in it; both index USED."""
    quiet = rng.randint(7) * 0.08  # the end of a recording is silence, which is to mean nothing
    x, keys = telephone(rng, FRAMES * 0.08 - quiet)
    x = np.pad(x, (LEFT * 1280, (FRAMES + max(DELAYS)) * 1280 - len(x)))
    stream, ends = [PAD] * (FRAMES + 1), [PAD] * (LEFT + FRAMES + max(DELAYS))
    for key, end in keys:
        k = int(end / 0.08)  # the frame that it ends in
        stream[k : k + 2] = WORD, KEY + int(key)
        ends[LEFT + k] = KEY + int(key)
    return V.log_mel_spectrogram(x, mel), [USED.index(t) for t in stream[:FRAMES]], [USED.index(t) for t in ends]


def loss(model, mel, streams, ends):
    """How unlikely the model finds the target streams [B, FRAMES], a part of the batch at each delay."""
    decoder, used = model.language_model, mx.array(USED)
    sound = model.embed_audio(mel, model.audio_memory()).reshape(len(mel), -1, model.decoder_args.dim)
    # sound [B, LEFT + FRAMES + longest delay, D]

    def surprise(x, targets):
        logits = x @ decoder.embed_tokens.weight[used].T
        others = mx.full((*x.shape[:-1], 1), math.log(1266 - len(USED)))  # all ids with a logit of 0
        return nn.losses.cross_entropy(mx.concatenate([logits, others], -1), targets, reduction="mean")

    # It learns much faster when the sound alone, too, has to tell which key ends in it.
    total, n = surprise(sound, ends), len(mel) // len(DELAYS)
    for i, delay in enumerate(DELAYS):
        part, heard = slice(i * n, (i + 1) * n), LEFT + delay
        prompt = mx.array([[USED.index(1)] + [USED.index(PAD)] * heard] * n)
        ids = used[mx.concatenate([prompt, streams[part, :-1]], axis=1)]
        x = decoder.embed_tokens(ids) + sound[part, : heard + FRAMES]
        caches = [V.KVCache(model.decoder_args) for _ in decoder.layers]
        x = decoder(x.reshape(-1, x.shape[2]), decoder.ffn_weights(delay), caches, n).reshape(x.shape)
        total = total + surprise(x[:, heard:], streams[part]) / len(DELAYS)
    return total


def learn(folder, steps=300, report=lambda *_: None):
    """Train the learner and save it in Mistral's layout; `report` sees step, loss and model at times."""
    model, cfg = learner()
    rng, batch = np.random.RandomState(1), 16
    clips = [training_clip(rng, model.spectrogram) for _ in range(1200)]
    mels, streams, ends = (mx.array(np.stack([np.array(x) for x in column])) for column in zip(*clips))

    def rate(top):  # eight steps to warm up, then down to nothing
        return optim.join_schedules([optim.linear_schedule(0, top, 8), optim.cosine_decay(top, steps - 8)], [8])

    # Muon for matrices, AdamW for what is none: on the embeddings, norms and convolutions.
    optimizer = optim.MultiOptimizer([optim.Muon(rate(0.04), weight_decay=0), optim.AdamW(rate(8e-3), weight_decay=0)],
                                     [lambda name, w: w.ndim == 2 and "embed" not in name])
    gradient = nn.value_and_grad(model, loss)
    for step in range(steps):
        pick = mx.array(rng.randint(len(clips), size=batch))
        value, change = gradient(model, mels[pick], streams[pick], ends[pick])
        optimizer.update(model, change)
        mx.eval(model.parameters(), optimizer.state, value)
        if step % 20 == 19:
            report(step + 1, value.item(), model)
    folder.mkdir(exist_ok=True)
    write_tekken(folder, 1266, words=[b" %d" % i for i in range(10)], streaming_n_left_pad_tokens=LEFT,
                 transcription_delay_ms=80 * DELAYS[0])
    (folder / "params.json").write_text(json.dumps(cfg))
    mx.save_safetensors(str(folder / "consolidated.safetensors"), their_names(model, "original"))


def dictation(folder, n=14):
    """Fresh recordings of keys, about 15 in each: their names and what was pressed when."""
    import soundfile

    rng, truth = np.random.RandomState(2), {}
    for i in range(n):
        x, keys = telephone(rng, 6.0)
        soundfile.write(folder / f"{i}.wav", x, 16000, subtype="FLOAT")
        truth[str(folder / f"{i}.wav")] = keys
    return truth


@pytest.mark.slow
def test_a_model_learns_to_transcribe(tmp_path):
    learn(tmp_path / "model")
    truth = dictation(tmp_path)
    V.convert(tmp_path / "model", tmp_path / "6-bit", bits=6, group_size=32)
    assert sum(map(len, truth.values())) >= 200
    for model, delay in (("model", 80), ("model", 160), ("6-bit", 80), ("6-bit", 160)):
        code, out, err = run("--model", tmp_path / model, "--delay", delay, "--quiet", "--format", "json", *truth)
        assert code == 0 and err == ""
        wrong, late = 0, []
        for record in map(json.loads, out.splitlines()):
            pressed, printed = truth[record["file"]], record["text"].split()
            wrong += distance(printed, [key for key, _ in pressed])
            if printed == [key for key, _ in pressed]:
                late += [abs(word["end"] - end) for word, (_, end) in zip(record["words"], pressed)]
        assert wrong <= 0.05 * sum(map(len, truth.values())), (model, delay, wrong)
        assert len(late) > 50 and max(late) <= 0.16


def show_learning():
    """Loss and a transcript that becomes right."""
    x, keys = telephone(np.random.RandomState(3), 6.0)
    print("pressed: " + " ".join(key for key, _ in keys))
    with tempfile.TemporaryDirectory() as folder:
        write_tekken(folder, 1266, words=[b" %d" % i for i in range(10)], streaming_n_left_pad_tokens=LEFT)
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        tokenizer = Tekkenizer.from_file(Path(folder, "tekken.json"))

        def report(step, value, model):
            text = V.transcribe(model, tokenizer, x, delay_ms=160).text
            print(f"step {step}, loss {value:.2f}: {text}", flush=True)

        learn(Path(folder), report=report)


# ----------------------------------------------------------------------------- the README and the file


def test_readme_says_what_is(checkpoint, loaded, tmp_path, noise, monkeypatch, capsys):
    """Its options are those of --help, its commands and its code run."""
    import soundfile

    text = (HERE / "README.md").read_text()
    options = lambda text: set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert options(text) - {"--help"} == options(call("--help")[1]) - {"--help"}
    soundfile.write(tmp_path / "speech.wav", noise[:16000], 16000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(V, "load_voxtral_model", lambda: loaded)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)  # noqa: S102
    assert len(capsys.readouterr().out.splitlines()) > 2 and names["stream"].text
    commands = re.findall(r"^    (?:.*\| )?python (\w+\.py) ?(.*?)(?: +#.*)?$", text, re.MULTILINE)
    assert len(commands) >= 7
    for program, args in commands:
        if program == "voxtral.py":
            args = args.replace("mistralai/Voxtral-Mini-4B-Realtime-2602", str(checkpoint)).split()
            args += [] if "--model" in args else ["--model", checkpoint]
            code, _, err = run(*args, stdin=bytes(32000), cwd=tmp_path)
            assert code == 0, err
    for command in re.findall(r"python test_voxtral.py (\w+)", text):
        assert command in COMMANDS
    assert f"{len((HERE / 'requirements.txt').read_text().split())}" and "requirements.txt" in text


def test_the_file_stays_readable():
    source = (HERE / "voxtral.py").read_text()
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    lengths = sorted(f.end_lineno - f.lineno + 1 for f in functions)

    def depth(node, outer=()):
        inside = isinstance(node, (ast.For, ast.While, ast.If, ast.With, ast.Try))
        # elif is no level of its own
        inside = inside and not (outer and isinstance(node, ast.If) and outer[-1].__dict__.get("orelse") == [node])
        outer = (*outer, node) if inside else outer
        return max([len(outer), *(depth(child, outer) for child in ast.iter_child_nodes(node)
                                  if not isinstance(child, (ast.FunctionDef, ast.ClassDef)))])

    assert len(source.splitlines()) <= 1000 and max(map(len, source.splitlines())) <= 100
    assert lengths[-1] <= 60 and lengths[len(lengths) // 2] <= 12
    assert {f.name: depth(f) for f in functions if depth(f) > 3} == {}


# ----------------------------------------------------------- an independent implementation, and digits


def cross_check_inputs():
    rng = np.random.RandomState(9)
    return rng.randn(480, 128).astype(np.float32), rng.randint(0, 1400, 60)


def ours():
    """Encoder and adapter output, and logits at three delays, of the seeded model on seeded input."""
    model, (mel, ids) = make_model(), cross_check_inputs()
    encoded = model.encoder(mx.array(mel)[None], model.audio_memory())
    sound, decoder = model.encode(mx.array(mel)), model.language_model
    out = {"encoder": np.array(encoded), "adapter": np.array(sound)}
    for delay in (1, 6, 30):
        caches = [V.KVCache(model.decoder_args) for _ in decoder.layers]
        x = decoder(decoder.embed_tokens(mx.array(ids)) + sound, decoder.ffn_weights(delay), caches)
        out[f"logits {delay}"] = np.array(decoder.embed_tokens.as_linear(x))
    return out


def theirs(folder):
    """The same from transformers' VoxtralRealtimeForConditionalGeneration."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    part = lambda c: {theirs: c[ours] for ours, theirs in V.TRANSFORMERS_FIELDS if ours in c} | {
        "rope_parameters": {"rope_theta": c["rope_theta"], "rope_type": "default"}}
    cfg = config()
    audio = cfg["multimodal"]["whisper_model_args"]["encoder_args"]
    settings = {"architectures": ["VoxtralRealtimeForConditionalGeneration"], "model_type": "voxtral_realtime",
                "audio_config": part(audio) | {"model_type": "voxtral_realtime_encoder", "num_mel_bins": 128},
                "text_config": part(cfg) | {"model_type": "voxtral_realtime_text"}, "downsample_factor": 4,
                "hidden_size": cfg["dim"], "dtype": "float32", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(settings))
    weights = their_names(make_model(), "transformers")
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    hf = transformers.VoxtralRealtimeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    mel, ids = cross_check_inputs()
    features, ids = torch.tensor(mel.T[None].copy()), torch.tensor(ids[None])
    with torch.no_grad():
        heard = hf.get_audio_features(features)
        out = {"encoder": heard.last_hidden_state[0].numpy(), "adapter": heard.pooler_output[0].numpy()}
        for delay in (1, 6, 30):
            result = hf(input_ids=ids, input_features=features, num_delay_tokens=delay)
            out[f"logits {delay}"] = result.logits[0].numpy()
    return out


def digest(arrays):
    """A few numbers of each array, and the greedy tokens: what is recorded below."""
    out = {}
    for name, x in arrays.items():
        x = x.reshape(-1, x.shape[-1])
        out[name] = [round(float(v), 6) for v in x[:: len(x) // 6, :: x.shape[1] // 4].ravel()[:24]]
        if name.startswith("logits"):
            out[name.replace("logits", "tokens")] = x.argmax(-1).tolist()
    return out


def test_agrees_with_transformers(tmp_path):
    mine = ours()
    try:
        import transformers  # noqa: F401
    except ImportError:
        if os.environ.get("CROSS_CHECK"):
            raise
        for name, values in GOLDEN.items():
            got = digest(mine)[name]
            assert got == values if "tokens" in name else close(got, values)
        return
    other = theirs(tmp_path)
    for name, x in other.items():
        assert close(mine[name], x), name
    assert [np.array_equal(mine[n].argmax(-1), other[n].argmax(-1)) for n in mine if "logits" in n] == [True] * 3
    model, _ = V.prepare_model(tmp_path, "float32")  # the layout of transformers, read back
    for (name, a), (_, b) in zip(sorted(tree_flatten(model.parameters())), sorted(tree_flatten(make_model().parameters()))):
        assert mx.array_equal(a, b), name


@needs_digits
@pytest.mark.parametrize("layout", ["original", "transformers", "voxmlx-bf16-sharded"])
def test_digits_short(layout):
    model, tokenizer, _ = V.load_voxtral_model(DIGITS / layout, "float32")
    expected = json.loads((DIGITS / "clips/expected.json").read_text())["short.wav"]["480"]
    got = V.transcribe(model, tokenizer, V.load_audio(DIGITS / "clips/short.wav"))
    assert got.text == expected["text"] and got.tokens == expected["tokens"][: expected["tokens"].index(2)]


def main_job():
    """Every clip, delay and layout of digits against expected.json: what .ci/run runs last."""
    expected, failures = json.loads((DIGITS / "clips/expected.json").read_text()), 0
    errors = {}
    for layout in ("original", "voxmlx-bf16-sharded", "transformers", "voxmlx-6bit", "mlxaudio-4bit"):
        model, tokenizer, _ = V.load_voxtral_model(DIGITS / layout, "float32")
        errors[layout] = 0
        for clip, delays in expected.items():
            samples = V.load_audio(DIGITS / "clips" / clip)
            truth = json.loads((DIGITS / "clips" / clip).with_suffix(".json").read_text())
            for delay, want in delays.items():
                got = V.transcribe(model, tokenizer, samples, delay_ms=int(delay))
                errors[layout] += distance(got.text.split(), truth["text"].split())
                if "bit" not in layout and got.tokens != want["tokens"][: want["tokens"].index(2)]:
                    failures += 1
                    print(layout, clip, delay, "differs", file=sys.stderr)
                if layout == "original" and delay != "2400":
                    times(clip, delay, got.words, truth["words"])
        print(f"{layout}: {errors[layout]} word errors")
    failures += errors["voxmlx-6bit"] > errors["original"] + 2
    failures += errors["mlxaudio-4bit"] > errors["original"] + 4
    return failures


def distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row = row, [i]
        for j, y in enumerate(b):
            row.append(min(last[j] + (x != y), last[j + 1] + 1, row[-1] + 1))
    return row[-1]


def times(clip, delay, got, truth):
    if [w.text.strip() for w in got] == [w["word"] for w in truth]:
        ends = np.median([abs(a.end - b["end"]) for a, b in zip(got, truth)])
        starts = np.median([abs(a.start - b["start"]) for a, b in zip(got, truth)])
        print(f"{clip} at {delay} ms: median error of ends {ends * 1000:.0f} ms, of starts {starts * 1000:.0f} ms")



# ------------------------------------------------------------------------------------------- speed


def timed(work, repeats=5):
    """Seconds that `work` takes: the median of some runs after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(work())
        mx.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def best_of(work, repeats=10):
    """Milliseconds of the fastest run: steps are bound by the CPU that submits them, which has other guests."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


WIDE = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16  # a CPU is slow at bfloat16


def random_weights(model, bits):
    """Weights made in place, quantised like a converted checkpoint."""
    mx.random.seed(0)
    model.update(tree_map(lambda w: (mx.ones(w.shape) if w.ndim == 1 else mx.random.normal(w.shape) * 0.02)
                          .astype(WIDE), model.parameters()))
    if bits:
        nn.quantize(model, 64, bits, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 64 == 0)
    mx.eval(model.parameters())
    return model


class Steps(V.Stream):
    """The decode steps of a stream, without a tokenizer: after a prompt of so many positions."""

    def __init__(self, model, positions):
        self._model, self._temperature = model, 0.0
        self._ffn_weights = model.language_model.ffn_weights(6)
        self._caches = [V.KVCache(model.decoder_args) for _ in model.language_model.layers]
        self._token = mx.full((positions,), 32)

    def run(self, sound):
        """One step for each of the embeddings [n, D]; a token is read while the next is computed."""
        last = None
        for i in range(len(sound)):
            self._token = self._generate(sound[i : i + 1])
            if last is not None:
                last.item()
            last = self._token
        return last


def work_of(cfg, seconds):
    """Multiplications and additions in encoding so many seconds, and bytes of keys and values per position."""
    encoder = cfg["multimodal"]["whisper_model_args"]["encoder_args"]
    e = {**encoder, "q": encoder["n_heads"] * encoder["head_dim"]}
    layer = 2 * (4 * e["dim"] * e["q"] + 3 * e["dim"] * e["hidden_dim"]) + 4 * e["sliding_window"] * e["q"]
    convs = 2 * 3 * (2 * 128 * e["dim"] + e["dim"] ** 2)
    adapter = 2 * (4 * e["dim"] * cfg["dim"] + cfg["dim"] ** 2) / 4
    return seconds * 50 * (e["n_layers"] * layer + convs + adapter), 4 * cfg["n_layers"] * cfg["n_kv_heads"] * cfg["head_dim"]


def load_time(model, cfg, bits):
    """Seconds from a converted checkpoint (in the page cache: it was written just now) to weights in place."""
    with tempfile.TemporaryDirectory() as folder:
        mx.save_safetensors(f"{folder}/model.safetensors", dict(tree_flatten(model.parameters())))
        settings = {"quantization": {"group_size": 64, "bits": bits}} if bits else {}
        Path(folder, "config.json").write_text(json.dumps(cfg | settings))
        start = time.perf_counter()
        mx.eval(V.prepare_model(Path(folder), None)[0].parameters())
        return time.perf_counter() - start


def bench_ours(cfg, bits, rates, full):
    """Rows of the table for one kind of weights: name, measured, floor."""
    bandwidth, flops = rates
    model = random_weights(V.Voxtral(cfg), bits)
    decoder_bytes = sum(w.nbytes for _, w in tree_flatten(model.language_model.parameters()))
    size = sum(w.nbytes for _, w in tree_flatten(model.parameters()))
    yield "weights, GB", size / 1e9, None
    if size < 5e9:  # the one of 9 GB is not written
        yield "load, s", load_time(model, cfg, bits), None
    mx.clear_cache()
    mx.reset_peak_memory()
    mel = mx.random.normal((30_000, 128))
    for seconds in (30, 60, 300) if full else (30, 60):
        floor = 1e3 * work_of(cfg, seconds)[0] / flops
        yield f"encode {seconds} s, ms", 1e3 * timed(lambda n=seconds: model.encode(mel[: n * 100]), 3), floor
    sound = mx.random.normal((8300, cfg["dim"])).astype(WIDE) * 0.02
    mx.eval(sound, mel)
    for length in (40, 1000, 8192) if full else (40, 1000):
        steps = Steps(model, length)
        steps._token = steps._generate(sound[:length])
        floor = (decoder_bytes + min(length, cfg["sliding_window"]) * work_of(cfg, 1)[1]) / bandwidth
        yield f"step after {length}, ms", best_of(lambda steps=steps: steps.run(sound[:40]).item()) / 40, 1e3 * floor
    steps, memory = Steps(model, 39), model.audio_memory()
    steps._token = steps._generate(sound[:39])
    mx.eval(model.embed_audio(mel[None, :312], memory), steps._token)
    for name, work in (("80 ms: encoder", mx.eval), ("80 ms: all", lambda new: steps.run(new).item())):
        times = []
        for i in range(320):  # 26 s: the encoder's window fills and its buffer is renewed
            start = time.perf_counter()
            work(model.embed_audio(mel[None, 312 + 8 * i : 320 + 8 * i], memory))
            times.append(1e3 * (time.perf_counter() - start))
        for quantile, what in ((0.5, "median"), (0.95, "95 %")):
            yield f"{name}, {what}, ms", sorted(times)[int(quantile * (len(times) - 1))], None
    yield "peak memory, GB", mx.get_peak_memory() / 1e9, None


def bench_voxmlx(cfg, bits, rates, full):
    """The same of voxmlx, as far as it has it; its encoder has no window."""
    model = voxmlx_model(cfg, bits)
    mel = mx.random.normal((128, 30_000))
    for seconds in (30, 60, 300) if full else (30, 60):
        yield f"encode {seconds} s, ms", 1e3 * timed(lambda s=seconds: model.encode(mel[:, : s * 100]), 3), None
    for length in (40, 1000) if full else (40,):
        yield f"step after {length}, ms", best_of(voxmlx_steps(model, cfg, length)) / 40, None


def voxmlx_steps(model, cfg, length):
    """A function that does 40 decode steps of voxmlx, after a prompt of so many positions."""
    from voxmlx.cache import RotatingKVCache

    delay, sound = model.time_embedding(mx.array([6.0])), mx.random.normal((length + 40, cfg["dim"])).astype(WIDE) * 0.02
    caches = [RotatingKVCache(cfg["sliding_window"]) for _ in range(cfg["n_layers"])]
    prompt = model.language_model.embed(mx.full((1, length), 32)) + sound[None, :length]
    token = mx.argmax(model.decode(prompt, delay, "causal", caches)[0, -1:], axis=-1).squeeze()
    mx.eval(token)

    def run():
        nonlocal token
        for i in range(40):
            x = (sound[i] + model.language_model.embed(token.reshape(1, 1))[0, 0])[None, None]
            new = mx.argmax(model.decode(x, delay, mask=None, cache=caches)[0, -1:], axis=-1).squeeze()
            mx.async_eval(new)
            token.item()
            token = new
        token.item()

    return run


def mlx_audio_model(cfg, bits):
    from mlx_audio.stt.models.voxtral_realtime import Model, ModelConfig

    encoder = cfg["multimodal"]["whisper_model_args"]["encoder_args"]
    model = random_weights(Model(ModelConfig.from_dict({"encoder_args": encoder, "decoder": cfg})), bits)
    model.decoder.precompute_ada_scales(mx.random.normal((cfg["dim"],)).astype(WIDE))
    mx.eval(model.decoder._ada_scales)
    return model


def bench_mlx_audio(cfg, bits, rates, full):
    """The same of mlx-audio; its encoder has the window."""
    model, mel = mlx_audio_model(cfg, bits), mx.random.normal((128, 30_000))
    for seconds in (30, 60, 300) if full else (30, 60):
        yield f"encode {seconds} s, ms", 1e3 * timed(lambda s=seconds: model.encoder(mel[:, : s * 100]), 3), None
    for length in (40, 1000) if full else (40,):
        yield f"step after {length}, ms", best_of(mlx_audio_steps(model, cfg, length)) / 40, None


def mlx_audio_steps(model, cfg, length):
    decoder, sound = model.decoder, mx.random.normal((length + 40, cfg["dim"])).astype(WIDE) * 0.02
    x, caches = decoder.forward(decoder.embed_tokens(mx.full((length,), 32)) + sound[:length])
    token, at = mx.argmax(decoder.logits(x[-1:]), axis=-1), length
    mx.eval(token)

    def run():
        nonlocal token, at
        for i in range(40):
            x, _ = decoder.forward(decoder.embed_tokens(token) + sound[i : i + 1], start_pos=at, cache=caches)
            new = mx.argmax(decoder.logits(x), axis=-1)
            mx.async_eval(new)
            token.item()
            token, at = new, at + 1
        token.item()

    return run


def voxmlx_step(n_layers):
    from voxmlx.cache import RotatingKVCache
    from voxmlx.model import VoxtralRealtime

    model, caches = VoxtralRealtime(config(n_layers=n_layers)), [RotatingKVCache(40) for _ in range(n_layers)]
    delay = model.time_embedding(mx.array([6.0]))
    mx.eval(model.parameters(), delay)
    mx.eval(model.decode(mx.zeros((1, 30, 64)), delay, "causal", caches))
    mx.eval(model.decode(mx.zeros((1, 1, 64)), delay, None, caches))
    return caches, model.decode(mx.zeros((1, 1, 64)), delay, None, caches)


def bench_in_turn(cfg, bits, rounds=15):
    """Steps of all, 40 of ours, 40 of a peer's, and so on: nobody has the better minute of the machine."""
    model, sound = random_weights(V.Voxtral(cfg), bits), mx.random.normal((200, cfg["dim"])).astype(WIDE) * 0.02
    steps = Steps(model, 40)
    steps._token = steps._generate(sound[:40])
    works = {"voxtral.py": lambda: steps.run(sound[:40]).item()}
    with contextlib.suppress(ImportError):
        works["voxmlx"] = voxmlx_steps(voxmlx_model(cfg, bits), cfg, 40)
    with contextlib.suppress(ImportError):
        works["mlx-audio"] = mlx_audio_steps(mlx_audio_model(cfg, bits), cfg, 40)
    times = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(best_of(work, 1) / 40)
    print(f"steps in turn, {kind(bits)}, best and median, ms: " + ", ".join(
        f"{name} {min(values):.2f} {sorted(values)[rounds // 2]:.2f}" for name, values in times.items()))


def voxmlx_model(cfg, bits):
    from voxmlx.model import VoxtralRealtime

    return random_weights(VoxtralRealtime(cfg), bits)


def kind(bits):
    return f"{bits}-bit" if bits else "float32" if WIDE == mx.float32 else "bf16"


def measured_rates(full):
    """What this machine can do: bytes per second in a copy, operations per second in a matrix product."""
    x = mx.random.normal((1 << (29 if full else 24),)).astype(mx.bfloat16)
    y = mx.random.normal((8192, 8192) if full else (512, 512)).astype(WIDE)
    mx.eval(x, y)
    return 2 * x.nbytes / timed(lambda: x + 1), 2 * y.shape[0] ** 3 / timed(lambda: y @ y)


def bench(full):
    """A table of times beside their floors; `full`: the real model's sizes, else those of the tests."""
    cfg = config(**FULL) if full else config(sliding_window=2048)
    if full:
        cfg["multimodal"]["whisper_model_args"]["encoder_args"] |= FULL_ENCODER
    rates = measured_rates(full)
    print(f"MLX {mx.__version__} on {mx.device_info().get('device_name', mx.default_device())}; measured here: "
          f"copy {rates[0] / 1e9:,.0f} GB/s, products {rates[1] / 1e12:,.3f} T/s, which give the floors")
    columns, table = {}, {}
    for who, measure in (("", bench_ours), ("voxmlx ", bench_voxmlx), ("mlx-audio ", bench_mlx_audio)):
        for bits in (None, 8, 6, 4) if who != "mlx-audio " else (None, 6):
            name = who + kind(bits)
            try:
                for row, value, floor in measure(cfg, bits, rates, full):
                    table.setdefault(row, {})[name] = f"{value:.2f}" + (f" ({floor:.2f})" if floor else "")
                    columns[name] = True
            except ImportError:
                break
            mx.clear_cache()
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for row, values in table.items():
        print(f"| {row} | " + " | ".join(values.get(name, "") for name in columns) + " |")
    print("(in brackets the floor: bytes over bandwidth, or operations over the rate of a product)")
    print(f"operations in a decoder layer of a step: {layer_operations(our_step)}", end="")
    with contextlib.suppress(ImportError):
        print(f"; in voxmlx's: {layer_operations(voxmlx_step)}", end="")
    print()
    for bits in (None, 6):
        bench_in_turn(cfg, bits)
        mx.clear_cache()
    if DIGITS.is_dir():
        bench_digits()


def bench_digits():
    """Wall times on the checkpoint of the digits: loading, a file from end to end, the command."""
    start = time.perf_counter()
    model, tokenizer, _ = V.load_voxtral_model(DIGITS / "original", "float32")
    print(f"digits, float32: load {time.perf_counter() - start:.2f} s", end="")
    samples = V.load_audio(DIGITS / "clips/long.wav")
    print(f", long.wav {timed(lambda: V.transcribe(model, tokenizer, samples).tokens and [], 3):.2f} s", end="")
    for name, args in (("--help", ["--help"]), ("short.wav", ["--quiet", "--model", DIGITS / "original", DIGITS / "clips/short.wav"])):
        print(f", {name} from a shell {timed(lambda a=args: run(*a) and [], 3):.2f} s", end="")
    print()
    for name, peer in (("voxmlx", digits_voxmlx), ("mlx-audio", digits_mlx_audio)):
        try:
            print(f"{name}, the same file: {timed(peer(), 1):.2f} s")
        except ImportError:
            print(f"{name} is not installed")


def digits_voxmlx():
    import voxmlx
    from voxmlx.generate import generate

    model, tokenizer, _ = voxmlx.load_model(str(DIGITS / "voxmlx-bf16-sharded"))
    model.update(tree_map(lambda w: w.astype(mx.float32), model.parameters()))
    prompt, delay = voxmlx._build_prompt_tokens(tokenizer)
    options = {"n_delay_tokens": delay, "eos_token_id": tokenizer.eos_id}
    return lambda: generate(model, str(DIGITS / "clips/long.wav"), prompt, **options) and []


def digits_mlx_audio():
    from mlx_audio.stt.models.voxtral_realtime import Model, ModelConfig

    model = Model(ModelConfig.from_dict(json.loads((DIGITS / "mlxaudio-4bit/config.json").read_text())))
    weights = model.sanitize(mx.load(str(DIGITS / "original/consolidated.safetensors")))
    model.load_weights([(name, w.astype(mx.float32)) for name, w in weights.items()], strict=False)
    Model.post_load_hook(model, DIGITS / "mlxaudio-4bit")
    return lambda: model.generate(str(DIGITS / "clips/long.wav")) and []


# ------------------------------------------------------------------------- long and live, by the clock


def hours(n=3.0):
    """Memory and speed of a stream of so many hours, with the small random model."""
    model = make_model()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, _ = V.load_voxtral_model(write_original(Path(folder), model))
    stream, sound = V.Stream(model, tokenizer), np.random.RandomState(0).randn(60 * 16000).astype(np.float32) * 0.1
    for minute in range(1, round(n * 60) + 1):
        start = time.perf_counter()
        stream.feed(sound)
        if minute in (1, 2, 5, 10) or minute % 30 == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            print(f"{minute} minutes: {resident / 1e6:.1f} MB resident, {mx.get_active_memory() / 1e6:.2f} MB of MLX's, "
                  f"a minute takes {time.perf_counter() - start:.1f} s, {len(stream.tokens)} tokens", flush=True)


def live(clip="medium"):
    """A clip of the digits through a pipe as fast as it was spoken: how long after its end each word is there."""
    truth = json.loads((DIGITS / f"clips/{clip}.json").read_text())["words"]
    pcm = (V.load_audio(DIGITS / f"clips/{clip}.wav") * 32767).astype("<i2").tobytes()
    command = [sys.executable, HERE / "voxtral.py", "--quiet", "--model", DIGITS / "original", "--dtype", "float32", "-"]
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    time.sleep(5)  # until the model is there
    text, seen, start = b"", [], time.monotonic()

    def speak():
        for i in range(0, len(pcm), 2560):
            time.sleep(max(0, start + (i + 2560) / 32000 - time.monotonic()))
            program.stdin.write(pcm[i : i + 2560])
            program.stdin.flush()
        program.stdin.close()

    threading.Thread(target=speak).start()
    while piece := program.stdout.read1():
        text += piece
        seen.append((time.monotonic() - start, text.decode(errors="ignore").split()))
    late = [next(at for at, words in seen if words[i : i + 1] == [true["word"]]) - true["end"] for i, true in enumerate(truth)]
    print(f"{len(late)} words, each there {min(late):.2f} to {max(late):.2f} s after its end, median {np.median(late):.2f} s")


# Recorded by `python test_voxtral.py golden` from transformers 5.23.0 with torch 2.13.0.
GOLDEN: dict = {
    "encoder": [
        1.611697, 1.085526, 1.824883, 0.151772, -0.933264, 2.721656, -0.316292, -0.386438, -1.031545,
        0.739502, 0.496916, 0.29658, -0.173183, 1.114087, 0.770797, -0.772974, 0.280056, 0.566124,
        -0.420032, -0.498388, -0.207601, 0.994538, 0.875192, 1.031296,
    ],
    "adapter": [
        0.210037, -2.52594, -0.647763, -2.131756, -1.863474, -0.576904, -0.389543, 1.377549, -1.726059,
        -1.558949, -2.194526, -0.791885, -0.836279, -1.63758, -0.244317, -1.049004, 0.238781, -3.03412,
        -2.09145, -2.009777, -1.254126, -3.487089, -1.152737, -2.903811,
    ],
    "logits 1": [
        0.180652, -0.916862, 0.768109, -0.484704, 0.810715, -0.324954, 0.980658, -0.863174, 1.12171,
        -0.096143, 0.797508, -0.254286, -0.189743, 0.038483, 0.196679, -0.626552, 0.254348, -0.694745,
        0.822044, -0.933818, 0.232983, -0.628892, 1.373206, -1.050412,
    ],
    "tokens 1": [
        88, 302, 241, 329, 302, 1296, 273, 855, 970, 1132, 200, 200, 8, 1046, 1046, 774, 958, 218, 914,
        102, 88, 176, 574, 407, 407, 492, 179, 407, 1271, 492, 1306, 651, 20, 1332, 1148, 1166, 302,
        329, 779, 690, 224, 492, 456, 1148, 123, 1391, 117, 425, 1181, 301, 88, 1263, 1180, 71, 407,
        425, 893, 578, 224, 1166,
    ],
    "logits 6": [
        0.365651, -0.773957, 0.738429, -0.488519, 0.512512, -0.352965, 0.730805, 0.252101, 0.901821,
        0.081283, 0.650363, -0.375583, 0.576489, -0.444427, 0.665501, -0.572158, -0.019093, -0.823124,
        0.867579, -0.176235, 0.055537, -0.514239, 0.80585, -1.156675,
    ],
    "tokens 6": [
        690, 1344, 1344, 301, 302, 578, 1178, 13, 302, 260, 903, 200, 945, 598, 1046, 118, 10, 10, 1332,
        651, 1142, 903, 934, 1309, 200, 302, 903, 903, 903, 492, 1377, 1142, 945, 727, 1148, 1166, 9,
        200, 690, 425, 302, 104, 456, 1148, 1017, 1166, 456, 302, 302, 945, 945, 302, 10, 570, 586, 584,
        855, 578, 302, 1171,
    ],
    "logits 30": [
        -0.084, -0.509999, 0.900545, -0.749653, 0.724448, 0.539509, 0.100012, -0.315142, 0.709733,
        0.775997, -0.15149, -0.456046, -0.18916, 0.257604, -0.173672, -0.855395, 0.322938, 0.170053,
        0.19488, -0.292804, 0.325289, -0.113037, 0.39695, -1.038477,
    ],
    "tokens 30": [
        1382, 1017, 544, 1230, 329, 605, 655, 187, 544, 737, 329, 1247, 1058, 1046, 1222, 737, 1222,
        1222, 117, 1296, 1142, 176, 302, 108, 1320, 1173, 484, 930, 1382, 221, 544, 1142, 737, 544, 329,
        756, 302, 329, 1142, 329, 345, 1318, 690, 1230, 1124, 1143, 329, 1176, 329, 1142, 1017, 920,
        132, 1017, 329, 1139, 329, 1046, 329, 516,
    ],
}

COMMANDS = {"golden": lambda: print(json.dumps(digest(theirs(Path(tempfile.mkdtemp()))))), "digits": main_job,
            "bench": lambda *what: bench("full" in what), "hours": lambda n=3: hours(float(n)), "live": live, "learn": show_learning}

if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in COMMANDS:
        sys.exit(bool(COMMANDS[sys.argv[1]](*sys.argv[2:])))
    sys.exit("usage: python test_voxtral.py " + " | ".join(COMMANDS))
