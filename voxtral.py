#!/usr/bin/env python3
# Copyright (c) 2026 the voxtral.py authors. MIT license: https://opensource.org/license/mit
#
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   'mlx>=0.32.1; sys_platform == "darwin" or sys_platform == "win32"',
#   'mlx[cpu]>=0.32.1; sys_platform == "linux"',
#   'mlx-cpu>=0.32.1; sys_platform == "win32"',
#   'huggingface_hub>=1.20',
#   'mistral-common[audio]>=1.10.0',
#   'numpy>=2.0',
# ]
# ///
"""Voxtral Mini 4B Realtime, Mistral's streaming speech-to-text model, in one file of MLX.

    python voxtral.py speech.wav              # writes the words as they are decoded

    model, tokenizer, config = load_voxtral_model()
    print(transcribe(model, tokenizer, load_audio("speech.wav")).text)

The model is a pipe. Sound goes in at one end and text comes out at the other, at a fixed rate:

    samples      log-mel       encoder frames     audio embeddings     text tokens
    16 kHz  -->  100 Hz   -->  50 Hz         -->  12.5 Hz         -->  12.5 Hz
        400 samples,      2 convolutions,    groups of 4,      26 layers, one
        hop 160           32 layers          2 projections     token per 80 ms

Whisper takes 30 s at a time: its encoder looks both ways over all of it, and its decoder finds its
place by cross-attention. Voxtral Realtime is a stream, by three differences:

  causal    No layer looks ahead, and attention looks back over a window: 750 encoder frames (15
            s), 8192 steps (11 min) in the decoder. What was computed stays valid whatever is said
            next, and memory does not grow.
  added     The decoder's input at each position is the embedding of the last token *plus* that
            of 80 ms of sound (see `Voxtral.__call__`), and its output is exactly one token:
            mostly [STREAMING_PAD], nothing to write yet. [STREAMING_WORD] says that a word was
            heard to its end; the tokens of its text follow, one per step.
  delayed   The text runs some steps behind the sound: with a longer delay the model hears more
            before it writes, and errs less. One set of weights serves 80 ms to 2.4 s; a small
            network turns the delay into a scale inside each decoder layer.

So a file is a stream that arrives at once, and all sound takes one path, `Stream._run`, live or
whole, one recording or several in lockstep. Words used throughout:

  mel frame       one column of the spectrogram, 10 ms
  encoder frame   20 ms
  step            80 ms: 1,280 samples, 8 mel frames, 4 encoder frames, 1 audio embedding, 1 token
  delay           how many steps the text runs behind the sound; `delay_ms` is the same in ms
  window          the positions that attention sees: the newest `sliding_window`
  recording       what a user hands over; B of them can run in lockstep

Letters in shapes: B recordings, F mel frames, T new positions, D dim, C channels. Sources: arXiv
2602.11298 (the report), 2509.08753 (delayed streams), the model's params.json, mistral-common.
"""

from __future__ import annotations

import argparse
import codecs
import html
import json
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from tqdm import tqdm  # type: ignore[import-untyped]  # comes with huggingface_hub

DEFAULT_MODEL_ID = "mlx-community/Voxtral-Mini-4B-Realtime-6bit"
SAMPLE_RATE = 16_000  # load_voxtral_model checks this and STEP against the checkpoint
STEP = 1280  # samples, 80 ms
DELAYS_MS = (*range(80, 1201, 80), 2400)  # those that the model was trained with


class VoxtralError(Exception):
    """A mistake that the user can mend; the message says what is wrong, on one line."""


# ------------------------------------------------------------------------------------- spectrogram


def as_samples(samples: Any) -> np.ndarray:
    """Check samples [n], finite floats within about -1..1 or int16, and return them as float32."""
    samples = np.asarray(samples)
    if samples.dtype == np.int16:
        samples = samples / np.float32(32768)
    if samples.ndim != 1 or samples.dtype.kind != "f" or not np.abs(samples).max(initial=0) < 1000:
        raise VoxtralError("samples must be [n], int16 or floats within about -1..1 and not NaN")
    return samples.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Spectrogram:
    """The log-mel front end; the defaults are those of params.json and mistral-common."""

    num_mel_bins: int = 128  # up to 8 kHz, evenly spaced on Slaney's scale
    hop_length: int = 160  # samples: 10 ms
    window_size: int = 400  # samples that a mel frame is computed from: 25 ms
    global_log_mel_max: float = 1.5  # log10; mel_frames clips at 8 below it

    def mel_frames(self, samples: mx.array) -> mx.array:
        """Samples [B, 160 F + 240] -> the log-mel of their F mel frames [B, F, 128], float32."""
        from mistral_common.audio import mel_filter_bank  # slow to import

        bins = self.window_size // 2 + 1  # frequencies of a Fourier transform: 201
        bank = mel_filter_bank(bins, self.num_mel_bins, 0, SAMPLE_RATE / 2, SAMPLE_RATE)  # cached
        hann = np.hanning(self.window_size + 1)[:-1]  # periodic, like torch.stft's
        B, n = samples.shape
        F = (n - self.window_size) // self.hop_length + 1

        x = mx.as_strided(samples, (B, F, self.window_size), (n, self.hop_length, 1))
        power = mx.square(mx.abs(mx.fft.rfft(x * mx.array(hann, mx.float32))))  # [B, F, bins]
        mel = power @ mx.array(bank, mx.float32)  # [B, F, num_mel_bins]

        # Whisper clips at 80 dB, 8 in log10, below the loudest bin of the recording. A stream
        # does not know how loud the rest will be, so a constant takes that bin's place.
        log = mx.maximum(mx.log10(mx.maximum(mel, 1e-10)), self.global_log_mel_max - 8)
        return (log + 4) / 4  # as Whisper scales it: silence is at -0.6, a loud tone at 1.6


# --------------------------------------------------------------------------------------- attention
# What encoder and decoder share. Activations are rows [B * T, D], which attention folds. With
# [B, T, D] MLX would reshape to rows and back around each product (14 % of a bf16 step on a GPU),
# and its quantised product on CUDA would read the weights B times.


@dataclass(frozen=True)
class TransformerArgs:
    """The sizes of a transformer, from one section of params.json."""

    dim: int
    n_layers: int
    n_heads: int  # of queries
    n_kv_heads: int  # of keys and values; each serves n_heads / n_kv_heads heads of queries
    head_dim: int  # n_heads * head_dim need not be dim
    hidden_dim: int
    sliding_window: int  # positions that one sees, its own included
    rope_theta: float  # base of the rotary frequencies
    norm_eps: float


class Attention(nn.Module):
    """Self-attention over a sliding window, with grouped queries."""

    def __init__(self, args: TransformerArgs, bias: bool):
        super().__init__()
        self.head_dim = args.head_dim
        self.q_proj = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=bias)
        self.k_proj = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.v_proj = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=bias)
        self.o_proj = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=bias)

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        """Rows [B * T, D] -> rows; the cache knows B."""
        shape = (cache.batch, len(x) // cache.batch, -1, self.head_dim)  # [B, T, heads, head_dim]
        q = self.q_proj(x).reshape(shape).swapaxes(1, 2)  # [B, n_heads, T, head_dim]
        k = self.k_proj(x).reshape(shape).swapaxes(1, 2)  # [B, n_kv_heads, T, head_dim]
        v = self.v_proj(x).reshape(shape).swapaxes(1, 2)
        q, k, v, mask = cache.update(q, k, v)  # q and k rotated, k and v with the past
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5, mask=mask)
        return self.o_proj(out.swapaxes(1, 2).reshape(len(x), -1))


class KVCache:
    """Rotated keys, and values, of the positions that B recordings can still see.

    They are appended to a buffer in place, and a position is an index into the buffer. When it is
    full, a new one begins with the last `window - 1` entries, whose keys are rotated anew. That
    changes nothing, as attention depends on distances alone, and positions stay small.
    """

    def __init__(self, args: TransformerArgs, batch: int = 1):
        self.args = args
        self.batch = batch
        self.window = args.sliding_window
        self.length = 0  # entries in the buffers
        self.keys: Any = None  # [B, n_kv_heads, size, head_dim] after an update
        self.values: Any = None

    def rope(self, x: mx.array, offset: int, scale: float = 1.0) -> mx.array:
        """Rotate x [B, heads, T, head_dim] by positions offset, offset + 1, ..., times scale."""
        return mx.fast.rope(x, self.args.head_dim, base=self.args.rope_theta, scale=scale,
                            offset=offset, traditional=True)  # pairs of neighbours, not halves

    def update(self, q: mx.array, k: mx.array, v: mx.array) -> tuple:
        """Append T positions [B, heads, T, head_dim] -> rotated q, keys, values, mask [T, size]."""
        T = k.shape[2]
        if self.keys is None:
            self.keys = k[:, :, :0]  # empty
            self.values = v[:, :, :0]
        if self.length + T > self.keys.shape[2]:
            self.renew(T)
        start = self.length
        self.length += T
        self.keys[:, :, start : self.length] = self.rope(k, offset=start)
        self.values[:, :, start : self.length] = v
        q = self.rope(q, offset=start)
        if T == 1:
            seen = slice(max(0, self.length - self.window), self.length)
            return q, self.keys[:, :, seen], self.values[:, :, seen], None
        # The mask hides the unused end of the buffer like any future.
        mask = window_mask(start, T, self.keys.shape[2], self.window, q.dtype)
        return q, self.keys, self.values, mask

    def renew(self, T: int) -> None:
        """Move what the next position can see to new buffers with room for T more."""
        first = max(0, self.length - self.window + 1)
        keys = self.keys[:, :, first : self.length]
        values = self.values[:, :, first : self.length]
        if first:  # undo the rotation by the old positions, rotate by the new ones
            keys = self.rope(keys.astype(mx.float32), offset=first, scale=-1.0)
            keys = self.rope(keys, offset=0).astype(values.dtype)
        self.length -= first
        room = buffer_size(self.length, T, self.window) - self.length
        widths = [(0, 0), (0, 0), (0, room), (0, 0)]
        self.keys = mx.pad(keys, widths)
        self.values = mx.pad(values, widths)
        if self.length and self.batch > 1:  # free a batch's layer by layer
            mx.eval(self.keys, self.values)


def buffer_size(kept: int, T: int, window: int) -> int:
    """The size of a new buffer of the cache, for `kept` old and T new positions.

    It doubles up to the window; from there on, a quarter of a window to spare makes renewals rare.
    Sizes are few, as MLX on CUDA plans kernels for each; and odd, as MLX 0.32 on CUDA computes
    wrong numbers from a view inside of a buffer whose size is a multiple of 256.
    """
    size = 255
    while size < kept + T:
        size = 2 * size + 1
    if size >= window:
        size = window - 1 + max(T, window // 4, min(window, 256))
    return size | 1  # odd


@lru_cache(maxsize=4)  # all layers ask for the same mask
def window_mask(start: int, T: int, size: int, window: int, dtype: mx.Dtype) -> mx.array:
    """Mask [T, size] for queries at positions start, start + 1, ... and `size` keys from 0 on.

    Query i sees keys i - window + 1 .. i. The mask is added to the scores. It is finite: -inf makes
    NaN in a fused kernel whose first block of keys is hidden.
    """
    back = np.arange(start, start + T)[:, None] - np.arange(size)  # from query to key
    hidden = (back < 0) | (back >= window)
    return mx.array(np.where(hidden, mx.finfo(dtype).min, 0), dtype)


swiglu = mx.compile(lambda gate, up: nn.silu(gate) * up, shapeless=True)  # as one kernel


class SwiGLU(nn.Module):
    """The feed-forward network: one projection gates another."""

    def __init__(self, args: TransformerArgs, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.up_proj = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.down_proj = nn.Linear(args.hidden_dim, args.dim, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class DelayScale(nn.Module):
    """1 + ada(t): the delay scales a decoder layer's ffn_norm (the report's Ada RMSNorm)."""

    def __init__(self, dim: int, inner_dim: int):
        super().__init__()
        self.linear_in = nn.Linear(dim, inner_dim, bias=False)
        self.linear_out = nn.Linear(inner_dim, dim, bias=False)

    def __call__(self, t: mx.array) -> mx.array:
        """The delay's embedding t [1, D] -> scale [1, D]."""
        return 1 + self.linear_out(nn.gelu(self.linear_in(t)))


class Block(nn.Module):
    """A pre-norm transformer layer; the encoder's have biases, the decoder's know the delay."""

    def __init__(self, args: TransformerArgs, bias: bool = False, ada_dim: int = 0):
        super().__init__()
        self.attn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args, bias)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.mlp = SwiGLU(args, bias)
        if ada_dim:  # called once for a stream, by Voxtral.scales
            self.ada_norm = DelayScale(args.dim, ada_dim)

    def __call__(self, x: mx.array, cache: KVCache, scale: mx.array | None = None) -> mx.array:
        """Rows [B * T, D] -> rows. Only the decoder has a scale [1, D]."""
        x = x + self.attention(self.attn_norm(x), cache)
        h = self.ffn_norm(x)
        if scale is not None:
            h = h * scale
        return x + self.mlp(h)


# ------------------------------------------------------------------------ encoder, adapter, decoder


@dataclass
class Carry:
    """The end of a signal, which a kernel that moves along it needs again with the next inputs.

    The kernel covers stride + overlap inputs. Example with stride 2, overlap 1 and x0 x1 x2 x3: it
    has seen x0-x2 and stands at x2, so x2 and x3 are kept until x4 arrives.
    """

    stride: int  # by how many inputs the kernel moves
    overlap: int  # how many it sees again
    zeros: int  # in front of the signal: `overlap` make the kernel causal
    rest: Any = None  # [B, n, ...]

    def __call__(self, x: mx.array) -> mx.array:
        """The next inputs [B, n, ...] -> those of m moves [B, m * stride + overlap, ...]."""
        if self.rest is None:
            self.rest = mx.zeros((len(x), self.zeros, *x.shape[2:]), x.dtype)
        x = mx.concatenate([self.rest, x], axis=1)
        end = (x.shape[1] - self.overlap) // self.stride * self.stride
        self.rest = x[:, end:]
        return x[:, : end + self.overlap]


class EncoderState:
    """What the encoder remembers of B recordings between two calls."""

    def __init__(self, args: TransformerArgs, batch: int = 1):
        self.conv1 = Carry(stride=1, overlap=2, zeros=2)
        self.conv2 = Carry(stride=2, overlap=1, zeros=1)
        self.caches = [KVCache(args, batch) for _ in range(args.n_layers)]


class Encoder(nn.Module):
    """Two convolutions as in Whisper, but causal, then transformer layers."""

    def __init__(self, args: TransformerArgs, num_mel_bins: int):
        super().__init__()
        self.conv1 = nn.Conv1d(num_mel_bins, args.dim, kernel_size=3)
        self.conv2 = nn.Conv1d(args.dim, args.dim, kernel_size=3, stride=2)
        self.layers = [Block(args, bias=True) for _ in range(args.n_layers)]
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)

    def __call__(self, mel: mx.array, state: EncoderState) -> mx.array:
        """The next mel frames [B, F, C], F even -> encoder frames as rows [B * F / 2, D]."""
        x = nn.gelu(self.conv1(state.conv1(mel)))  # [B, F, D]
        x = nn.gelu(self.conv2(state.conv2(x)))  # [B, F / 2, D]
        x = x.reshape(-1, x.shape[2])
        for layer, cache in zip(self.layers, state.caches):
            x = layer(x, cache)
        return self.norm(x)


class Adapter(nn.Module):
    """From `factor` encoder frames side by side to an audio embedding."""

    def __init__(self, encoder_dim: int, dim: int, factor: int):
        super().__init__()
        self.group = factor * encoder_dim
        self.w_in = nn.Linear(self.group, dim, bias=False)
        self.w_out = nn.Linear(dim, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Rows [N, D of the encoder] -> rows [N / factor, D of the decoder]."""
        return self.w_out(nn.gelu(self.w_in(x.reshape(-1, self.group))))


class Decoder(nn.Module):
    """A language model whose inputs are sums of embeddings, see Voxtral.__call__."""

    def __init__(self, args: TransformerArgs, vocab_size: int, ada_dim: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, args.dim)
        self.layers = [Block(args, ada_dim=ada_dim) for _ in range(args.n_layers)]
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)

    def __call__(self, x: mx.array, scales: list, caches: list) -> mx.array:
        """Inputs [B, T, D], a scale [1, D] and a cache for each layer -> logits [B, vocabulary]."""
        B, T, D = x.shape
        x = x.reshape(B * T, D)
        for layer, scale, cache in zip(self.layers, scales, caches):
            x = layer(x, cache, scale)
        last = self.norm(x.reshape(B, T, D)[:, -1])  # [B, D]
        return self.embed_tokens.as_linear(last)  # tied to the embedding


def read_args(cls: Any, config: dict) -> Any:
    """A dataclass of sizes, from the entries of the same names."""
    return cls(**{field.name: config[field.name] for field in fields(cls)})


class Voxtral(nn.Module):
    """The whole model. `config` is the content of params.json."""

    def __init__(self, config: dict):
        super().__init__()
        whisper = config["multimodal"]["whisper_model_args"]
        encoder = whisper["encoder_args"]
        encoder = {"n_kv_heads": encoder["n_heads"], **encoder}  # params.json may leave it out
        self.factor = whisper["downsample_args"]["downsample_factor"]  # encoder frames a step
        self.spectrogram = read_args(Spectrogram, encoder["audio_encoding_args"])
        if self.spectrogram.hop_length * 2 * self.factor != STEP:
            raise ValueError(f"a step is not {STEP} samples")
        self.encoder_args = read_args(TransformerArgs, encoder)
        self.decoder_args = read_args(TransformerArgs, config)
        self.encoder = Encoder(self.encoder_args, self.spectrogram.num_mel_bins)
        self.adapter = Adapter(self.encoder_args.dim, self.decoder_args.dim, self.factor)
        self.language_model = Decoder(
            self.decoder_args, config["vocab_size"], config["ada_rms_norm_t_cond_dim"])

    @property
    def dtype(self) -> mx.Dtype:
        """The type that the model computes in; a convolution is never quantised."""
        return self.encoder.conv1.weight.dtype

    def __call__(self, ids: mx.array, audio_embeds: mx.array, scales: list,
                 caches: list) -> mx.array:
        """Token ids [B, T], audio embeddings [B, T, D] -> logits [B, vocabulary] of the next id."""
        x = self.language_model.embed_tokens(ids) + audio_embeds  # this is how the model listens
        return self.language_model(x, scales, caches)

    def embed_audio(self, mel: mx.array, state: EncoderState) -> mx.array:
        """The next mel frames [B, F, C], F a multiple of 8 -> audio embeddings [B, F / 8, D]."""
        assert mel.shape[1] % (2 * self.factor) == 0, "not whole steps"
        x = self.adapter(self.encoder(mel.astype(self.dtype), state))  # rows [B * F / 8, D]
        return x.reshape(len(mel), -1, x.shape[1])

    def scales(self, delay: int) -> list[mx.array]:
        """1 + ada(t) [1, D] of each decoder layer; t is a sinusoidal embedding of `delay` steps."""
        half = self.decoder_args.dim // 2
        angles = delay * mx.exp(-math.log(10000.0) * mx.arange(half) / half)  # [D / 2]
        t = mx.concatenate([mx.cos(angles), mx.sin(angles)])[None].astype(self.dtype)  # [1, D]
        return [layer.ada_norm(t) for layer in self.language_model.layers]


# ------------------------------------------------------------------------------------------ stream
# The schedule. Before the recording the model hears 32 steps of silence, as it did in training. Its
# first tokens are given, not decoded: BOS and 32 + delay times [STREAMING_PAD]. The decoder reads
# this prompt in one pass, the prefill, together with the silence and the first delay + 1 steps of
# the recording; the last position gives token 0. From there on, each step decodes one token. After
# the recording, up to delay + 11 steps of silence draw out the words still to come.
#
# An example: a clip begins with "seven", said from 0.25 to 0.50 s. The delay is 160 ms, two steps:
#
#     step     0    1    2    3    4    5    6    7    8    9   10   11   12
#     sound    .    .    .   se  -ve   -e   -n    .    .    .    .    .   ni
#     token              .    .    .    .    .    .   [W]  " se" "v" "en"  .
#     k                  0    1    2    3    4    5    6    7    8    9   10
#     text                                                  se  sev  seven
#
# [W] is [STREAMING_WORD], a dot [STREAMING_PAD]. Token k comes with step k + delay and speaks about
# the first k + 1 steps: the word that token 6 announces ended after 7 * 80 = 560 ms.

WORD_SECONDS = 0.4  # what a word is taken to last: the model marks only its end


@dataclass(frozen=True)
class Word:
    """What one [STREAMING_WORD] announces, mostly one word; joined, they are the transcript."""

    text: str  # with its leading space; the first word has none
    start: float  # seconds: the end of the word before, but at most WORD_SECONDS before `end`
    end: float  # seconds: of the last step that its [STREAMING_WORD] speaks about
    probability: float = 1.0  # the least of its tokens', by softmax at temperature 1


class Transcript:
    """What was said: tokens to text and words. It needs no model."""

    def __init__(self, tokenizer: Any):
        self.text = ""
        self.tokens: list[int] = []  # generated, one per step
        self.probabilities: list[float] = []  # one per token
        self.words: list[Word] = []
        self.until = 0.0  # seconds of the recording that the tokens speak about
        self._tokenizer = tokenizer
        self._word_id = tokenizer.get_special_token("[STREAMING_WORD]")
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # keeps half a character
        self._word_end: float | None = None  # in seconds, of a word that has no text yet
        self._least = 1.0  # of the probabilities since the last [STREAMING_WORD]

    def __str__(self) -> str:
        return self.text

    def append(self, token: int, until: float, probability: float = 1.0) -> None:
        """Take the next token, which speaks about the recording up to `until` seconds."""
        self.tokens.append(token)
        self.probabilities.append(probability)
        self.until = until
        if token == self._word_id:
            self._word_end = until
            self._least = 1.0
        elif piece := self._tokenizer.id_to_byte_piece(token):  # special tokens have no bytes
            self._least = min(self._least, probability)
            self._write(self._utf8.decode(piece))  # a character may come in several tokens

    def extend(self, other: Transcript, start: float, end: float) -> None:
        """Take the transcript of a piece of the recording, from `start` to `end` seconds."""
        for k, (token, probability) in enumerate(zip(other.tokens, other.probabilities)):
            self.append(token, min(start + (k + 1) * STEP / SAMPLE_RATE, end), probability)
        self.close()

    def close(self) -> None:
        """No more tokens: half a character becomes U+FFFD, and a word without text is none."""
        self._write(self._utf8.decode(b"", final=True))
        self._word_end = None

    def _write(self, text: str) -> None:
        """Append text to the word that was announced, else to the last word."""
        if not self.text:
            text = text.lstrip()
        if not text:
            return
        if self._word_end is None and not self.words:
            self._word_end = self.until  # text before any [STREAMING_WORD] is a word, too
        if self._word_end is not None:
            last_end = self.words[-1].end if self.words else 0.0
            start = max(last_end, self._word_end - WORD_SECONDS)
            self.words.append(Word("", round(start, 3), round(self._word_end, 3)))
            self._word_end = None
        word = self.words[-1]
        self.words[-1] = replace(word, text=word.text + text, probability=self._least)
        self.text += text


def piece_size(steps: int, model: Voxtral, batch: int) -> int:
    """How many of `steps` go through the encoder at once.

    Two windows of attention, shared by the recordings, are the fastest on a GPU, one on a CPU. The
    rest goes in powers of two, since MLX on CUDA plans kernels for each shape.
    """
    windows = 2 if mx.default_device() == mx.gpu else 1
    encoder_frames = windows * model.encoder_args.sliding_window // batch
    most = max(16, encoder_frames // model.factor)  # steps
    return most if steps >= most else 1 << (steps.bit_length() - 1)


class Stream:
    """Speech to text while the speech comes: `feed` samples, in a pause `flush`, then `finish`.

    `delay_ms`, one of DELAYS_MS, is how long the model listens on before it commits itself
    (default: tekken.json's, 480). `temperature` 0 takes the likeliest token. `text`, `words` and
    `tokens` grow, and all but the last word are final. Any thread may call: a call waits for the
    one that runs. `lengths` and `progress` are for transcribe_batch.
    """

    def __init__(self, model: Voxtral, tokenizer: Any, *, delay_ms: float | None = None,
                 temperature: float = 0.0, lengths: Iterable[float] = (math.inf,),
                 progress: Callable[[float], Any] | None = None):
        if delay_ms is not None and delay_ms not in DELAYS_MS:
            raise VoxtralError(f"delay_ms is {delay_ms}, not a multiple of 80 up to 1200, or 2400")
        if not 0 <= temperature < math.inf:
            raise VoxtralError(f"temperature is {temperature}, not 0 or more")
        self.lengths = list(lengths)  # of each recording, in samples; infinite while it goes on
        self.transcripts = [Transcript(tokenizer) for _ in self.lengths]
        self.ended = [length == 0 for length in self.lengths]  # no sound has no words
        self.words = self.transcripts[0].words
        self.tokens = self.transcripts[0].tokens
        self._lock = threading.RLock()
        self._model = model
        self._temperature = temperature
        self._progress = progress or (lambda seconds: None)
        self._eos_id = tokenizer.eos_id
        self._delay = tokenizer.audio.get_num_delay_tokens(delay_ms)  # steps
        self._right_pad = tokenizer.audio.n_right_pad_tokens(delay_ms)  # delay + 1 + 10 steps
        left_pad = tokenizer.audio.n_left_pad_tokens  # steps of silence: 32
        # Two clocks, in samples: the silence of a flush makes steps, but takes no time.
        self._fed = 0  # with it: for steps and `lengths`
        self._heard = 0  # without it: for the times of words
        self._flushed = 0  # `_heard` at the last flush
        self._times: deque[float] = deque()  # in seconds, for token k: `_heard` when step k ended
        self._decoded = 0.0  # the last of them that was taken
        # The encoder. Mel frames are centred: those of a step reach 200 samples back, 40 ahead.
        B = len(self.lengths)
        size = model.spectrogram.window_size
        self._overlap = size - model.spectrogram.hop_length
        self._samples = Carry(STEP, self._overlap, zeros=size // 2 + left_pad * STEP)
        self._encoder_state = EncoderState(model.encoder_args, B)
        # The decoder. The ids that go in next are at first the whole prompt, then the last token.
        pads = [tokenizer.get_special_token("[STREAMING_PAD]")] * (left_pad + self._delay)
        self._ids = mx.array([[tokenizer.bos_id, *pads]] * B)  # [B, T]
        self._audio_embeds = mx.zeros((B, 0, model.decoder_args.dim), model.dtype)  # not decoded
        self._scales = model.scales(self._delay)
        self._caches = [KVCache(model.decoder_args, B) for _ in self._scales]
        # Evaluate here: a lazy array belongs to the thread that made it.
        mx.eval(self._scales, self._ids, self._audio_embeds)

    @property
    def text(self) -> str:
        return self.transcripts[0].text

    def feed(self, samples: np.ndarray) -> str:
        """Take the next samples [n] and return the text that they made possible, often none."""
        with self._lock:
            if self.lengths[0] < math.inf:
                raise VoxtralError("the stream is finished")
            return self._run(as_samples(samples)[None])

    def flush(self) -> str:
        """In a pause: push the pending words out with silence, which adds nothing to the times."""
        with self._lock:
            if self._heard == self._flushed:
                return ""  # nothing was said since
            self._flushed = self._heard
            steps = math.ceil(self._fed / STEP) + self._right_pad
            silence = np.zeros((len(self.lengths), steps * STEP - self._fed), np.float32)
            return self._run(silence, silent=True)

    def finish(self) -> str:
        """End the recording and return the rest of its text."""
        with self._lock:
            before = len(self.text)
            self.lengths = [min(length, self._fed) for length in self.lengths]  # a live one ends
            self.flush()
            # The last mel frame lacks 40 samples; the overlap has more.
            self._run(np.zeros((len(self.lengths), self._overlap), np.float32), silent=True)
            for transcript in self.transcripts:
                transcript.close()
            self.ended = [True] * len(self.ended)
            return self.text[before:]

    def _run(self, samples: np.ndarray, silent: bool = False) -> str:
        """The one path: samples [B, n] -> mel frames -> audio embeddings -> tokens -> text."""
        before = len(self.text)
        n = samples.shape[1]
        for end in range(STEP - self._fed % STEP, n + 1, STEP):  # after so many, a step ends
            self._times.append((self._heard + (0 if silent else end)) / SAMPLE_RATE)
        self._heard += 0 if silent else n
        self._fed += n

        self._encode(mx.array(samples))
        self._decode()
        # Evaluate what is kept: the next call may come from another thread.
        state = self._encoder_state
        mx.eval(self._samples.rest, state.conv1.rest, state.conv2.rest, self._audio_embeds)
        return self.text[before:]

    def _encode(self, samples: mx.array) -> None:
        """Samples [B, n] -> audio embeddings of the steps that are complete."""
        x = self._samples(samples)  # [B, steps * STEP + overlap]
        audio_embeds = [self._audio_embeds]
        while steps := x.shape[1] // STEP:
            n = piece_size(steps, self._model, len(x)) * STEP
            mel = self._model.spectrogram.mel_frames(x[:, : n + self._overlap])
            audio_embeds.append(self._model.embed_audio(mel, self._encoder_state))
            mx.async_eval(audio_embeds[-1])  # compute it while the next piece is submitted
            self._progress(self._decoded)  # which may end the work
            x = x[:, n:]
        self._audio_embeds = mx.concatenate(audio_embeds, axis=1)

    def _decode(self) -> None:
        """Generate the tokens that the audio embeddings allow: prefill, then one in each step."""
        unread: Any = None  # the newest ids and probabilities, which the GPU still computes
        while not all(self.ended) and self._ids.shape[1] <= self._audio_embeds.shape[1]:
            T = self._ids.shape[1]  # all of the prompt in the prefill, then 1
            logits = self._model(self._ids, self._audio_embeds[:, :T], self._scales, self._caches)
            self._audio_embeds = self._audio_embeds[:, T:]
            self._ids, probabilities = self._choose(logits.astype(mx.float32))
            mx.async_eval(self._ids, probabilities)
            if unread:
                self._append(*unread)
            unread = self._ids, probabilities
        if unread:
            self._append(*unread)

    def _choose(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Logits [B, vocabulary] -> the next ids and their probabilities, both [B, 1]."""
        if self._temperature > 0:
            ids = mx.random.categorical(logits / self._temperature)[:, None]
        else:
            ids = mx.argmax(logits, axis=-1)[:, None]
        return ids, mx.take_along_axis(mx.softmax(logits, axis=-1), ids, axis=-1)

    def _append(self, ids: mx.array, probabilities: mx.array) -> None:
        """Give each recording its next token."""
        self._decoded = self._times.popleft()
        # Read whole arrays: a slice would be computed behind the step that was just submitted.
        rows: Any = zip(ids.tolist(), probabilities.tolist())  # type: ignore[arg-type]
        for i, ([token], [probability]) in enumerate(rows):
            transcript = self.transcripts[i]
            # How many samples behind the recording's end the step of this token begins. Before it,
            # the end of sequence is a token like any other.
            past = (len(transcript.tokens) + self._delay) * STEP - self.lengths[i]
            if past >= self._right_pad * STEP or (past >= 0 and token == self._eos_id):
                self.ended[i] = True
            if not self.ended[i]:
                until = min(self._decoded, self.lengths[i] / SAMPLE_RATE)
                transcript.append(token, until, round(probability, 4))
        self._progress(self._decoded)


def transcribe_batch(model: Voxtral, tokenizer: Any, recordings: Iterable[np.ndarray], *,
                     delay_ms: float = DELAYS_MS[-1], temperature: float = 0.0,
                     progress: Callable[[float], Any] | None = None) -> list[Transcript]:
    """Transcribe recordings in lockstep: decoding is bound by reading weights, which they share.

    Each is 16 kHz mono samples [n] and ends where it would end alone. Latency does not matter here,
    so the delay is the longest. `progress` is called with the seconds decoded so far, and what it
    raises ends the work.
    """
    samples = [as_samples(recording) for recording in recordings]
    if not samples:
        return []
    lengths = [len(x) for x in samples]
    rows = np.stack([np.pad(x, (0, max(lengths) - len(x))) for x in samples])  # [B, n]
    stream = Stream(model, tokenizer, delay_ms=delay_ms, temperature=temperature,
                    lengths=lengths, progress=progress)
    stream._run(rows)
    stream.finish()
    return stream.transcripts


def transcribe(model: Voxtral, tokenizer: Any, samples: np.ndarray, *,
               delay_ms: float = DELAYS_MS[-1], temperature: float = 0.0,
               progress: Callable[[float], Any] | None = None) -> Transcript:
    """Transcribe one recording; see transcribe_batch."""
    return transcribe_batch(model, tokenizer, [samples], delay_ms=delay_ms,
                            temperature=temperature, progress=progress)[0]


# ------------------------------------------------------------------------------------- checkpoints
# The weights are published in four layouts, which differ in names: Mistral's original, mlx-audio's,
# transformers', and the one that voxmlx converts to ("converted"), whose names our modules have.

PREFIXES = {  # theirs: ours; each is applied to what those before it have made
    # Mistral's original
    "mm_streams_embeddings.embedding_module.": "",
    "mm_whisper_embeddings.": "",
    "whisper_encoder.conv_layers.0.conv.": "encoder.conv1.",
    "whisper_encoder.conv_layers.1.conv.": "encoder.conv2.",
    "whisper_encoder.transformer.": "encoder.",
    "audio_language_projection.0.": "adapter.w_in.",
    "audio_language_projection.2.": "adapter.w_out.",
    "tok_embeddings.": "language_model.embed_tokens.",
    "layers.": "language_model.layers.", "norm.": "language_model.norm.",
    # mlx-audio's
    "encoder.conv_layers_0_conv.conv.": "encoder.conv1.",
    "encoder.conv_layers_1_conv.conv.": "encoder.conv2.",
    "encoder.transformer_": "encoder.",
    "encoder.audio_language_projection_0.": "adapter.w_in.",
    "encoder.audio_language_projection_2.": "adapter.w_out.",
    "decoder.tok_embeddings.": "language_model.embed_tokens.",
    "decoder.": "language_model.",
    # transformers'
    "audio_tower.embedder.": "encoder.",
    "audio_tower.": "encoder.",
    "multi_modal_projector.linear_1.": "adapter.w_in.",
    "multi_modal_projector.linear_2.": "adapter.w_out.",
    "language_model.model.": "language_model.",
}
PARTS = {  # of a layer: ours, and theirs in any layout
    "attention": "self_attn",
    "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
    "attn_norm": "attention_norm self_attn_layer_norm input_layernorm",
    "ffn_norm": "final_layer_norm post_attention_layernorm",
    "mlp.gate_proj": "feed_forward.w1 feed_forward_w1",
    "mlp.down_proj": "feed_forward.w2 feed_forward_w2",
    "mlp.up_proj": "feed_forward.w3 feed_forward_w3",
    "ada_norm": "ada_rms_norm_t_cond ada_rms_norm",
    "ada_norm.linear_in": "ada_norm.0 ada_norm.ada_down ada_norm.linear1",
    "ada_norm.linear_out": "ada_norm.2 ada_norm.ada_up ada_norm.linear2",
}
FIELDS = {  # of transformers' config.json, where they differ from params.json
    "hidden_size": "dim", "intermediate_size": "hidden_dim", "num_key_value_heads": "n_kv_heads",
    "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", "rms_norm_eps": "norm_eps"}


def converted_name(theirs: str) -> str:
    """The name of a tensor in any of the four layouts -> its name in the converted one."""
    name = theirs
    for prefix, ours in PREFIXES.items():
        if name.startswith(prefix):
            name = ours + name.removeprefix(prefix)
    for ours, others in PARTS.items():
        for other in others.split():
            name = name.replace(f".{other}.", f".{ours}.")
    return name


def params_section(theirs: dict) -> dict:
    """A section of transformers' config.json, with the fields of params.json."""
    ours = {FIELDS.get(name, name): value for name, value in theirs.items()}
    return {**ours, "rope_theta": theirs["rope_parameters"]["rope_theta"]}


def read_config(folder: Path) -> dict:
    """The configuration of a checkpoint, in the form of params.json."""
    path = folder / "params.json"
    config = json.loads((path if path.exists() else folder / "config.json").read_bytes())
    if "multimodal" in config:  # Mistral's form, which the converted layout keeps
        return config
    if "encoder_args" in config:  # mlx-audio's
        decoder = config["decoder"]
        audio = config.get("audio_encoding_args")  # or it is one of encoder_args
        encoder = {"audio_encoding_args": audio, **config["encoder_args"]}
        factor = encoder["downsample_factor"]
    elif config["model_type"] == "voxtral_realtime":  # transformers'
        decoder = params_section(config["text_config"])
        decoder["ada_rms_norm_t_cond_dim"] = 32  # transformers hard-codes it
        encoder = params_section(config["audio_config"])
        encoder["audio_encoding_args"] = asdict(Spectrogram())
        factor = config["downsample_factor"]
    else:
        raise ValueError(f"a {config['model_type']} model")
    whisper = {"encoder_args": encoder, "downsample_args": {"downsample_factor": factor}}
    return {**decoder, "multimodal": {"whisper_model_args": whisper}}


def weight_files(folder: Path) -> list[Path]:
    """The files of one set of weights: mistralai's repository has two."""
    for name in ("consolidated.safetensors", "model.safetensors"):
        if (folder / name).exists():
            return [folder / name]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = json.loads(index.read_bytes())["weight_map"].values()
        return [folder / shard for shard in sorted(set(shards))]
    return sorted(folder.glob("model-*-of-*.safetensors"))


def read_weights(folder: Path, model: Voxtral) -> dict[str, mx.array]:
    """All tensors of a checkpoint under their converted names, not yet read."""
    weights: dict[str, mx.array] = {}
    for path in weight_files(folder):
        tensors: Any = mx.load(str(path))
        for theirs, w in tensors.items():
            if re.search(r"\b(output|lm_head)\.\w+$", theirs):  # tied to the embedding
                continue
            name = converted_name(theirs)
            if name in weights:
                raise ValueError(f"{name} comes twice")
            if w.ndim == 3 and w.shape[2] == 3:  # PyTorch's convolutions: [out, in, kernel]
                w = w.swapaxes(1, 2)
            if re.search(r"self_attn\.[qk]_proj", theirs):  # only transformers has these names
                args = model.encoder_args if name.startswith("encoder") else model.decoder_args
                w = interleave_halves(w, args.head_dim)
            weights[name] = w
    return weights


def interleave_halves(w: mx.array, head_dim: int) -> mx.array:
    """Rows of q or k: transformers rotates i and i + head_dim / 2 together, we neighbours."""
    halves = w.reshape(-1, 2, head_dim // 2, *w.shape[1:])
    return halves.swapaxes(1, 2).reshape(w.shape)


def quantisation(path: str, module: Any, weights: dict[str, mx.array]) -> dict | bool:
    """How the weights of a module are quantised, whatever the configuration says; False: not."""
    weight = weights[f"{path}.weight"]
    quantised = f"{path}.scales" in weights
    if not mx.issubdtype(weight.dtype, mx.uint32 if quantised else mx.floating):
        raise ValueError(f"{path}.weight is {weight.dtype}: neither floats nor MLX's quantised")
    if not quantised:
        return False
    inputs = module.weight.shape[-1]
    bits = weight.shape[-1] * 32 // inputs  # packed into words of 32 bits
    group = inputs // weights[f"{path}.scales"].shape[-1]  # each group has a scale
    mode = f"nvfp{bits}" if group == 16 else f"mxfp{bits}"
    if f"{path}.biases" in weights:  # only affine ones have them
        mode = "affine"
    return {"group_size": group, "bits": bits, "mode": mode}


def load_voxtral_model(path_or_id: str | Path = DEFAULT_MODEL_ID, dtype: Any = None, *,
                       lazy: bool = False) -> tuple[Voxtral, Any, dict]:
    """Load a folder in any of the four layouts, or a hub id, which is downloaded.

    `dtype`, an mx.Dtype or its name, is the type to compute in (default: the weights'). `lazy`
    weights are read when they are used. Returns the model, mistral-common's tokenizer and the
    content of params.json. Raises VoxtralError, or RuntimeError without memory.
    """
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    folder = download_weights(str(path_or_id))
    what = "configuration"
    try:
        config = read_config(folder)
        model = Voxtral(config)
        what = "weights"
        weights = read_weights(folder, model)
        nn.quantize(model, class_predicate=lambda path, part: quantisation(path, part, weights))
        model.load_weights(list(weights.items()))  # strict: none missing, unknown or misshapen
        what = "tekken.json"
        tokenizer = Tekkenizer.from_file(folder / what)
        audio: Any = tokenizer.audio
        found = (tokenizer.n_words, audio.sampling_rate, audio.raw_audio_length_per_tok)
        if not audio.is_streaming or found != (config["vocab_size"], SAMPLE_RATE, STEP):
            raise ValueError(f"vocabulary, sampling rate, samples a token: {found}")
    except Exception as error:
        why = textwrap.shorten(f"{type(error).__name__}: {error}".replace(f"{folder}/", ""), 200)
        raise VoxtralError(f"{folder}: its {what}: missing, damaged or not those of Voxtral Mini"
                           f" 4B Realtime ({why})") from error
    if isinstance(dtype, str):
        dtype = getattr(mx, dtype)
    model.set_dtype(dtype or model.dtype)  # or one norm in float32 would make all float32
    if mx.default_device() == mx.cpu:
        lay_out_for_cpu(model)
    if not lazy:
        mx.eval(model.parameters())
    return model, tokenizer, config


def lay_out_for_cpu(model: nn.Module) -> None:
    """Put inputs outermost in memory: so the BLAS of MLX's Linux wheel is twice as fast."""
    for _, module in model.named_modules():
        if type(module) is nn.Linear:
            module.weight = mx.contiguous(module.weight.T).T


def download_weights(model_id: str) -> Path:
    """A folder as it is, or that of a hub repository in the cache; raises VoxtralError."""
    folder = Path(model_id).expanduser()
    if folder.exists():
        return folder
    from huggingface_hub import snapshot_download

    try:  # without a network, snapshot_download takes what it has downloaded before
        folder = Path(snapshot_download(model_id, allow_patterns="*.json"))
        Voxtral(read_config(folder))  # allocates nothing, and refuses what is another model
        for files in ("consolidated.safetensors", "model*.safetensors"):  # mistralai's has both
            folder = Path(snapshot_download(model_id, allow_patterns=["*.json", files]))
            if any(folder.glob(files)):
                break
        return folder
    except Exception as error:
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise VoxtralError(f"{model_id}: no such folder, and no Voxtral Mini 4B Realtime could be"
                           f" downloaded ({why})") from error


# ------------------------------------------------------------------------------------------- audio

# Count samples, as time stamps jump where files were joined; average up to 64 channels; start where
# the picture starts.
FILTER = ("asetpts=STARTPTS+N/SR/TB,pan=mono|c0<" + "+".join(f"c{i}" for i in range(64))
          + ",aresample=16000:async=1:first_pts=0")


def load_audio(path: str | Path, warn: Callable[[str], Any] = warnings.warn) -> np.ndarray:
    """Read the sound of a file as float32 mono samples [n] at 16 kHz, within about -1..1.

    ffmpeg decodes the default track of anything, and `warn` is called with what it complains about;
    without ffmpeg, libsndfile reads wav, flac, ogg, mp3 and more. Raises VoxtralError.
    """
    Path(path)  # raises TypeError for bytes and open files
    if not os.path.isfile(path):
        folder = f"a folder; name its files: {path}/*"
        raise VoxtralError(f"{path}: {folder if os.path.isdir(path) else 'no such file'}")
    samples, says = (decode_by_ffmpeg if shutil.which("ffmpeg") else decode_by_libsndfile)(path)
    if not len(samples):
        raise VoxtralError(f"{path}: no sound ({says or 'empty'})")
    if says:
        warn(f"{path}: {says}")
    return as_samples(samples)


def decode_by_ffmpeg(path: str | Path) -> tuple[np.ndarray, str]:
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", f"file:{path}", "-af", FILTER]
    done = subprocess.run([*command, "-f", "f32le", "-"], capture_output=True, check=False)
    says = done.stderr.decode(errors="replace").replace(f"file:{path}: ", "").partition("\n")[0]
    if done.returncode and not says:
        says = f"ffmpeg was killed, exit code {done.returncode}"
    return np.frombuffer(done.stdout, "<f4", len(done.stdout) // 4).copy(), says


def decode_by_libsndfile(path: str | Path) -> tuple[np.ndarray, str]:
    import soundfile  # type: ignore[import-untyped]
    import soxr  # type: ignore[import-untyped]

    try:
        with open(path, "rb") as file:
            channels, rate = soundfile.read(file, dtype="float32", always_2d=True)  # [n, C]
        return soxr.resample(channels.mean(axis=1), rate, SAMPLE_RATE), ""
    except Exception as error:
        why = getattr(error, "strerror", None) or str(error).rpartition(": ")[2].strip(".")
        raise VoxtralError(f"{path}: {why}; ffmpeg, not installed, may read it") from error


def standard_input(args: Any) -> Iterator[Any]:
    """Raw samples [n], int16, as they come; last, the exception that ended them."""
    if sys.stdin is None or os.isatty(0):
        raise VoxtralError("closed, or a terminal: pipe samples in")
    pieces: Any = queue.SimpleQueue()  # of bytes; at the end None or an exception
    args.listening = pieces  # a signal puts an end behind what has come

    def receive() -> None:  # in a thread, so that a microphone never waits
        try:
            while piece := os.read(0, 1 << 15):
                pieces.put(piece)
            pieces.put(None)
        except OSError as error:
            pieces.put(VoxtralError(error.strerror))

    threading.Thread(target=receive, daemon=True).start()
    data = piece = b""
    unchecked = True
    while isinstance(piece, bytes):
        try:
            piece = pieces.get(timeout=0.1)  # in between, signals are handled
        except queue.Empty:
            continue
        if isinstance(piece, bytes):
            data += piece
            late = not pieces.empty() and len(data) <= 96 * STEP  # with the next up to 64 steps
            if late or (unchecked and len(data) < 4096):
                continue
        if unchecked and not could_be_samples(data[:4096]):
            raise VoxtralError("not raw 16-bit mono 16 kHz samples: name the file, or ffmpeg"
                               " -i INPUT -f s16le -ac 1 -ar 16000 - | python voxtral.py -")
        unchecked = False
        yield np.frombuffer(data, "<i2", len(data) // 2)
        data = data[len(data) // 2 * 2 :]
    if piece:
        yield piece


def could_be_samples(data: bytes) -> bool:
    """Compressed data is noise at full scale, if not padded; loud speech is smoother."""
    x = np.frombuffer(data, "<i2", len(data) // 2).astype(float)
    noise = len(x) > 1 and x.std() > 8000 and np.diff(x).std() > 1.2 * x.std()
    padded = data.startswith((b"RIFF", b"riff", b"fLaC", b"ID3")) or data[4:8] == b"ftyp"
    text = data and not data.translate(None, b"\t\r\n" + bytes(range(32, 127)))
    return not (noise or padded or text)


# --------------------------------------------------------------------------------------- subtitles

PAUSE = 5 / 6  # seconds: a longer one ends a cue, and a cue stays so long if the next one allows
SENTENCE = re.compile(r"[.!?…。！？][\"'”’»)」』]*\s*$")


def wrap(text: str) -> list[str]:
    """Lines of at most 42 columns; Chinese, Japanese and Korean characters take two."""
    wide = re.search("[\u2e80-\ud7ff\uf900-\ufaff\uff01-\uff60]", text)
    return textwrap.wrap(" ".join(text.split()), 21 if wide else 42)


def timestamp(seconds: float) -> str:
    ms = round(1000 * seconds)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}.{ms % 1000:03}"


def subtitles(words: Iterable[Word], kind: str) -> str:
    """The words of a transcript as SubRip ("srt") or WebVTT ("vtt").

    A cue ends at a pause, after a sentence, and within 7 s and two lines of 42 columns.
    """
    if kind not in ("srt", "vtt"):
        raise VoxtralError(f"subtitles are srt or vtt, not {kind}")
    cues: list[list[Word]] = []
    for word in words:
        cue = cues[-1] if cues else []
        text = "".join(other.text for other in cue)
        if (not cue or SENTENCE.search(text) or word.start > cue[-1].end + PAUSE
                or word.end > cue[0].start + 7 or len(wrap(text + word.text)) > 2):
            cues.append([])
        cues[-1].append(word)

    blocks: list[str] = []
    end = 0.0
    for i, cue in enumerate(cues):
        lines = wrap("".join(word.text for word in cue))
        start = max(cue[0].start, end)
        following = cues[i + 1][0].start if i + 1 < len(cues) else math.inf
        # The last words may take no time, but a cue does.
        end = max(cue[-1].end, min(start + PAUSE, following), start + 0.05 * len(lines))
        for j in range(0, len(lines), 2):  # several cues for a very long word
            a, b = (timestamp(start + (end - start) * min(1, k / len(lines))) for k in (j, j + 2))
            times = f"{a} --> {b}"
            body = "\n".join(lines[j : j + 2])
            if kind == "vtt":
                blocks.append(f"{times}\n{html.escape(body, quote=False)}\n\n")
            else:
                blocks.append(f"{len(blocks) + 1}\n{times.replace('.', ',')}\n{body}\n\n")
    return ("" if kind == "srt" else "WEBVTT\n\n") + "".join(blocks)


# ------------------------------------------------------------------------------------ command line


def complain(why: Any, name: str = "") -> int:
    """Say in one line what is wrong, and with what."""
    why = str(getattr(why, "strerror", None) or why) or type(why).__name__
    why = why if why.startswith(name) else f"{name}: {why}"
    tqdm.write(f"voxtral.py: {' '.join(why.split())}", file=sys.stderr)
    return 1


def run(args: Any) -> int:
    """Transcribe each recording; returns the exit code."""
    if not any(name == "-" or os.path.exists(name) for name in args.audio):
        raise VoxtralError("no such file: " + ", ".join(args.audio))
    world = mx.distributed.init()  # under mlx.launch each process takes its share
    if world.size() > 1 and not args.output_dir:
        raise VoxtralError("several processes need --output-dir")
    os.makedirs(args.output_dir or ".", exist_ok=True)
    model, tokenizer, _ = load_voxtral_model(args.model, args.dtype)
    mac = mx.metal.is_available()
    if mac:  # keep the weights in memory, as mlx-lm does
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    code = 0
    for name in args.audio[world.rank() :: world.size()]:
        try:
            if name == "-":
                follow(args, name, standard_input(args), model, tokenizer)
            else:
                transcribe_file(args, name, model, tokenizer)
        except (VoxtralError, RuntimeError, MemoryError) as error:  # the others go on
            code = complain(error, "standard input" if name == "-" else name)
        args.listening = None
        if mac:
            mx.clear_cache()
    return code


def transcribe_file(args: Any, name: str, model: Voxtral, tokenizer: Any) -> None:
    samples = load_audio(name, complain)
    pieces = cut_at_pauses(samples, args.batch)
    # Text on a terminal is progress enough. None: no bar in a log.
    hidden = args.quiet or (args.grows and len(pieces) == 1 and sys.stdout.isatty()) or None
    progress = partial(tqdm, desc=os.path.basename(name), disable=hidden,
                       bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed}<{remaining}")
    if len(pieces) == 1:
        source = np.split(samples, range(64 * STEP, len(samples), 64 * STEP))
        return follow(args, name, progress(source), model, tokenizer)
    try:
        with progress(total=max(map(len, pieces)) / SAMPLE_RATE) as bar:
            parts = transcribe_batch(model, tokenizer, pieces, **args.settings,
                                     progress=lambda seconds: bar.update(seconds - bar.n))
    except (RuntimeError, MemoryError) as error:
        raise VoxtralError(f"{error}; a smaller --batch needs less memory") from error
    whole = Transcript(tokenizer)
    end = 0.0
    for piece, part in zip(pieces, parts):
        start = end
        end += len(piece) / SAMPLE_RATE
        whole.extend(part, start, end)
    write(args, name, whole, end)


def cut_at_pauses(samples: np.ndarray, n: int) -> list[np.ndarray]:
    """Cut a recording into at most n pieces of 30 s or more, about equal, where it is quiet."""
    n = min(n, len(samples) // (40 * SAMPLE_RATE))
    if n < 2:
        return [samples]
    power = np.square(samples[: len(samples) // STEP * STEP]).reshape(-1, STEP).mean(axis=1)
    loudness = np.convolve(power, np.ones(4), "same")  # over 0.3 s
    evens = [len(power) * k // n for k in range(1, n)]
    cuts = [even - 60 + int(np.argmin(loudness[even - 60 : even + 60])) for even in evens]
    return np.split(samples, [cut * STEP for cut in cuts])


def follow(args: Any, name: str, source: Iterable, model: Voxtral, tokenizer: Any) -> None:
    """Transcribe samples as they come."""
    stream = Stream(model, tokenizer, **args.settings)
    heard = 0
    failure = None
    try:
        for samples in source:
            if isinstance(samples, BaseException):
                failure = samples
                break
            heard += len(samples)
            text = stream.feed(samples)
            if args.grows:
                print(text, end="", flush=True)
        text = stream.finish()
    except BaseException:
        if args.grows and stream.text:
            print()  # the prompt gets its own line
        raise
    if not heard:
        raise failure or VoxtralError("no sound came")
    if args.grows:
        print(text, flush=True)
    else:
        write(args, name, stream.transcripts[0], heard / SAMPLE_RATE)
    if failure:
        raise failure


def write(args: Any, name: str, transcript: Transcript, seconds: float) -> None:
    if args.format == "text":
        text = transcript.text + "\n"
    elif args.format == "json":
        record = {"file": name, "model": args.model, "delay_ms": args.delay_ms, "duration": seconds,
                  "text": transcript.text, "tokens": transcript.tokens,
                  "words": [asdict(word) for word in transcript.words]}
        text = json.dumps(record, ensure_ascii=False) + "\n"
    else:
        text = subtitles(transcript.words, args.format)
    if not args.output_dir:
        print(text, end="", flush=True)
        return
    path = args.paths[name]
    part = path.with_suffix(".part")  # until it is complete
    try:
        part.write_text(text, "utf-8", "backslashreplace")
        part.replace(path)
    except OSError as error:
        raise VoxtralError(f"{path}: {error.strerror}") from error
    finally:
        if os.path.exists(part):
            part.unlink()


def parse_args(argv: list[str] | None) -> Any:
    parser = argparse.ArgumentParser("voxtral.py", description="Speech to text.")
    add = parser.add_argument
    add("audio", nargs="+", help="files, or -: raw 16-bit mono 16 kHz samples, live")
    add("--model", default=DEFAULT_MODEL_ID, help="folder or hub id; default: %(default)s")
    add("--delay", dest="delay_ms", type=int, metavar="MS", choices=DELAYS_MS,
        help="80 to 1200 in steps of 80, or 2400; default: 480 with -, else 2400")
    add("--format", choices=("text", "srt", "vtt", "json"), default="text", help="default: text")
    add("--output-dir", metavar="DIR", help="write DIR/NAME.txt, ... for each recording")
    add("--batch", type=int, metavar="N", default=1, help="cut a recording into N pieces at most")
    add("--temperature", type=float, default=0.0, help="default: 0, greedy")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="compute in this type")
    add("--quiet", action="store_true", help="no progress")
    args = parser.parse_args(argv)
    if not 1 <= args.batch <= 1024 or not 0 <= args.temperature < math.inf:
        parser.error("--batch is 1 to 1024, --temperature 0 or more")
    args.audio = list(dict.fromkeys(args.audio))  # each once
    if len(args.audio) > 1 and args.format in ("srt", "vtt") and not args.output_dir:
        parser.error(f"several files as {args.format} need --output-dir")
    kind = args.format.replace("text", "txt")
    stems = {name: "stdin" if name == "-" else Path(name).stem for name in args.audio}
    args.paths = {name: Path(args.output_dir or ".", f"{stems[name]}.{kind}") for name in stems}
    if args.output_dir and len({stem.casefold() for stem in stems.values()}) < len(stems):
        parser.error("two recordings would be written to files of one name")
    args.delay_ms = args.delay_ms or (480 if "-" in args.audio else DELAYS_MS[-1])
    args.settings = {"delay_ms": args.delay_ms, "temperature": args.temperature}
    args.grows = args.format == "text" and not args.output_dir  # as it is decoded
    args.listening = None  # see standard_input; False after a signal
    return args


def prepare_process(args: Any) -> None:
    """What only a program may change: standard streams and signals."""
    if sys.stdin is None:  # MLX cannot read from descriptor 0
        os.open(os.devnull, os.O_RDONLY)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore

    def handle(number: int, _: Any) -> None:
        listening, args.listening = args.listening, False
        if listening:
            listening.put(KeyboardInterrupt())
        elif number == signal.SIGINT or listening is None:  # SIGTERM may come twice
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)


def main(argv: list[str] | None = None) -> int:
    """The command line; without `argv` as a program."""
    args = parse_args(argv)
    if argv is None:
        prepare_process(args)
    if sys.stdout is None and not args.output_dir:
        return complain("standard output is closed")
    try:
        return run(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit
        return complain("standard output was closed")
    except OSError as error:
        return complain(error, error.filename or "standard output")
    except (VoxtralError, RuntimeError, MemoryError) as error:
        return complain(error)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
