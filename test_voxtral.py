"""Tests of voxtral.py, in its order. Nothing is downloaded.

    python -m pytest -q test_voxtral.py -m "not slow"

They begin with an executable specification: the model in its plainest form, which `Stream` must
equal. Most models here are small, random and seeded; .ci/digits holds a small one that was trained,
with recordings of real speech. What needs a GPU is tested in .ci/test_gpu.py.

Tolerances: float32 has 24 bits, sums of a few hundred terms lose 5 or 6 of them, so two orders of
summation agree to about 1e-5 of the largest value; 1e-4 leaves room for a few layers. bfloat16
has 8 bits: a number is off by up to 0.4 %, and what a few roundings do to a sum stays below 2 %.
"""

import base64
import builtins
import contextlib
import dis
import importlib.util
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import types
import warnings
from dataclasses import replace
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx import optimizers as optim
from mlx.utils import tree_flatten

import voxtral as V

# ------------------------------------------------------------------------ executable specification
# The model in its plainest form, for one recording: nothing is streamed, nothing is kept.


STEP = 1280  # samples: 80 ms
LEFT_PAD = 32  # steps of silence in front, as in training
BOS, EOS, STREAMING_PAD = 1, 2, 32  # token ids


def naive_transcribe(model, samples, delay_ms):
    """The tokens of samples [n]: at every step the whole decoder over all ids so far."""
    delay = delay_ms // 80  # steps
    right_pad = delay + 1 + 10  # steps of silence behind: no word has more than 10 tokens
    samples = np.pad(samples, (0, -len(samples) % STEP))
    padded = np.pad(samples, (LEFT_PAD * STEP, right_pad * STEP))
    audio_embeds = naive_audio_embeds(model, log_mel(model.spectrogram, padded))  # [steps, D]
    prompt = [BOS] + [STREAMING_PAD] * (LEFT_PAD + delay)
    scales = naive_scales(model, delay)
    ids = list(prompt)
    while len(ids) <= len(audio_embeds):
        x = model.language_model.embed_tokens(mx.array(ids)) + audio_embeds[: len(ids)]  # [T, D]
        logits = naive_logits(model, x, scales)  # [T, vocabulary]
        token = mx.argmax(logits[-1]).item()
        heard = (len(ids) - 1 - LEFT_PAD) * STEP  # samples of the recording, before this step
        if token == EOS and heard >= len(samples):
            break
        ids.append(token)
    return ids[len(prompt) :]


def log_mel(spectrogram, samples):
    """Samples [n] -> log-mel [n // 160, C], each mel frame centred in zeros."""
    half = spectrogram.window_size // 2
    padded = np.pad(np.asarray(samples, np.float32), half)
    return spectrogram.mel_frames(mx.array(padded[None]))[0, : len(samples) // 160]


def naive_audio_embeds(model, mel):
    """Log-mel [F, C] -> audio embeddings [F / 8, D]."""
    encoder = model.encoder
    x = nn.gelu(encoder.conv1(mx.pad(mel, ((2, 0), (0, 0)))[None]))  # [1, F, D]
    x = nn.gelu(encoder.conv2(mx.pad(x, ((0, 0), (1, 0), (0, 0)))))[0]  # [F / 2, D]
    for layer in encoder.layers:
        x = x + naive_attention(layer.attention, layer.attn_norm(x), model.encoder_args)
        x = x + layer.mlp(layer.ffn_norm(x))
    x = encoder.norm(x).reshape(len(x) // 4, -1)  # four encoder frames side by side
    return model.adapter.w_out(nn.gelu(model.adapter.w_in(x)))


def naive_scales(model, delay):
    """What the delay, in steps, does to each decoder layer: [1, D], a factor of its second norm."""
    half = model.decoder_args.dim // 2
    angles = delay * 10_000.0 ** (-mx.arange(half) / half)
    t = mx.concatenate([mx.cos(angles), mx.sin(angles)])[None]  # [1, D]
    nets = [layer.ada_norm for layer in model.language_model.layers]
    return [1 + net.linear_out(nn.gelu(net.linear_in(t))) for net in nets]


def naive_logits(model, x, scales):
    """Inputs [T, D], sums of token and audio embeddings -> logits [T, vocabulary]."""
    decoder = model.language_model
    for layer, scale in zip(decoder.layers, scales):
        x = x + naive_attention(layer.attention, layer.attn_norm(x), model.decoder_args)
        x = x + layer.mlp(layer.ffn_norm(x) * scale)
    return decoder.norm(x) @ decoder.embed_tokens.weight.T


def naive_attention(layer, x, args):
    """Every position of x [T, D] looks at the last `sliding_window`, its own included."""
    q, k, v = (p(x).reshape(len(x), -1, args.head_dim).swapaxes(0, 1)  # [heads, T, head_dim]
               for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    out = attend(q, k, v, args.rope_theta, args.sliding_window)
    return layer.o_proj(out.swapaxes(0, 1).reshape(len(x), -1))


def attend(q, k, v, theta, window):
    """softmax(q k^T) v: q [H, T, head_dim], k and v [n_kv_heads, T, head_dim]."""
    heads, T, head_dim = q.shape
    k = mx.repeat(rotate(k, theta), heads // len(k), axis=0)
    v = mx.repeat(v, heads // len(v), axis=0)
    scores = rotate(q, theta) @ k.swapaxes(1, 2) / math.sqrt(head_dim)  # [H, T, T]
    back = mx.arange(T)[:, None] - mx.arange(T)  # how far key j is behind query i
    scores = mx.where((back >= 0) & (back < window), scores, -mx.inf)
    return mx.softmax(scores, axis=-1) @ v


def rotate(x, theta):
    """Neighbours 2i and 2i + 1 of x [H, T, head_dim] turn by T * theta ** (-2i / head_dim)."""
    _, T, D = x.shape
    angle = mx.arange(T)[:, None] * theta ** (-mx.arange(0, D, 2) / D)  # [T, D / 2]
    a, b, cos, sin = x[..., 0::2], x[..., 1::2], mx.cos(angle), mx.sin(angle)
    return mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def fed(stream, samples, sizes):
    """All samples in chunks of these sizes, and the end; the text must come in pieces."""
    text = ""
    while len(samples):
        n = next(sizes)
        text += stream.feed(samples[:n])
        samples = samples[n:]
    text += stream.finish()
    assert text == stream.text == "".join(word.text for word in stream.words)
    return stream


@pytest.mark.parametrize("delay_ms", [80, 480, 2400])
@pytest.mark.parametrize("n", [1, 1279, 1280, 1281, 30_000])
def test_stream_equals_the_specification(loaded, noise, n, delay_ms):
    model, tokenizer, _ = loaded
    rng = np.random.RandomState(n + delay_ms)
    expected = naive_transcribe(model, noise[-n:], delay_ms)
    assert V.transcribe(model, tokenizer, noise[-n:], delay_ms=delay_ms).tokens == expected
    for largest in (n, 7000, 900) if n > 1 else (1,):
        sizes = iter(lambda k=largest: rng.randint(1, k + 1), None)
        stream = V.Stream(model, tokenizer, delay_ms=delay_ms)
        assert fed(stream, noise[-n:], sizes).tokens == expected


def test_stream_equals_the_specification_on_speech(digits):
    model, tokenizer, _ = digits
    samples = V.load_audio(DIGITS / "short.flac")[:40_000]
    stream = fed(V.Stream(model, tokenizer, delay_ms=160), samples, iter(lambda: 9999, None))
    assert stream.tokens == naive_transcribe(model, samples, 160)
    assert stream.text == "seven nine one"


def test_nothing_heard_is_nothing_written(loaded):
    """Without a sample there is no transcript, though the silence alone would have tokens."""
    model, tokenizer, _ = loaded
    stream = V.Stream(model, tokenizer, delay_ms=80)
    assert stream.feed(np.zeros(0)) == stream.flush() == stream.finish() == ""
    assert {stream.finish() for _ in range(40)} == {""} and stream.tokens == []
    nothing = V.transcribe(model, tokenizer, np.zeros(0, np.float32))
    assert result(stream) == result(nothing) == ([], [], "")
    assert V.transcribe_batch(model, tokenizer, []) == []


# ------------------------------------------------------------------- small models, files and calls

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # slow
HERE = Path(__file__).parent
DIGITS = HERE / ".ci" / "digits"
MEL = {"num_mel_bins": 128, "hop_length": 160, "window_size": 400, "global_log_mel_max": 1.5}
ENCODER = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "head_dim": 16,
           "hidden_dim": 48, "rope_theta": 1e4, "norm_eps": 1e-5, "sliding_window": 12}
DECODER = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16,
           "hidden_dim": 64, "rope_theta": 1e4, "norm_eps": 1e-5, "sliding_window": 40,
           "vocab_size": 1400, "ada_rms_norm_t_cond": True, "ada_rms_norm_t_cond_dim": 32}


def config(encoder=None, **decoder):
    """params.json of a small model: the encoder's window is 12 frames, the decoder's 40 tokens."""
    args = {**ENCODER, "audio_encoding_args": dict(MEL), **(encoder or {})}
    whisper = {"encoder_args": args, "downsample_args": {"downsample_factor": 4}}
    return {**DECODER, "multimodal": {"whisper_model_args": whisper}, **decoder}


def make_model(seed=0, encoder=None, **decoder):
    model = V.Voxtral(config(encoder, **decoder))
    rng = np.random.RandomState(seed)
    weights = []
    for name, w in sorted(tree_flatten(model.parameters())):
        scale = 0.3 if w.ndim == 1 else 1.5 / math.sqrt(math.prod(w.shape[1:]))
        scale *= 0.3 if "embed_tokens" in name else 1  # so that sound decides, not the last token
        value = rng.randn(*w.shape) * scale + ("norm" in name and w.ndim == 1)
        weights.append((name, mx.array(value.astype(np.float32))))
    model.load_weights(weights)
    return model


def write_tekken(folder, vocab_size=1400, version="v13", audio_is_there=True, words=None, **audio):
    """A tokenizer of mistral-common: 1,000 special ids, 256 bytes, and some made-up words."""
    words = words or [b" word%d" % i for i in range(vocab_size - 1256)]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(w).decode(), "token_str": None}
             for i, w in enumerate([bytes([i]) for i in range(256)] + words)]
    named = {0: "<unk>", 1: "<s>", 2: "</s>", 32: "[STREAMING_PAD]", 33: "[STREAMING_WORD]"}
    special = [{"rank": i, "token_str": named.get(i, f"<SPECIAL_{i}>"), "is_control": True}
               for i in range(1000)]
    settings = {"pattern": r"\s+|\S+", "num_vocab_tokens": len(vocab), "version": version,
                "default_vocab_size": vocab_size, "default_num_special_tokens": 1000}
    mel = {"num_mel_bins": 128, "hop_length": 160, "window_size": 400}
    audio = {"sampling_rate": 16000, "frame_rate": 12.5, "audio_encoding_config": mel,
             "chunk_length_s": None, "transcription_format": "streaming",
             "transcription_delay_ms": 480, "streaming_look_ahead_ms": 2.5,
             "streaming_look_back_ms": 52.5, "streaming_n_left_pad_tokens": 32, **audio}
    tekken = {"config": settings, "vocab": vocab, "special_tokens": special}
    tekken |= {"audio": audio} if audio_is_there else {}
    Path(folder, "tekken.json").write_text(json.dumps(tekken))


# How modules are called in published files, read off these. What begins with a dot is inside a
# layer; a bar stands between the names that transformers has in the encoder and in the decoder.
NAMES = """
converted original mlx-audio transformers
encoder.conv1 whisper_encoder.conv_layers.0.conv
    encoder.conv_layers_0_conv.conv audio_tower.embedder.conv1
encoder.conv2 whisper_encoder.conv_layers.1.conv
    encoder.conv_layers_1_conv.conv audio_tower.embedder.conv2
encoder.layers whisper_encoder.transformer.layers encoder.transformer_layers audio_tower.layers
encoder.norm   whisper_encoder.transformer.norm   encoder.transformer_norm   audio_tower.norm
adapter.w_in audio_language_projection.0
    encoder.audio_language_projection_0 multi_modal_projector.linear_1
adapter.w_out audio_language_projection.2
    encoder.audio_language_projection_2 multi_modal_projector.linear_2
language_model.embed_tokens tok_embeddings decoder.tok_embeddings language_model.model.embed_tokens
language_model.layers       layers         decoder.layers         language_model.model.layers
language_model.norm         norm           decoder.norm           language_model.model.norm
.attn_norm .attention_norm .attention_norm .self_attn_layer_norm|.input_layernorm
.ffn_norm  .ffn_norm       .ffn_norm       .final_layer_norm|.post_attention_layernorm
.attention.q_proj .attention.wq .attention.wq .self_attn.q_proj
.attention.k_proj .attention.wk .attention.wk .self_attn.k_proj
.attention.v_proj .attention.wv .attention.wv .self_attn.v_proj
.attention.o_proj .attention.wo .attention.wo .self_attn.o_proj
.mlp.gate_proj .feed_forward.w1 .feed_forward_w1 .mlp.gate_proj
.mlp.down_proj .feed_forward.w2 .feed_forward_w2 .mlp.down_proj
.mlp.up_proj   .feed_forward.w3 .feed_forward_w3 .mlp.up_proj
.ada_norm.linear_in  .ada_rms_norm_t_cond.0 .ada_rms_norm_t_cond.ada_down .ada_rms_norm.linear1
.ada_norm.linear_out .ada_rms_norm_t_cond.2 .ada_rms_norm_t_cond.ada_up   .ada_rms_norm.linear2
"""
LAYOUTS = NAMES.split()[:4]
FIELDS = {  # of params.json: of transformers' config.json
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps", "sliding_window": "sliding_window", "vocab_size": "vocab_size"}


def their_names(model, layout):
    """The model's tensors under another layout's names and in its order: the loader backwards."""
    names = dict(zip(NAMES.split()[::4], NAMES.split()[LAYOUTS.index(layout) :: 4]))
    out = {}
    for name, w in tree_flatten(model.parameters()):
        decoder = name.startswith("language_model")
        split = re.fullmatch(r"((?:encoder|language_model)\.layers)?(\.\d+)?(.*)(\.\w+)", name)
        stack, layer, module, kind = split.groups("")
        module = names[module].split("|")[-1 if decoder else 0]
        theirs = names.get(stack, "") + layer + module + kind
        if layout in ("original", "transformers") and w.ndim == 3:
            w = w.swapaxes(1, 2)
        if layout == "transformers" and re.search(r"\.[qk]_proj", name):
            half = (model.decoder_args if decoder else model.encoder_args).head_dim // 2
            w = w.reshape(-1, half, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
        if layout == "original" and (not decoder or "tok_embeddings" in theirs):
            theirs = "mm_streams_embeddings.embedding_module." + theirs
        out[theirs] = mx.contiguous(w)
    return out


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
def digits():
    return V.load_voxtral_model(DIGITS, "float32")


@pytest.fixture(scope="session")
def noise():
    """Six seconds of noise whose loudness and colour change every 50 ms."""
    rng = np.random.RandomState(1)
    colours = [rng.randn(9) * 2 ** rng.uniform(-9, -1) for _ in range(120)]
    pieces = [np.convolve(rng.randn(800), colour, "same") for colour in colours]
    return np.concatenate(pieces).clip(-1, 1).astype(np.float32)


def close(a, b, tolerance=1e-4):
    a, b = (np.array(x.astype(mx.float32) if isinstance(x, mx.array) else x) for x in (a, b))
    return a.shape == b.shape and np.abs(a - b).max() <= tolerance * np.abs(b).max()


def result(transcript):
    return transcript.tokens, transcript.words, transcript.text


def distance(a, b):
    """Word errors: how many words to put in, leave out or replace between a and b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last = row
        row = [i]
        for j, y in enumerate(b):
            row.append(min(last[j] + (x != y), last[j + 1] + 1, row[-1] + 1))
    return row[-1]


def run(*args, stdin=b"", **kwargs):
    """The command line in a process of its own: exit code, standard output, standard error."""
    done = subprocess.run([sys.executable, HERE / "voxtral.py", *map(str, args)], input=stdin,
                          capture_output=True, timeout=120, check=False, **kwargs)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def encoded(samples, rate=16000, **kind):
    """A WAV, or another kind of file, as bytes."""
    import soundfile  # type: ignore[import-untyped]

    file = io.BytesIO()
    soundfile.write(file, samples, rate, **({"format": "WAV"} | kind))
    return file.getvalue()


class Output(io.TextIOWrapper):
    def __init__(self, terminal=False):
        super().__init__(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def text(self):
        return self.buffer.getvalue().decode()


def call(*args, terminal=False):
    """The command line in this process: exit code, standard output, lines of standard error."""
    with (contextlib.redirect_stdout(Output(terminal)) as out,
          contextlib.redirect_stderr(Output(terminal)) as err):
        try:
            code = V.main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
    return code, out.text(), re.split(r"[\r\n]+", err.text().rstrip()) if err.text() else []


# ------------------------------------------------------------------------------------- spectrogram


def test_log_mel_is_the_definition(noise):
    from mistral_common.audio import mel_filter_bank

    x = np.pad(noise[:4000].astype(np.float64), 200)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    dft = np.exp(-2j * np.pi * np.outer(np.arange(201), np.arange(400)) / 400)
    frames = np.stack([x[f * 160 : f * 160 + 400] for f in range(25)])  # [25, 400]
    power = np.abs(frames * window @ dft.T) ** 2
    bank = mel_filter_bank(201, 128, 0.0, 8000.0, 16000)
    expected = (np.maximum(np.log10(np.maximum(power @ bank, 1e-10)), 1.5 - 8) + 4) / 4
    mel = log_mel(V.Spectrogram(), noise[:4000])
    assert mel.dtype == mx.float32 and mel.shape == (25, 128)
    assert np.abs(np.array(mel) - expected).max() < 1e-4  # log10 of float32 power
    assert log_mel(V.Spectrogram(), np.zeros(1600)).max().item() == (1.5 - 8 + 4) / 4


@pytest.mark.parametrize("kernel,stride", [(1, 1), (3, 1), (3, 2), (7, 5), (8, 8)])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, None])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_carry_lets_a_kernel_move_over_the_whole_signal(kernel, stride, chunk, shape):
    rng = np.random.RandomState(kernel * stride)
    x = rng.randn(2, 61, *shape).astype(np.float32)  # two recordings
    padded = np.concatenate([np.zeros((2, kernel - 1, *shape), np.float32), x], axis=1)
    expected = [padded[:, i : i + kernel].tolist() for i in range(0, 61, stride)]
    carry = V.Carry(stride, kernel - stride, zeros=kernel - 1)
    got = []
    start = 0
    while start < 61:
        n = chunk or rng.randint(1, 13)
        y = np.array(carry(mx.array(x[:, start : start + n])))
        got += [y[:, i : i + kernel].tolist() for i in range(0, y.shape[1] - kernel + 1, stride)]
        start += n
    assert got == expected


# --------------------------------------------------------------------------------------- attention

ARGS = V.TransformerArgs(dim=24, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=8,
                         sliding_window=12, rope_theta=100.0, norm_eps=1e-5)


def chunks(rng, total, kind):
    """Sizes that add up to `total`: after a prompt one by one, or any."""
    sizes = [37] if kind == "steps" else []
    while (rest := total - sum(sizes)) > 0:
        sizes.append(1 if kind == "steps" else min(rest, int(rng.choice([1, 2, 4, 13, 60, 311]))))
    return sizes


@pytest.mark.parametrize("window,total", [(12, 120), (300, 950)])
@pytest.mark.parametrize("kind", ["steps", "any", "whole"])
@pytest.mark.parametrize("batch", [1, 3])
def test_cached_attention_equals_attention_without_a_cache(window, total, kind, batch):
    args = replace(ARGS, sliding_window=window)
    layer = V.Attention(args, bias=True)
    rng = np.random.RandomState(total)
    x = mx.array(rng.randn(batch, total, 24).astype(np.float32)) * 2
    cache = V.KVCache(args, batch)
    sizes = [total] if kind == "whole" else chunks(rng, total, kind)
    spans = itertools.pairwise(np.cumsum([0, *sizes]).tolist())
    outs = [layer(x[:, a:b].reshape(-1, 24), cache).reshape(batch, b - a, 24) for a, b in spans]
    got = mx.concatenate(outs, axis=1)
    assert all(close(got[b], naive_attention(layer, x[b], args)) for b in range(batch))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_the_mask_is_finite(dtype):
    """On CUDA a row that begins with hidden keys would be NaN."""
    mask = V.window_mask(3, 4, 9, 3, dtype)
    assert mask.dtype == dtype and mx.isfinite(mask).all().item()


def test_kept_keys_are_turned_in_float32():
    """A bfloat16 key is rounded when it is stored, not between the two rotations, too.

    One rounding is an error of 0.0032 (root mean square), two are 0.0049: 0.004 is between them.
    """
    cache = V.KVCache(replace(ARGS, sliding_window=300))
    k = mx.array(np.random.RandomState(0).randn(1, 2, 575, 8)).astype(mx.bfloat16)
    cache.keys = cache.values = cache.rope(k, offset=0)
    cache.length = 575
    cache.renew(1)
    exact = cache.rope(k[:, :, 276:].astype(mx.float32), offset=0)
    error = cache.keys[:, :, :299].astype(mx.float32) - exact
    assert (mx.square(error).mean() / mx.square(exact).mean()).item() ** 0.5 < 0.004


class Counted(V.KVCache):
    renewals = 0

    def renew(self, T):
        self.renewals += 1
        super().renew(T)


@pytest.mark.parametrize("window", [12, 100, 256, 300, 511, 750, 8192])
def test_sizes_of_the_buffer(window):
    """They are odd and few, and leave room for a quarter of a window: see buffer_size."""
    sizes = set()
    for T in (1, 4, 8, 39, window // 2, window, 2 * window):
        for kept in {0, min(39, window - 1), window // 2, window - 1}:
            size = V.buffer_size(kept, T, window)
            assert size >= kept + T and size % 2
            sizes.add(size)
        full = V.buffer_size(window - 1, T, window)
        assert full - (window - 1) >= max(T, window // 4)  # so the next steps need no renewal
        assert full <= window + max(T, window // 4, min(window, 256))
    assert len(sizes) <= math.log2(window) + 2
    assert V.buffer_size(8191, 1, 8192) == 8191 + 2048


@pytest.mark.parametrize("window", [12, 300])
def test_one_position_sees_its_window_and_several_the_whole_buffer(window):
    cache = V.KVCache(replace(ARGS, n_heads=1, n_kv_heads=1, head_dim=2, sliding_window=window))
    x = mx.zeros((1, 1, 3 * window + 39, 2))
    for n in [39] + [1, window // 3, 1, 1, window // 2, 1, 2 * window, 1] * 6:
        _, keys, values, mask = cache.update(*[x[:, :, :n]] * 3)
        size = cache.keys.shape[2]
        seen = min(window, cache.length) if n == 1 else size
        assert keys.shape == values.shape == (1, 1, seen, 2)
        assert mask is None if n == 1 else mask.shape == (n, size)


def test_cache_is_exact_far_from_the_origin():
    """Against float64 and angles of absolute positions, of which only differences should count."""
    rng = np.random.RandomState(0)
    k, v = rng.randn(2, 3000, 8).astype(np.float32)
    q = rng.randn(8).astype(np.float32)
    cache = Counted(replace(ARGS, n_heads=1, n_kv_heads=1))
    for at in range(3000):
        one = [mx.array(x[None, None, None]) for x in (q, k[at], v[at])]
        turned, keys, values, _ = cache.update(*one)
        mx.eval(cache.keys, cache.values)
        assert cache.length <= cache.keys.shape[2] <= 2 * 12
    assert cache.renewals <= 3000 / 12 + 1  # and the buffer is not copied at every step
    out = mx.fast.scaled_dot_product_attention(turned, keys, values, scale=8**-0.5)

    def turn(x, positions):  # [n, 8] -> [n, 4] complex
        angles = np.asarray(positions)[:, None] * 100.0 ** (-np.arange(4) / 4)
        return (x[:, 0::2] + 1j * x[:, 1::2].astype(np.float64)) * np.exp(1j * angles)

    pairs = turn(k[-12:], range(2988, 3000)).conj() * turn(q[None], [2999])
    weights = np.exp(pairs.real.sum(1) / math.sqrt(8))
    assert close(out[0, 0, 0], weights @ v[-12:] / weights.sum(), 1e-5)


# ------------------------------------------------------------------------ encoder, adapter, decoder


@pytest.mark.parametrize("sizes", [[75], [1] * 75, [3, 5, 1, 41, 25]])
def test_embeddings_and_logits_in_any_pieces_equal_the_specification(noise, sizes):
    """Closer than tokens could tell, so: causal, the windows and the adaptive norm are right."""
    model = make_model()
    mel = log_mel(V.Spectrogram(), noise)
    ids = mx.array(np.random.RandomState(2).randint(0, 1400, 75))
    audio_embeds = naive_audio_embeds(model, mel)  # [75, D]
    x = model.language_model.embed_tokens(ids) + audio_embeds
    expected = naive_logits(model, x, naive_scales(model, 6))
    state = V.EncoderState(model.encoder_args)
    scales = model.scales(6)
    caches = [V.KVCache(model.decoder_args) for _ in scales]
    spans = list(itertools.pairwise(np.cumsum([0, *sizes]).tolist()))
    ours = [model.embed_audio(mel[None, 8 * a : 8 * b], state)[0] for a, b in spans]
    assert close(mx.concatenate(ours), audio_embeds, 1e-5)
    logits = [model(ids[None, a:b], audio_embeds[None, a:b], scales, caches) for a, b in spans]
    assert close(mx.concatenate(logits), expected[[b - 1 for _, b in spans]], 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", mx.bfloat16, "float32"])
def test_no_activation_leaves_the_type_that_was_asked_for(checkpoint, noise, dtype):
    model, tokenizer, _ = V.load_voxtral_model(checkpoint, dtype)
    stream = V.Stream(model, tokenizer)
    stream.feed(noise[:20_000])
    arrays = dict(tree_flatten(model.parameters()))
    arrays |= {"audio_embeds": stream._audio_embeds, "scale": stream._scales[0]}
    arrays |= {id(cache): cache.keys for cache in stream._caches + stream._encoder_state.caches}
    arrays["output"] = model.embed_audio(mx.zeros((1, 8, 128)), V.EncoderState(model.encoder_args))
    assert {x.dtype for x in arrays.values()} == {getattr(mx, str(dtype).rpartition(".")[2])}


# ------------------------------------------------------------------------- stream: tokens to text

PAD, WORD = 32, 33


class Bytes:
    """A tokenizer without a vocabulary: token 1000 + b is the byte b."""

    def get_special_token(self, name):
        return {"[STREAMING_PAD]": PAD, "[STREAMING_WORD]": WORD}[name]

    def id_to_byte_piece(self, token):
        return bytes([token - 1000]) if token >= 1000 else b""


def written(*parts, step=0.08):
    """A transcript of these tokens, one per step; a text stands for the tokens of its bytes."""
    transcript = V.Transcript(Bytes())
    tokens = []
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        tokens += [part] if isinstance(part, int) else [1000 + b for b in part]
    for k, token in enumerate(tokens):
        transcript.append(token, (k + 1) * step)
    assert transcript.tokens == tokens and transcript.until == len(tokens) * step
    return transcript


def test_characters_may_be_split_over_tokens():
    #                  0.08  0.16   0.24..  0.48  0.56  0.64, and the rest of it after a pause
    transcript = written(PAD, WORD, " é", PAD, WORD, b" \xe5", PAD, PAD, b"\x85\xab", "!", 2, WORD)
    assert transcript.text == "é 八!"
    assert transcript.words == [V.Word("é", 0.0, 0.16), V.Word(" 八!", 0.16, 0.56)]
    assert written(WORD, b" \xe5\x85", WORD).text == ""


def test_words_end_where_they_were_word_end_and_start_where_the_last_one_ended():
    transcript = written(PAD, WORD, "a", PAD, WORD, PAD, PAD, " b", *[PAD] * 5, WORD, " c")
    times = [(word.start, word.end) for word in transcript.words]
    assert times == [(0.0, 0.16), (0.16, 0.4), (round(1.2 - V.WORD_SECONDS, 3), 1.2)]
    whole = written()
    whole.extend(transcript, 10.0, 11.0)  # a piece of a recording, without the silence behind it
    assert whole.text == "a b c" and [word.end for word in whole.words] == [10.16, 10.4, 11.0]
    late = written(*[PAD] * 99, WORD, " late").words[0]
    assert (late.start, late.end) == (8.0 - V.WORD_SECONDS, 8.0)


def test_text_before_the_first_word_is_a_word():
    assert written(PAD, PAD, " so").words == [V.Word("so", 0.0, 0.32)]  # "s" is token 4
    assert written(WORD, " ", PAD, " ", "x", WORD, WORD, "y").text == "xy"
    assert written(WORD, "x", " y z").words == [V.Word("x y z", 0.0, 0.08)]


def test_a_word_is_as_probable_as_its_least_probable_token():
    transcript = V.Transcript(Bytes())
    spoken = [(WORD, 0.1), (1000 + ord("a"), 0.8), (PAD, 0.2), (1000 + ord("b"), 0.9), (WORD, 0.3)]
    spoken += [(1000 + b, p) for b, p in zip(b" \xe5\x85\xab", (0.7, 0.4, 0.6, 0.5))]
    spoken += [(WORD, 0.2), (1000 + ord("c"), 0.6)]
    for k, (token, probability) in enumerate(spoken):
        transcript.append(token, k, probability)
    told = [(word.text, word.probability) for word in transcript.words]
    assert told == [("ab", 0.8), (" 八", 0.4), ("c", 0.6)]
    whole = written(WORD, "x")
    whole.extend(transcript, 0, 99)
    assert [word.probability for word in whole.words] == [1.0, 0.8, 0.4, 0.6]
    assert str(whole) == whole.text == "xab 八c"


def test_a_mark_without_text_does_not_move_the_next_piece():
    """Its first word keeps its own time, not that of a mark at the end of the piece before."""
    whole = V.Transcript(Bytes())
    whole.extend(written(WORD, "a", PAD, WORD, PAD), 0.0, 0.4)
    whole.extend(written(*[PAD] * 9, WORD, " b"), 10.0, 11.0)
    assert [(word.text, word.end) for word in whole.words] == [("a", 0.08), (" b", 10.8)]
    whole.extend(written(PAD, " c"), 20.0, 21.0)  # without a mark it belongs to the last word
    assert whole.words[-1].text == " b c" and whole.words[-1].end == 10.8


def test_half_a_character_at_the_end():
    transcript = written(WORD, b"x\xe5")
    transcript.close()
    transcript.close()
    assert transcript.text == transcript.words[0].text == "x\ufffd" and len(transcript.words) == 1


# ------------------------------------------------------------------------ stream: sound to tokens


def script(stream, *rows):
    """Make the decoder of a stream say what a test wants: row b, token k; [STREAMING_PAD] then."""
    rows = [iter(row) for row in rows]

    class Scripted:
        spectrogram = stream._model.spectrogram
        encoder_args = stream._model.encoder_args
        factor = stream._model.factor
        embed_audio = stream._model.embed_audio

        def __call__(self, ids, audio_embeds, scales, caches):
            assert audio_embeds.shape[:2] == ids.shape
            token = mx.array([[next(row, PAD)] for row in rows])
            return (token == mx.arange(1400)).astype(mx.float32) * 99  # [B, vocabulary]

    stream._model = Scripted()
    return stream


@pytest.mark.parametrize("batch,most", [(1, (187, 375)), (3, (62, 125)), (128, (16,))])
def test_pieces_for_the_encoder_have_few_sizes(batch, most):
    """CUDA plans kernels for each shape, and MLX gives up after some hundred of them."""
    model = make_model(encoder={"sliding_window": 750})
    sizes = set()
    for steps in range(1, 450):
        pieces = []
        while left := steps - sum(pieces):
            pieces.append(V.piece_size(left, model, batch))
        assert sum(pieces) == steps and len(pieces) <= steps // max(pieces) + 8
        sizes |= set(pieces)
    assert max(sizes) in most  # on a CPU, on a GPU
    assert len(sizes) <= math.log2(max(sizes)) + 2


def test_a_stream_encodes_such_pieces_and_all_of_them(loaded, noise):
    model = make_model(encoder={"sliding_window": 96})  # pieces of 24 steps on a CPU
    stream = V.Stream(model, loaded[1], lengths=[0, 0])  # encode, do not decode
    sizes = []
    embed_audio = model.embed_audio

    def spy(mel, state):
        sizes.append(mel.shape[1] // 8)
        return embed_audio(mel, state)

    model.embed_audio = spy
    stream._run(np.stack([noise[:89_600]] * 2))
    n = 32 + 69  # with the left pad; the 70th step lacks 40 samples
    got = stream._audio_embeds
    assert sum(sizes) == n and max(sizes) == V.piece_size(n, model, 2) and len(sizes) > 3
    padded = np.pad(noise[:89_600], (32 * 1280, 0))  # the last step is without what follows
    expected = naive_audio_embeds(model, log_mel(model.spectrogram, padded))[:n]
    assert close(got[0], expected, 1e-5) and close(got[1], expected, 1e-5)


def test_a_token_comes_with_the_feed_that_makes_it_possible(loaded, noise):
    model, tokenizer, _ = loaded
    for delay in (1, 6):
        stream = V.Stream(model, tokenizer, delay_ms=80 * delay)
        for k in range(20):
            stream.feed(noise[k * 1280 : k * 1280 + 39])
            assert len(stream.tokens) == max(0, k - delay - 1)
            stream.feed(noise[k * 1280 + 39 : k * 1280 + 40])  # a window looks 2.5 ms ahead
            assert len(stream.tokens) == max(0, k - delay)
            stream.feed(noise[k * 1280 + 40 : (k + 1) * 1280])
            assert len(stream.tokens) == max(0, k - delay)


def test_end_of_sequence_ends_only_what_was_heard(loaded):
    """It is a token like any other until the newest step that was heard is behind the end."""
    model, tokenizer, _ = loaded
    for n, kept in ((9 * 1280, 0), (9 * 1280 + 1, 1), (10 * 1280, 1), (11 * 1280, 2)):
        stream = script(V.Stream(model, tokenizer, delay_ms=80), [PAD, 2, *[PAD] * 6] + [2] * 9)
        stream.feed(np.zeros(n))
        stream.finish()
        assert stream.tokens == [PAD, 2, *[PAD] * 6] + [2] * kept


def test_each_recording_of_a_batch_has_its_own_end(loaded):
    model, tokenizer, _ = loaded
    lengths = [10 * 1280, 4 * 1280, 0, 1]
    stream = script(V.Stream(model, tokenizer, delay_ms=80, lengths=lengths),
                    [7] * 40, [7] * 6 + [2] + [7] * 40, [7] * 40, [7] * 40)
    stream._run(np.zeros((4, 10 * 1280), np.float32))
    stream.finish()
    got = [transcript.tokens for transcript in stream.transcripts]
    assert got == [[7] * 21, [7] * 6, [], [7] * 12]


def test_times_do_not_count_the_silence_of_flush(loaded, noise):
    """Recordings of 10, 5 and 5 steps; every other token opens a word."""
    model, tokenizer, _ = loaded
    stream = script(V.Stream(model, tokenizer, delay_ms=160), [WORD, 1000 + ord("x")] * 60)
    ends = []
    heard = 0
    for steps in (10, 5, 5):
        stream.feed(noise[: 1280 * steps])
        stream.flush()
        assert stream.flush() == ""
        ends += [(heard + i + 1) * 0.08 for i in range(steps)]
        heard += steps
        ends += [heard * 0.08] * 13  # two steps of delay and 11
        assert stream.transcripts[0].until == heard * 0.08
    stream.finish()
    assert len(stream.tokens) == len(ends) - 2
    assert [word.end for word in stream.words] == [round(end, 3) for end in ends[:-3:2]]


def test_finish_is_final(loaded, noise):
    model, tokenizer, _ = loaded
    stream = script(V.Stream(model, tokenizer), [WORD, 1000 + 0xE5])
    stream.feed(noise[:16_000])
    assert stream.text == "" and stream.finish() == "\ufffd"
    tokens = list(stream.tokens)
    assert stream.finish() == stream.flush() == "" and stream.tokens == tokens
    with pytest.raises(V.VoxtralError, match="finished"):
        stream.feed(noise)


def test_impossible_delays_and_samples(loaded, noise):
    model, tokenizer, _ = loaded
    for delay in (0, -80, 81, 1280, 2480, 479.5):
        with pytest.raises(V.VoxtralError, match="multiple of 80"):
            V.transcribe(model, tokenizer, noise[:1], delay_ms=delay)
    for temperature in (-0.1, math.nan, math.inf):
        with pytest.raises(V.VoxtralError, match="temperature"):
            V.transcribe(model, tokenizer, noise[:1], temperature=temperature)
    for samples in (np.zeros(5, np.int32), np.zeros((5, 2)), np.array([math.nan]), "sound", None):
        with pytest.raises(V.VoxtralError):
            V.Stream(model, tokenizer).feed(samples)
    pcm = (noise * 32767).astype(np.int16)
    assert np.array_equal(V.as_samples(pcm), pcm / np.float32(32768))


@pytest.mark.parametrize("seed", range(3))
def test_temperature_samples_from_the_softmax(loaded, seed):
    """Of 4,000 tokens; a share has a standard deviation of at most 0.005, and 0.03 are six."""
    mx.random.seed(seed)
    logits = mx.zeros((4000, 1)) + mx.array([0.0, 1.0, 2.0])
    softmax = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    ids, probabilities = V.Stream(*loaded[:2], temperature=0.5)._choose(logits)
    shares = np.bincount(np.array(ids)[:, 0], minlength=3) / 4000
    assert np.abs(shares - np.exp([0, 2, 4]) / np.exp([0, 2, 4]).sum()).max() < 0.03
    assert np.abs(np.array(probabilities) - softmax[np.array(ids)]).max() < 1e-6
    ids, probabilities = V.Stream(*loaded[:2])._choose(logits)
    assert set(ids.flatten().tolist()) == {2} and abs(probabilities[0].item() - softmax[2]) < 1e-6


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_probabilities_are_the_softmax_of_the_specification(loaded, noise, temperature):
    model, tokenizer, _ = loaded
    got = V.transcribe(model, tokenizer, noise[:20_480], delay_ms=160, temperature=temperature)
    padded = np.pad(noise[:20_480], (32 * 1280, 30 * 1280))
    ids = [1] + [32] * 34 + got.tokens
    audio_embeds = naive_audio_embeds(model, log_mel(model.spectrogram, padded))[: len(ids)]
    x = model.language_model.embed_tokens(mx.array(ids)) + audio_embeds
    softmax = np.array(mx.softmax(naive_logits(model, x, naive_scales(model, 2)), axis=-1))
    expected = [softmax[34 + k, token] for k, token in enumerate(got.tokens)]
    assert np.abs(np.array(got.probabilities) - expected).max() < 2e-4  # four digits are kept


def test_probabilities_are_float32_in_any_type():
    """Between 0.9961 and 1 bfloat16 has nothing."""
    model, tokenizer, _ = V.load_voxtral_model(DIGITS)
    samples = V.load_audio(DIGITS / "short.flac")[:16_000]
    got = V.transcribe(model, tokenizer, samples, delay_ms=160).probabilities
    assert any(0.9962 < p < 0.9999 for p in got)


def test_progress_and_what_it_raises(loaded, noise):
    model, tokenizer, _ = loaded
    seen = []
    recordings = [noise[:40_000], noise[:9000]]
    V.transcribe_batch(model, tokenizer, recordings, progress=seen.append)
    encoded = seen.index(next(seconds for seconds in seen if seconds))
    assert encoded >= 2 and seen == sorted(seen) and seen[-1] == 2.5  # 0 while sound is encoded

    def hang_up(seconds):
        seen.append(seconds)
        if seconds > limit:
            raise ConnectionResetError

    for limit in (-1, 1):
        seen.clear()
        with pytest.raises(ConnectionResetError):
            V.transcribe(model, tokenizer, noise, delay_ms=80, progress=hang_up)
        assert limit < seen[-1] <= limit + 1.1


def test_a_stream_may_be_fed_from_several_threads(checkpoint, noise, tmp_path):
    """An audio callback has its own thread, and MLX computes there only what was made there.

    In a process of its own and without mx.compile: after mx.compile in a thread, MLX 0.32 at times
    aborts at exit.
    """
    np.save(tmp_path / "noise.npy", noise[:40_000])
    code = """if True:
        import concurrent.futures as C, sys, numpy as np, voxtral as V
        (model, tokenizer, _), x = V.load_voxtral_model(sys.argv[1]), np.load(sys.argv[2])
        def elsewhere(work):
            with C.ThreadPoolExecutor(1) as thread: thread.submit(work).result()
        expected = V.transcribe(model, tokenizer, x, delay_ms=480).tokens
        for temperature in (0.0, 0.5):
            stream = V.Stream(model, tokenizer, temperature=temperature)
            model.scales(6)  # never computed: must not matter
            for i in range(0, len(x), 3000):
                work = lambda: stream.feed(x[i : i + 3000])
                elsewhere(work) if i % 9000 else work()
            elsewhere(stream.finish)
            late = len(expected) - len(stream.tokens)  # a sample may end up to 11 steps early
            print(stream.tokens == expected, 0 <= late <= 11)
        stream = V.Stream(model, tokenizer)  # as a task of asyncio that is cancelled in feed
        thread = C.ThreadPoolExecutor(1)
        feeding = thread.submit(stream.feed, x)
        while not stream._fed: pass
        rest = stream.finish()  # waits for the feed
        print(feeding.exception() is None, stream.tokens == expected,
              feeding.result() + rest == stream.text != rest)
        thread.shutdown()"""
    done = subprocess.run(
        [sys.executable, "-c", code, checkpoint, tmp_path / "noise.npy"], capture_output=True,
        env=os.environ | {"MLX_DISABLE_COMPILE": "1", "PYTHONPATH": str(HERE)}, check=False)
    told = done.stdout.decode().split()
    expected = ["True", "True", "False", "True", "True", "True", "True"]
    assert told == expected, done.stderr.decode()[-800:]


def test_memory_does_not_grow(loaded, noise):
    """Nothing but tokens, words and text is larger at the end than after some windows."""
    stream = V.Stream(make_model(encoder={"n_layers": 1}, n_layers=1), loaded[1])
    active = []
    for _ in range(10):  # 10 x 6 s; the decoder's window is 3.2 s, the encoder's 0.24 s
        stream.feed(noise)
        mx.eval([[c.keys, c.values] for c in stream._caches])
        active.append(mx.get_active_memory())
        assert len(stream._times) <= 8 and stream._audio_embeds.shape[1] == 0
    assert max(active[5:]) <= 1.02 * max(active[:5]) and len(stream.tokens) == 10 * 75 - 7


# --------------------------------------------------------------------------------- in lockstep


@pytest.mark.parametrize("delay_ms", [80, 480, 2400])
def test_a_batch_equals_one_by_one(loaded, noise, delay_ms):
    model, tokenizer, _ = loaded
    rng = np.random.RandomState(delay_ms)
    lengths = [0, 1, 1279, 1280, 1281, *rng.randint(2, 40_000, 2)]
    rng.shuffle(lengths)
    recordings = [np.roll(noise, -rng.randint(30_000))[:n] for n in lengths]
    together = V.transcribe_batch(model, tokenizer, recordings, delay_ms=delay_ms)
    for recording, got in zip(recordings, together, strict=True):
        expected = V.transcribe(model, tokenizer, recording, delay_ms=delay_ms)
        assert result(got) == result(expected)
        assert not got.words or got.words[-1].end <= len(recording) / 16000 + 5e-4


def test_a_batch_of_speech_equals_transformers_one_by_one(digits, monkeypatch):
    model, tokenizer, _ = digits
    expected = json.loads((DIGITS / "expected.json").read_text())
    names = ["short.flac", "stereo44k.ogg"]
    monkeypatch.setenv("PATH", "")  # ffmpeg, if it is there, resamples in its own way
    samples = [V.load_audio(DIGITS / name) for name in names]
    together = V.transcribe_batch(model, tokenizer, samples, delay_ms=480)
    for got, name in zip(together, names, strict=True):
        want = expected[name]["480"]
        assert got.text == want["text"] and got.tokens == want["tokens"][: want["tokens"].index(2)]
        truth = json.loads((DIGITS / name).with_suffix(".json").read_text())["words"]
        assert np.median([abs(a.end - b["end"]) for a, b in zip(got.words, truth)]) <= 0.08


# ------------------------------------------------------------------------------------ checkpoints

FULL = {"dim": 3072, "n_layers": 26, "head_dim": 128, "hidden_dim": 9216, "n_heads": 32,
        "n_kv_heads": 8, "rope_theta": 1e6, "sliding_window": 8192, "vocab_size": 131072}
FULL_ENCODER = {"dim": 1280, "n_layers": 32, "head_dim": 64, "hidden_dim": 5120, "n_heads": 32,
                "n_kv_heads": 32, "rope_theta": 1e6, "sliding_window": 750}


def their_config(layout, params):
    """The same sizes in the file and form that another layout has them in."""
    whisper = params["multimodal"]["whisper_model_args"]
    audio, text = whisper["encoder_args"], {k: v for k, v in params.items() if k != "multimodal"}
    if layout == "mlx-audio":
        return {"decoder": text, "encoder_args": {**audio, "downsample_factor": 4}}
    if layout == "transformers":
        parts = ({**{theirs: part[ours] for ours, theirs in FIELDS.items() if ours in part},
                  "rope_parameters": {"rope_theta": part["rope_theta"]}} for part in (audio, text))
        return {"model_type": "voxtral_realtime", "downsample_factor": 4,
                **dict(zip(("audio_config", "text_config"), parts))}
    if layout == "original":
        del audio["n_kv_heads"]  # Mistral leaves it out: it is n_heads
    return params


def write(folder, layout, model, params=None, **more):
    """The model as a folder of a layout; `more` goes into its configuration."""
    folder.mkdir(exist_ok=True)
    original = layout == "original"
    text = json.dumps({**their_config(layout, params or config()), **more})
    (folder / ("params.json" if original else "config.json")).write_text(text)
    file = folder / ("consolidated.safetensors" if original else "model.safetensors")
    mx.save_safetensors(str(file), their_names(model, layout))
    write_tekken(folder)
    return folder


def equal(model, other):
    """Do two models have the same parameters, in name, type, shape and number?"""
    a, b = (dict(tree_flatten(m.parameters())) for m in (model, other))
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and mx.array_equal(a[name], b[name]).item() for name in a)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_load_the_same_weights(tmp_path, layout):
    sizes = {"head_dim": 8}  # of the encoder, not that of the decoder
    small = make_model(encoder=sizes)
    folder = write(tmp_path / "model", layout, small, config(sizes))
    model, tokenizer, params = V.load_voxtral_model(folder)
    assert equal(model, small) and tokenizer.n_words == params["vocab_size"]
    for part in ("decoder_args", "encoder_args", "spectrogram"):
        assert getattr(model, part) == getattr(V.Voxtral(params), part) == getattr(small, part)
    half = V.load_voxtral_model(folder, "float16")[0]
    half.encoder.norm.weight = mx.ones(32)  # in float32, which is not to spread
    again = V.load_voxtral_model(write(folder, layout, half, config(sizes)))[0]
    assert {w.dtype for _, w in tree_flatten(again.parameters())} == {mx.float16}


@pytest.mark.parametrize(
    "layout,head", [("original", "output"), ("transformers", "language_model.lm_head")])
def test_an_older_prefix_and_a_head_that_is_tied(tmp_path, layout, head):
    """A head is the embedding once more, so it is not needed."""
    folder = write(tmp_path / "model", layout, make_model())
    (path,) = folder.glob("*.safetensors")
    weights = {f"{head}.weight": mx.zeros((1400, 64)), f"{head}.scales": mx.zeros((1400, 2))}
    for name, w in mx.load(str(path)).items():
        weights[name.replace("streams_embeddings.embedding_module", "whisper_embeddings")] = w
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)
    assert equal(V.load_voxtral_model(folder)[0], make_model())


def test_full_size_has_711_tensors_and_8859358720_bytes():
    leaves = tree_flatten(V.Voxtral(config(encoder=FULL_ENCODER, **FULL)).parameters())  # lazy
    assert sum(2 * w.size for _, w in leaves) == 8_859_358_720 and len(leaves) == 711


# --------------------------------------------------------------------------- learning to transcribe
# How does such a model learn? From recordings in which it is known when each word ends. The target
# is a stream of tokens, one per step of 80 ms: where a word ends in step k, target k is
# [STREAMING_WORD], and the word's token follows; everywhere else it is [STREAMING_PAD]. The delay
# enters twice. A prompt of BOS and [STREAMING_PAD], as long as the left padding and the delay,
# shifts the target behind the sound: at the position that has heard step k + delay the model is to
# write token k. And the norms of the decoder are told the delay, since by nothing else could it
# know which step is due.
#
# Here the "words" are the keys of a telephone: two tones each, of random length, loudness and
# pause, in some noise. The model has about 80,000 parameters in use and starts from random numbers.

KEYS = "1234567890"
LEFT = 2  # steps of silence before a recording
STEPS = 20  # of a recording to learn from
DELAYS = (1, 2)  # in steps
PAD, WORD, KEY = 32, 33, 1256  # token ids; KEY + 3 is " 3"
USED = [1, PAD, WORD, *range(KEY, KEY + 10)]  # 1 is BOS
LEARNER_TEKKEN = {"vocab_size": 1266, "words": [b" %d" % i for i in range(10)],
                  "streaming_n_left_pad_tokens": LEFT, "transcription_delay_ms": 80 * DELAYS[0]}


def learner(seed):
    """The model that is to learn; of two decoder layers, as the delay enters after attention."""
    cfg = config(rope_theta=100.0, sliding_window=16, vocab_size=1266, ada_rms_norm_t_cond_dim=8)
    encoder = cfg["multimodal"]["whisper_model_args"]["encoder_args"]
    encoder |= {"n_layers": 1, "hidden_dim": 64, "rope_theta": 100.0, "sliding_window": 16}
    encoder["audio_encoding_args"]["num_mel_bins"] = 32
    model = V.Voxtral(cfg)
    rng = np.random.RandomState(seed)
    weights = []
    for name, w in tree_flatten(model.parameters()):
        scale = (1.4 if "conv" in name else 1) / math.sqrt(math.prod(w.shape[1:]))
        if "embed" in name:  # ids that never occur stay at zero: a logit of 0 each
            scale = 0.1 * np.isin(np.arange(len(w)), USED)[:, None]
        value = np.full(w.shape, "norm" in name) if w.ndim == 1 else rng.randn(*w.shape) * scale
        weights.append((name, mx.array(value.astype(np.float32))))
    model.load_weights(weights)
    return model, cfg


def telephone(rng, seconds):
    """Somebody presses keys: samples, and (key, when it ends in seconds) of each."""
    x = rng.randn(int(seconds * 16000)) * 10 ** rng.uniform(-3.5, -2)
    keys = []
    at = rng.uniform(0.05, 0.4)
    while (end := at + rng.uniform(0.08, 0.2)) < seconds - 0.02:
        key = rng.randint(10)
        row, column = divmod(KEYS.index(str(key)), 3) if key else (3, 1)
        now = np.arange(int(at * 16000), int(end * 16000))
        tones = (697, 770, 852, 941)[row], (1209, 1336, 1477)[column]
        loudness = 10 ** rng.uniform(-1.3, -0.5)
        x[now] += loudness * sum(np.sin(2 * np.pi * f * now / 16000) for f in tones)
        keys.append((str(key), end))
        at = end + rng.uniform(0.1, 0.4)
    return x.astype(np.float32), keys


def lesson(rng, mel):
    """Log-mel, the target stream, and for each step the key that ends in it; both index USED."""
    quiet = rng.randint(7) * 0.08  # the end of a recording is silence, which is to mean nothing
    x, keys = telephone(rng, STEPS * 0.08 - quiet)
    x = np.pad(x, (LEFT * 1280, (STEPS + max(DELAYS)) * 1280 - len(x)))
    stream = [PAD] * (STEPS + 1)
    ends = [PAD] * (LEFT + STEPS + max(DELAYS))
    for key, end in keys:
        k = int(end / 0.08)  # the step that it ends in
        stream[k : k + 2] = WORD, KEY + int(key)
        ends[LEFT + k] = KEY + int(key)
    used = partial(np.searchsorted, USED)  # token ids -> their places in USED
    return log_mel(mel, x), used(stream[:STEPS]), used(ends)


def loss(model, mel, streams, ends):
    """How unlikely the model finds the streams [B, STEPS]; half of the batch is at each delay."""
    decoder = model.language_model
    used = mx.array(USED)
    state = V.EncoderState(model.encoder_args, len(mel))
    audio_embeds = model.embed_audio(mel, state)  # [B, all its steps, D]

    def surprise(x, targets):
        logits = x @ decoder.embed_tokens.weight[used].T
        others = mx.full((*x.shape[:-1], 1), math.log(1266 - len(USED)))  # all with a logit of 0
        return nn.losses.cross_entropy(mx.concatenate([logits, others], -1), targets).mean()

    # It learns much faster when the sound alone, too, has to tell which key ends in a step.
    total = surprise(audio_embeds, ends)
    n = len(mel) // len(DELAYS)
    for i, delay in enumerate(DELAYS):
        part = slice(i * n, (i + 1) * n)
        heard = LEFT + delay
        prompt = mx.array([[0] + [1] * heard] * n)  # BOS and [STREAMING_PAD] in USED
        ids = used[mx.concatenate([prompt, streams[part, :-1]], axis=1)]
        x = decoder.embed_tokens(ids) + audio_embeds[part, : heard + STEPS]
        rows = x.reshape(-1, x.shape[2])
        for layer, scale in zip(decoder.layers, model.scales(delay)):
            rows = layer(rows, V.KVCache(model.decoder_args, n), scale)
        x = decoder.norm(rows).reshape(x.shape)[:, heard:]
        total += surprise(x, streams[part]) / len(DELAYS)
    return total


def learn(folder, seed=0, updates=400, report=lambda *_: None):
    """Train a learner, save it in Mistral's layout; `report` sees update, loss, model at times."""
    model, cfg = learner(seed)
    rng = np.random.RandomState([seed, 1])
    lessons = [lesson(rng, model.spectrogram) for _ in range(2400)]
    mels, streams, ends = (mx.array(np.stack(column)) for column in zip(*lessons))

    def rate(top):  # eight updates to warm up, then down to nothing
        parts = [optim.linear_schedule(0, top, 8), optim.cosine_decay(top, updates - 8)]
        return optim.join_schedules(parts, [8])

    # Muon for matrices, AdamW for what is none: on the embeddings, norms and convolutions.
    muon = optim.Muon(rate(0.04), weight_decay=0, ns_steps=3)
    adam = optim.AdamW(rate(8e-3), weight_decay=0)
    optimizer = optim.MultiOptimizer([muon, adam], [lambda n, w: w.ndim == 2 and "embed" not in n])
    gradient = nn.value_and_grad(model, loss)
    for update in range(1, updates + 1):
        pick = mx.array(rng.randint(len(lessons), size=16))
        value, change = gradient(model, mels[pick], streams[pick], ends[pick])
        optimizer.update(model, change)
        mx.eval(model.parameters(), optimizer.state, value)
        if update % 20 == 0:
            report(update, value.item(), model)
    folder.mkdir(exist_ok=True)
    write_tekken(folder, **LEARNER_TEKKEN)
    (folder / "params.json").write_text(json.dumps(cfg))
    mx.save_safetensors(f"{folder}/consolidated.safetensors", their_names(model, "original"))


def dictation(folder, seed=0, n=14):
    """Fresh recordings of keys, about 15 in each: their names and what was pressed when."""
    rng = np.random.RandomState([seed, 2])
    truth = {}
    for i in range(n):
        x, keys = telephone(rng, 6.0)
        (folder / f"{i}.wav").write_bytes(encoded(x, subtype="FLOAT"))
        truth[str(folder / f"{i}.wav")] = keys
    return truth


@pytest.mark.slow
def test_a_model_learns_to_transcribe(tmp_path):
    """The limits are far from what seeds give: each machine rounds, and so learns, differently."""
    learn(tmp_path / "model")
    truth = dictation(tmp_path)
    total = sum(map(len, truth.values()))
    for model, delay in (("model", 80), ("model", 160)):
        options = ("--model", tmp_path / model, "--delay", delay, "--quiet", "--format", "json")
        code, out, err = run(*options, *truth)
        assert code == 0 and err == ""
        wrong, late = 0, []
        for record in map(json.loads, out.splitlines()):
            words = [(key, w["end"]) for w in record["words"] for key in w["text"].split()]
            printed, ends = zip(*words)
            pressed, true = zip(*truth[record["file"]])
            wrong += distance(printed, pressed)
            for i, j, n in SequenceMatcher(None, printed, pressed).get_matching_blocks():
                late += [abs(ends[i + k] - true[j + k]) for k in range(n)]
        assert wrong <= 0.05 * total, (model, delay, wrong, total)
        assert np.median(late) <= 0.08 and np.percentile(late, 95) <= 0.16, (model, delay, late)


def show_learning():
    """Loss and a transcript that becomes right."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    x, keys = telephone(np.random.RandomState(3), 6.0)
    print("pressed: " + " ".join(key for key, _ in keys))
    with tempfile.TemporaryDirectory() as folder:
        write_tekken(folder, **LEARNER_TEKKEN)
        tokenizer = Tekkenizer.from_file(Path(folder, "tekken.json"))

        def report(update, value, model):
            text = V.transcribe(model, tokenizer, x, delay_ms=160).text
            print(f"update {update}, loss {value:.2f}: {text}", flush=True)

        learn(Path(folder), report=report)


# ---------------------------------------------------------------------- the README and the files


NOT_RUN = {  # commands of the README, and why no test runs them
    "python3 -m venv": "installs; every fresh clone of CI does that",
    "arecord": "needs a microphone",
    "ffmpeg -v error -f avfoundation": "needs a Mac's microphone",
    "pip install -r requirements.txt pytest": "is this",
}
RUN = {  # the others, and the arguments that a test gives to the program instead
    "python voxtral.py talk.m4a": ["talk.m4a"],
    "python voxtral.py --batch 8 lecture.mp3": ["--batch", "8", "lecture.mp3"],
    "python voxtral.py --format srt --output-dir subtitles *.mp4":
        ["--format", "srt", "--output-dir", "subtitles", "a.mp4", "b.mp4"],
}


def test_commands_of_the_readme(checkpoint, tmp_path, noise):
    """Each is run, or named as not run; options are those of --help."""
    readme = (HERE / "README.md").read_text()
    commands = [line.split("  #")[0].strip() for line in readme.splitlines()
                if line.startswith("    ") and ("python" in line or "pip" in line)]
    commands = [command for command in commands if "(" not in command]  # lines of Python
    for name in ("talk.m4a", "lecture.mp3", "a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(encoded(noise[:16000]))
    for command in commands:
        if not any(command.startswith(start) for start in NOT_RUN):
            code, _, err = run("--model", checkpoint, *RUN[command], cwd=tmp_path)
            assert code == 0 and not err, (command, err)
    assert all(command in commands for command in RUN)
    assert all(any(c.startswith(start) for c in commands) for start in NOT_RUN)
    assert sorted(path.name for path in (tmp_path / "subtitles").iterdir()) == ["a.srt", "b.srt"]
    table = readme.partition("| option |")[2].partition("\n\n")[0]
    named, known = (set(re.findall(r"--[a-z][a-z-]*", text)) for text in (table, call("--help")[1]))
    assert named == known - {"--help"}


def test_the_demo_of_the_readme():
    readme = (HERE / "README.md").read_text()
    command, said = re.search(r"&& python voxtral.py (.*)\n    (.*)\n", readme).groups()
    code, out, err = run("--quiet", *command.split(), cwd=HERE)
    assert (code, out.strip(), err) == (0, said, "")


def test_code_of_the_readme(checkpoint, tmp_path, noise, monkeypatch, capsys):
    readme = (HERE / "README.md").read_text()
    spec, program, quantise = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert spec.partition("import numpy as np\n\n")[2] in Path(__file__).read_text()
    exec(spec, {})  # noqa: S102
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recordings").mkdir()
    for name in ("speech.wav", "recordings/a.wav", "recordings/b.wav"):
        (tmp_path / name).write_bytes(encoded(noise[:16000]))
    load = V.load_voxtral_model
    with monkeypatch.context() as patch:
        patch.setattr(V, "load_voxtral_model", lambda *_, lazy=False: load(checkpoint, lazy=lazy))
        patch.setattr(V, "download_weights", lambda _: checkpoint)
        exec(program, {})  # noqa: S102
        exec(quantise, {})  # noqa: S102
    out = capsys.readouterr().out
    texts = [(tmp_path / "recordings" / name).read_text() for name in ("a.txt", "b.txt")]
    assert texts[0] == texts[1] and texts[0] in out and "WEBVTT" in out
    expected = make_model()
    nn.quantize(expected, bits=6, class_predicate=lambda _, part: (
        hasattr(part, "to_quantized") and part.weight.shape[-1] % 64 == 0))
    assert equal(V.load_voxtral_model("voxtral-6bit")[0], expected)


def functions(code):
    """A code object and all that are inside of it."""
    yield code
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from functions(constant)


def test_the_file_can_be_cut_after_any_section():
    """A section uses only what stands above it: no function asks for a name from further down."""
    lines = (HERE / "voxtral.py").read_text().splitlines(keepends=True)
    heads = [i for i, line in enumerate(lines) if re.match(r"# -{20,} [a-z, ]+$", line)]
    assert len(heads) == 8
    for end in heads[1:]:
        module = types.ModuleType("cut")
        sys.modules["cut"] = module  # where dataclasses look
        code = compile("".join(lines[:end]), "cut.py", "exec")
        exec(code, vars(module))  # noqa: S102
        for function in functions(code):
            for step in dis.get_instructions(function):
                known = step.opname != "LOAD_GLOBAL" or hasattr(module, step.argval)
                assert known or hasattr(builtins, step.argval), (lines[end], function, step.argval)


# ----------------------------------------------------------------------- an independent opinion


def cross_check():
    """Encoder and adapter output, and logits at three delays, for seeded inputs and weights."""
    rng = np.random.RandomState(9)
    mel = mx.array(rng.randn(480, 128).astype(np.float32))
    ids = mx.array(rng.randint(0, 1400, 60))
    model = make_model()
    audio_embeds = model.embed_audio(mel[None], V.EncoderState(model.encoder_args))
    frames = model.encoder(mel[None], V.EncoderState(model.encoder_args))
    out = {"encoder": frames, "adapter": audio_embeds[0]}
    for delay in (1, 6, 30):
        scales = model.scales(delay)
        caches = [V.KVCache(model.decoder_args) for _ in scales]
        logits = [model(ids[None, t : t + 1], audio_embeds[:, t : t + 1], scales, caches)
                  for t in range(60)]
        out[f"logits {delay}"] = mx.concatenate(logits)  # [60, vocabulary]
    return mel, np.array(ids), {name: np.array(x) for name, x in out.items()}


def test_agrees_with_transformers(tmp_path, monkeypatch):
    """With numbers that `.ci/jobs.py golden` recorded; live where it is installed."""
    golden = json.loads((HERE / ".ci" / "golden.json").read_text())
    mel, ids, ours = cross_check()
    monkeypatch.syspath_prepend(HERE / ".ci")
    import jobs  # type: ignore[import-not-found]

    for name, values in jobs.digest(ours).items():
        assert values == golden[name] if "tokens" in name else close(values, golden[name])
    if not os.environ.get("CROSS_CHECK") and not importlib.util.find_spec("transformers"):
        return
    for name, theirs in jobs.transformers_says(tmp_path, mel, ids).items():
        assert close(ours[name], theirs), name
        assert "logits" not in name or np.array_equal(ours[name].argmax(-1), theirs.argmax(-1))
    write_tekken(tmp_path)  # so that what transformers has read is a folder that loads here too
    assert equal(V.load_voxtral_model(tmp_path)[0], make_model())
