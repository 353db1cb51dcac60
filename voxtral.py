#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   'mlx>=0.32.0; sys_platform == "darwin" or sys_platform == "win32"',
#   'mlx[cpu]>=0.32.0; sys_platform == "linux"',
#   'mlx-cpu>=0.32.0; sys_platform == "win32"',
#   'huggingface_hub>=1.0',
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

Whisper takes 30 s at a time: an encoder that looks both ways over all of it, then a decoder that
writes as many tokens as it likes and finds its place by cross-attention. Voxtral Realtime differs
in three ways, and each makes it a stream:

  causal    No layer looks ahead, and attention looks back over a window: 750 encoder frames (15
            s), 8192 steps (11 min) in the decoder. So what was computed stays valid whatever is
            said next, and memory does not grow.
  added     There is no cross-attention. The decoder's input at each position is the embedding of
            the last token *plus* that of 80 ms of sound, and its output exactly one token: mostly
            [STREAMING_PAD], nothing to say yet; or [STREAMING_WORD], a word is over, and then that
            word's tokens, one per step. The line that adds them is in `Voxtral.__call__`.
  delayed   The text runs some steps behind the sound: with a longer delay the model hears more
            before it writes, errs less and answers later. One set of weights serves delays from
            80 ms to 2.4 s; a small network turns the delay into a scale inside each decoder layer.

So a file is a stream that arrives at once, and all sound takes one path, `Stream._run`, live or
whole, one recording or several in lockstep. Words that have one meaning in this file:

  mel frame       one column of the spectrogram, 10 ms
  encoder frame   20 ms
  step            80 ms: 1,280 samples, 8 mel frames, 4 encoder frames, 1 audio embedding, 1 token
  delay           how many steps the text runs behind the sound; `delay_ms` is the same in ms
  window          the positions that attention sees: the newest `sliding_window`
  token           an id of the vocabulary, never a duration
  sound           in the code of model and stream: audio embeddings
  recording       what a user hands over; B of them can run in lockstep

Letters in shapes: B recordings, F mel frames, T new positions, D dim, C channels. Sources: arXiv
2602.11298 (the report), 2509.08753 (delayed streams), the model's params.json, mistral-common.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import html
import json
import math
import os
import queue
import re
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from tqdm import tqdm  # type: ignore[import-untyped]

# mistral-common and huggingface_hub are slow to import, so this waits until they are needed.
DEFAULT_MODEL_ID = "mlx-community/Voxtral-Mini-4B-Realtime-6bit"
SAMPLE_RATE = 16_000  # load_voxtral_model checks that model and tokenizer say so too
STEP = 1280  # samples, 80 ms; likewise
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

    num_mel_bins: int = 128  # bands up to half the sampling rate, evenly spaced on Slaney's scale
    hop_length: int = 160  # samples: 10 ms
    window_size: int = 400  # samples of a mel frame: 25 ms
    global_log_mel_max: float = 1.5  # log10 of the greatest power to expect

    def mel_frames(self, samples: mx.array) -> mx.array:
        """Samples [B, 160 F + 240] -> the log-mel of their F mel frames [B, F, 128], float32."""
        from mistral_common.audio import mel_filter_bank

        bins = self.window_size // 2 + 1  # frequencies of a Fourier transform: 201
        bank = mel_filter_bank(bins, self.num_mel_bins, 0, SAMPLE_RATE / 2, SAMPLE_RATE)  # cached
        hann = np.hanning(self.window_size + 1)[:-1]  # periodic, like torch.stft's
        B, n = samples.shape
        F = (n - self.window_size) // self.hop_length + 1
        x = mx.as_strided(samples, (B, F, self.window_size), (n, self.hop_length, 1))
        power = mx.square(mx.abs(mx.fft.rfft(x * mx.array(hann, mx.float32))))  # [B, F, bins]
        mel = power @ mx.array(bank, mx.float32)  # [B, F, num_mel_bins]
        # Whisper clips at 80 dB, 8 in log10, below the loudest mel frame of the recording. A stream
        # cannot know how loud the rest will be, so a constant takes its place.
        log = mx.maximum(mx.log10(mx.maximum(mel, 1e-10)), self.global_log_mel_max - 8)
        return (log + 4) / 4  # Whisper's scaling, to about -1..1


def log_mel_spectrogram(samples: np.ndarray, spectrogram: Spectrogram = Spectrogram()) -> mx.array:
    """A whole signal [n] at 16 kHz -> log-mel [n // 160, 128]. For comparisons, not for Stream."""
    frames = len(samples) // spectrogram.hop_length
    size = (1 << frames.bit_length()) * spectrogram.hop_length  # few shapes, see Voxtral.pieces
    half = spectrogram.window_size // 2
    padded = np.pad(np.asarray(samples, np.float32), (half, size - len(samples) + half))
    return spectrogram.mel_frames(mx.array(padded[None]))[0, :frames]


@dataclass
class Carry:
    """What a kernel that moves along a signal still needs of the signal's past.

    After n moves the kernel stands at input n * stride, so everything from there on is kept.
    Example with kernel 3, stride 2 and inputs x0 x1 x2 x3: the kernel has seen x0-x2 and stands
    at x2, so x2 and x3 are kept until x4 arrives.
    """

    kernel: int  # inputs that it covers
    stride: int  # by how many it moves, at most `kernel`
    zeros: int  # in front of the signal; kernel - stride of them make it causal
    rest: Any = None  # [B, n, ...]

    def __call__(self, x: mx.array) -> mx.array:
        """The next inputs [B, n, ...] -> the inputs [B, m, ...] that the kernel can move over."""
        if self.rest is None:
            self.rest = mx.zeros((len(x), self.zeros, *x.shape[2:]), x.dtype)
        x = mx.concatenate([self.rest, x], axis=1)
        moves = max(0, (x.shape[1] - self.kernel) // self.stride + 1)
        self.rest = x[:, moves * self.stride :]
        return x[:, : (moves - 1) * self.stride + self.kernel if moves else 0]


# --------------------------------------------------------------------------------------- attention
# What encoder and decoder share. Activations are rows [B * T, D], row b * T + t: one product for
# each Linear. Only attention and the convolutions need [B, T, ...].


@dataclass(frozen=True)
class TransformerArgs:
    """The sizes of a transformer, from one section of params.json."""

    dim: int  # of the vector at a position
    n_layers: int
    n_heads: int  # of queries
    n_kv_heads: int  # of keys and values; each serves n_heads / n_kv_heads heads of queries
    head_dim: int  # of a query, key or value; n_heads * head_dim need not be dim
    hidden_dim: int  # inside the feed-forward network
    sliding_window: int  # positions that attention sees, its own included
    rope_theta: float  # base of the rotary frequencies
    norm_eps: float  # added to the mean square before the root


@lru_cache(maxsize=4)  # all layers ask for the same mask
def window_mask(start: int, T: int, size: int, window: int, dtype: mx.Dtype) -> mx.array:
    """Mask [T, size] for queries at positions start, start + 1, ... and `size` keys from 0 on.

    Query i sees keys i - window + 1 .. i. Added to the scores, as all fused kernels of MLX take it.
    """
    back = np.arange(start, start + T)[:, None] - np.arange(size)  # from query to key
    return mx.array(np.where((back >= 0) & (back < window), 0, mx.finfo(dtype).min), dtype)


class KVCache:
    """Rotated keys, and values, of the positions that B recordings can still see.

    They are appended to a buffer in place. A full buffer is replaced by one that begins with the
    last `window - 1` entries. A position is an index into the buffer, so kept keys are rotated
    anew: attention depends on distances alone, and small angles stay exact after days. Sizes are
    few and odd, 255, 511, ...: MLX 0.32 on CUDA plans each, and errs in views of even buffers.
    """

    def __init__(self, args: TransformerArgs, batch: int = 1):
        self.batch = batch
        self.window = args.sliding_window
        self.length = 0  # entries in the buffers
        self.keys: Any = None  # [B, n_kv_heads, size, head_dim] after an update
        self.values: Any = None
        self.rope = partial(mx.fast.rope, dims=args.head_dim, base=args.rope_theta, scale=1.0,
                            traditional=True)  # rotates neighbours of a head, not its halves

    def update(self, q: mx.array, k: mx.array, v: mx.array) -> tuple:
        """Append T positions [B, heads, T, head_dim] -> rotated q, keys, values, mask [T, size]."""
        T = k.shape[2]
        if self.keys is None:
            self.keys, self.values = k[:, :, :0], v[:, :, :0]
        if self.length + T > self.keys.shape[2]:
            self.renew(T)
        start = self.length
        self.length += T
        self.keys[:, :, start : self.length] = self.rope(k, offset=start)
        self.values[:, :, start : self.length] = v
        q = self.rope(q, offset=start)
        if T > 1:  # the mask hides the unused end of the buffer like any future
            mask = window_mask(start, T, self.keys.shape[2], self.window, q.dtype)
            return q, self.keys, self.values, mask
        seen = slice(max(0, self.length - self.window), self.length)  # all that one may see
        return q, self.keys[:, :, seen], self.values[:, :, seen], None

    def renew(self, T: int) -> None:
        """Move what the next position can see to buffers with room for T more."""
        first = max(0, self.length - self.window + 1)
        keys, values = (x[:, :, first : self.length] for x in (self.keys, self.values))
        need = self.length - first + T
        if first:  # undo the rotation, and rotate by the new positions
            keys = self.rope(self.rope(keys.astype(mx.float32), offset=first, scale=-1.0), offset=0)
            need += self.window // 4  # or each step would renew
        size = min((1 << max(8, need.bit_length())) - 1, self.window - 1 + max(self.window, T) | 1)
        self.length -= first
        room = [(0, 0), (0, 0), (0, size - self.length), (0, 0)]
        self.keys, self.values = mx.pad(keys.astype(values.dtype), room), mx.pad(values, room)
        if self.length and self.batch > 1:  # free the old ones before the next layer's are made
            mx.eval(self.keys, self.values)


class Attention(nn.Module):
    """Self-attention over a sliding window; grouped queries where n_kv_heads < n_heads."""

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


class AdaNorm(nn.Module):
    """Tells a decoder layer the delay: what its ffn_norm puts out is scaled by 1 + ada(t)."""

    def __init__(self, dim: int, inner_dim: int):
        super().__init__()
        self.linear_in = nn.Linear(dim, inner_dim, bias=False)
        self.linear_out = nn.Linear(inner_dim, dim, bias=False)

    def __call__(self, t: mx.array) -> mx.array:
        """The delay's embedding t [1, D] -> ada(t) [1, D]."""
        return self.linear_out(nn.gelu(self.linear_in(t)))


class Block(nn.Module):
    """A pre-norm transformer layer: the encoder's have biases, the decoder's an AdaNorm."""

    def __init__(self, args: TransformerArgs, bias: bool = False, ada_dim: int = 0):
        super().__init__()
        if ada_dim:
            self.ada_norm = AdaNorm(args.dim, ada_dim)
        self.attn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args, bias)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.mlp = SwiGLU(args, bias)

    def __call__(self, x: mx.array, cache: KVCache, scale: mx.array | None = None) -> mx.array:
        """Rows [B * T, D] -> rows; `scale` [1, D], the decoder's, is 1 + ada(t): Voxtral.scales."""
        x = x + self.attention(self.attn_norm(x), cache)
        h = self.ffn_norm(x) if scale is None else self.ffn_norm(x) * scale
        return x + self.mlp(h)


# ------------------------------------------------------------------------ encoder, adapter, decoder


class EncoderState:
    """What the encoder remembers of B recordings between two pieces of sound."""

    def __init__(self, args: TransformerArgs, batch: int = 1):
        self.conv1 = Carry(kernel=3, stride=1, zeros=2)
        self.conv2 = Carry(kernel=3, stride=2, zeros=1)
        self.caches = [KVCache(args, batch) for _ in range(args.n_layers)]


class Encoder(nn.Module):
    """Two convolutions as in Whisper, but causal; then layers like the decoder's, with a window."""

    def __init__(self, args: TransformerArgs, num_mel_bins: int):
        super().__init__()
        self.conv1 = nn.Conv1d(num_mel_bins, args.dim, kernel_size=3)
        self.conv2 = nn.Conv1d(args.dim, args.dim, kernel_size=3, stride=2)
        self.layers = [Block(args, bias=True) for _ in range(args.n_layers)]
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)

    def __call__(self, mel: mx.array, state: EncoderState) -> mx.array:
        """The next mel frames [B, F, C], F even -> encoder frames as rows [B * F / 2, D]."""
        x = mel.astype(self.conv1.weight.dtype)
        x = nn.gelu(self.conv1(state.conv1(x)))  # [B, F, D]
        x = nn.gelu(self.conv2(state.conv2(x)))  # [B, F / 2, D]
        x = x.reshape(-1, x.shape[2])
        for layer, cache in zip(self.layers, state.caches):
            x = layer(x, cache)
        return self.norm(x)


class Adapter(nn.Module):
    """Encoder frames, `factor` of them side by side, to the space of the decoder."""

    def __init__(self, encoder_dim: int, dim: int, factor: int):
        super().__init__()
        self.group = factor * encoder_dim
        self.w_in = nn.Linear(self.group, dim, bias=False)
        self.w_out = nn.Linear(dim, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Rows [N, D of the encoder] -> rows [N / factor, D of the decoder]."""
        return self.w_out(nn.gelu(self.w_in(x.reshape(-1, self.group))))


class Decoder(nn.Module):
    """Holds the weights of the language model; its forward pass is Voxtral.__call__."""

    def __init__(self, args: TransformerArgs, vocab_size: int, ada_dim: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, args.dim)
        self.layers = [Block(args, ada_dim=ada_dim) for _ in range(args.n_layers)]
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)


def read_args(cls: Any, config: dict) -> Any:
    """A dataclass of sizes, from entries of the same names; its annotations are strings."""
    return cls(**{f.name: (int if f.type == "int" else float)(config[f.name]) for f in fields(cls)})


class Voxtral(nn.Module):
    """The whole model. `config` is the content of params.json."""

    def __init__(self, config: dict):
        super().__init__()
        whisper = config["multimodal"]["whisper_model_args"]
        audio = whisper["encoder_args"]
        audio = {"n_kv_heads": audio["n_heads"], **audio}  # params.json may leave it out
        factor = whisper["downsample_args"]["downsample_factor"]  # encoder frames of a step: 4
        self.step_mel_frames = 2 * factor  # mel frames of a step: 8
        self.spectrogram = read_args(Spectrogram, audio["audio_encoding_args"])
        assert self.spectrogram.hop_length * self.step_mel_frames == STEP
        self.encoder_args = read_args(TransformerArgs, audio)
        self.decoder_args = read_args(TransformerArgs, config)
        self.encoder = Encoder(self.encoder_args, self.spectrogram.num_mel_bins)
        self.adapter = Adapter(self.encoder_args.dim, self.decoder_args.dim, factor)
        self.language_model = Decoder(
            self.decoder_args, config["vocab_size"], config["ada_rms_norm_t_cond_dim"])

    def __call__(self, ids: mx.array, sound: mx.array, scales: list, caches: list) -> mx.array:
        """Token ids [B, T], audio embeddings [B, T, D] -> logits [B, vocabulary] of the next token.

        Each decoder layer has a scale [1, D], for the delay, and a cache of the positions before.
        """
        decoder = self.language_model
        x = decoder.embed_tokens(ids) + sound  # [B, T, D]: this is how the model listens
        x = x.reshape(-1, x.shape[2])  # rows [B * T, D]
        for layer, scale, cache in zip(decoder.layers, scales, caches):
            x = layer(x, cache, scale)
        last = decoder.norm(x.reshape(*ids.shape, -1)[:, -1])  # [B, D]
        return decoder.embed_tokens.as_linear(last)  # tied: the embedding makes the logits too

    def scales(self, delay: int) -> list[mx.array]:
        """1 + ada(t) [1, D] of each decoder layer; t is a sinusoidal embedding of `delay` steps."""
        half = self.decoder_args.dim // 2
        angles = delay * mx.exp(-math.log(10000.0) * mx.arange(half) / half)  # [D / 2]
        t = mx.concatenate([mx.cos(angles), mx.sin(angles)])[None]  # [1, D]
        t = t.astype(self.encoder.conv1.weight.dtype)
        return [1 + layer.ada_norm(t) for layer in self.language_model.layers]

    def pieces(self, steps: int, batch: int) -> Iterator[tuple[int, int]]:
        """Split `steps` into pieces for the encoder: yields the begin and the end of each.

        The largest is two windows of attention on a GPU, one on a CPU, shared by B recordings: more
        takes more memory and time. The rest goes in powers of two: MLX on CUDA plans each shape.
        """
        windows = 2 if mx.default_device() == mx.gpu else 1
        frames = windows * self.encoder_args.sliding_window // batch
        most = max(16, 2 * frames // self.step_mel_frames)  # an encoder frame is two mel frames
        end = 0
        while left := steps - end:
            start = end
            end += most if left >= most else 1 << left.bit_length() - 1
            yield start, end

    def embed_audio(self, mel: mx.array, state: EncoderState) -> mx.array:
        """The next mel frames [B, F, C], F a multiple of 8 -> audio embeddings [B, F / 8, D]."""
        assert mel.shape[1] % self.step_mel_frames == 0, f"{mel.shape[1]} mel frames: no steps"
        x = self.adapter(self.encoder(mel, state))  # rows [B * F / 8, D]
        mx.async_eval(x)  # compute it while the next piece is submitted
        return x.reshape(len(mel), -1, x.shape[1])

    def encode(self, mel: mx.array) -> mx.array:
        """Log-mel of a whole signal [F, C] -> all its audio embeddings [F // 8, D]."""
        n = self.step_mel_frames
        state = EncoderState(self.encoder_args)
        sound = [mx.zeros((0, self.decoder_args.dim), self.encoder.conv1.weight.dtype)]
        for start, end in self.pieces(len(mel) // n, batch=1):
            sound.append(self.embed_audio(mel[None, start * n : end * n], state)[0])
        return mx.concatenate(sound)


# ------------------------------------------------------------------------------------------ stream
# The schedule. Before the recording the model hears 32 steps of silence, as it did in training, and
# its text runs `delay` steps behind the sound. Its first tokens are not decoded but given: BOS and
# 32 + delay times [STREAMING_PAD]. The decoder reads this prompt in one pass, the prefill, together
# with the silence and the first delay + 1 steps of the recording; the last position gives token 0.
# From there on, each step decodes one token. An end-of-sequence token ends nothing until the
# recording is over; then delay + 11 steps of silence draw out the words still to come.
#
# An example: a clip begins with "seven", said from 0.25 to 0.50 s. The delay is 160 ms, two steps:
#
#     step     0    1    2    3    4    5    6    7    8    9   10   11   12
#     sound    .    .    .   se  -ve   -e   -n    .    .    .    .    .   ni
#     token              .    .    .    .    .    .   [W]  " se" "v" "en"  .
#     k                  0    1    2    3    4    5    6    7    8    9   10
#     text                                                  se  sev  seven
#
# [W] is [STREAMING_WORD], a word is over; a dot is [STREAMING_PAD], nothing to say. Token k comes
# with step k + delay, and speaks about the first k + 1 steps: the word that [W] at k opens ended
# after (k + 1) * 80 ms of sound. Here that is 560 ms, the end of step 6.

WORD_SECONDS = 0.4  # what a word is taken to last: the model marks only its end


@dataclass(frozen=True)
class Word:
    """What one [STREAMING_WORD] opened, mostly one word; joined, the texts are the transcript."""

    text: str  # with its leading space; the first word has none
    start: float  # seconds: the end of the word before, but at most WORD_SECONDS before `end`
    end: float  # seconds: of the last step that its mark speaks about, or of the recording


class Transcript:
    """What was said: tokens to text and words. It needs no model."""

    def __init__(self, tokenizer: Any):
        self.text = ""
        self.tokens: list[int] = []  # generated, one per step
        self.words: list[Word] = []
        self.until = 0.0  # seconds of the recording that the tokens so far speak about
        self._tokenizer = tokenizer
        self._word_id = tokenizer.get_special_token("[STREAMING_WORD]")
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # keeps half a character
        self._word_end: float | None = None  # of a word whose text has not begun, in seconds

    def append(self, token: int, until: float) -> None:
        """Take the next token, which speaks of the recording up to `until` seconds."""
        self.tokens.append(token)
        self.until = until
        if token == self._word_id:
            self._word_end = until
        else:  # special tokens have no bytes; a character may come in several tokens
            self._write(self._utf8.decode(self._tokenizer.id_to_byte_piece(token)))

    def extend(self, other: Transcript, start: float, end: float) -> None:
        """Take the transcript of a piece of the recording from `start` to `end` seconds."""
        for k, token in enumerate(other.tokens):
            self.append(token, min(start + (k + 1) * STEP / SAMPLE_RATE, end))
        self.close()

    def close(self) -> None:
        """No more tokens: half a character becomes U+FFFD."""
        self._write(self._utf8.decode(b"", final=True))
        self.until = math.inf

    def _write(self, text: str) -> None:
        """Append text to the word that was opened, else to the last word."""
        text = text if self.text else text.lstrip()
        if not text:
            return
        if self._word_end is not None or not self.words:
            end = self.until if self._word_end is None else self._word_end
            start = max(self.words[-1].end if self.words else 0.0, end - WORD_SECONDS)
            self.words.append(Word("", round(start, 3), round(end, 3)))
            self._word_end = None
        self.words[-1] = replace(self.words[-1], text=self.words[-1].text + text)
        self.text += text


class Stream:
    """Speech to text while the speech comes: `feed` samples, in a pause `flush`, then `finish`.

    `delay_ms`, one of DELAYS_MS, is how long the model listens on before it commits itself
    (default: tekken.json's, 480). `temperature` 0 takes the likeliest token. `text`, `words` and
    `tokens` grow with the recording. One call at a time, from any thread. Raises VoxtralError for
    other delays and for what as_samples refuses. `lengths`: for transcribe, of its recordings.
    """

    def __init__(self, model: Voxtral, tokenizer: Any, *, delay_ms: float | None = None,
                 temperature: float = 0.0, lengths: Iterable[float] = (math.inf,)):
        if delay_ms is not None and delay_ms not in DELAYS_MS:
            raise VoxtralError(f"delay_ms is {delay_ms}, not a multiple of 80 up to 1200, or 2400")
        self.lengths = list(lengths)  # of each recording, in samples; infinite while it goes on
        self.transcripts = [Transcript(tokenizer) for _ in self.lengths]
        self.ended = [length == 0 for length in self.lengths]  # no sound has no words
        audio = tokenizer.audio
        self._delay = audio.get_num_delay_tokens(delay_ms)  # steps
        self._left_pad = audio.n_left_pad_tokens  # steps of silence: 32
        self._right_pad = audio.n_right_pad_tokens(delay_ms)  # delay + 1 + 10
        self._eos_id = tokenizer.eos_id
        self._temperature = temperature
        self._model = model
        B = len(self.lengths)
        # The decoder: the ids that go in next are at first the whole prompt, then the last token.
        self._scales = model.scales(self._delay)
        self._caches = [KVCache(model.decoder_args, B) for _ in self._scales]
        pads = [tokenizer.get_special_token("[STREAMING_PAD]")] * (self._left_pad + self._delay)
        self._ids = mx.array([[tokenizer.bos_id, *pads]] * B)  # [B, T]
        # The encoder. Mel frames are centred: those of a step reach 200 samples back, 40 ahead.
        front = model.spectrogram
        self._overlap = front.window_size - front.hop_length
        self._samples = Carry(STEP + self._overlap, STEP,
                              zeros=front.window_size // 2 + self._left_pad * STEP)
        self._encoder_state = EncoderState(model.encoder_args, B)
        # Embeddings that wait for the decoder; and of the tokens to come, `until` in seconds.
        self._sound = mx.zeros((B, 0, model.decoder_args.dim), model.encoder.conv1.weight.dtype)
        self._times: deque[float] = deque()
        # Two clocks, for flush: the silence that it puts in makes steps, but it takes no time.
        self._fed = 0  # samples, with the silence that flush puts in
        self._heard = 0  # samples of the recording
        self._flushed = 0  # samples of the recording at the last flush
        # MLX evaluates a lazy array on its own thread only, and the next call may be on another.
        mx.eval(self._scales, self._ids, self._sound)

    text = property(lambda self: self.transcripts[0].text)
    tokens = property(lambda self: self.transcripts[0].tokens)
    words = property(lambda self: self.transcripts[0].words)

    def feed(self, samples: np.ndarray) -> str:
        """Take the next samples [n] and return the text that they made possible, often none."""
        if self.lengths[0] < math.inf:
            raise VoxtralError("the stream is finished")
        return self._run(as_samples(samples)[None])

    def flush(self) -> str:
        """In a pause: push the pending words out with silence, which adds nothing to the times."""
        if self._heard == self._flushed:
            return ""  # nothing was said since
        self._flushed = self._heard
        steps = math.ceil(self._fed / STEP) + self._right_pad
        silence = np.zeros((len(self.lengths), steps * STEP - self._fed), np.float32)
        return self._run(silence, silent=True)

    def finish(self) -> str:
        """End the recording and return the rest of its text."""
        before = len(self.text)
        self.lengths = [min(length, self._fed) for length in self.lengths]  # a live one ends here
        self.flush()
        half = self._model.spectrogram.window_size // 2  # the last mel frame still lacks samples
        self._run(np.zeros((len(self.lengths), half), np.float32), silent=True)
        for transcript in self.transcripts:
            transcript.close()
        self.ended = [True] * len(self.ended)
        return self.text[before:]

    def _run(self, samples: np.ndarray, silent: bool = False) -> str:
        """The one path: samples [B, n] -> mel frames -> audio embeddings -> tokens -> text."""
        before = len(self.text)
        n = samples.shape[1]
        for end in range(STEP - self._fed % STEP, n + 1, STEP):
            self._times.append((self._heard + (0 if silent else end)) / SAMPLE_RATE)
        self._heard += 0 if silent else n
        self._fed += n
        x = self._samples(mx.array(samples))  # of the steps that are complete
        sound = [self._sound]
        for start, end in self._model.pieces(x.shape[1] // STEP, len(x)):
            piece = x[:, start * STEP : end * STEP + self._overlap]
            mel = self._model.spectrogram.mel_frames(piece)
            sound.append(self._model.embed_audio(mel, self._encoder_state))
        self._sound = mx.concatenate(sound, axis=1)
        self._decode()
        state = self._encoder_state  # evaluate all that is kept, for the same reason as in __init__
        mx.eval(self._samples.rest, state.conv1.rest, state.conv2.rest, self._sound)
        return self.text[before:]

    def _decode(self) -> None:
        """Generate the tokens that the sound [B, n, D] allows: prefill, then one in each step."""
        start = 0
        end = self._ids.shape[1]  # the prompt takes as many steps as it has tokens; later it is one
        while not all(self.ended) and end <= self._sound.shape[1]:
            last = self._ids  # one token behind: read `last` while the GPU computes the next one
            logits = self._model(last, self._sound[:, start:end], self._scales, self._caches)
            if self._temperature > 0:
                token = mx.random.categorical(logits / self._temperature)
            else:
                token = mx.argmax(logits, axis=-1)  # [B]
            self._ids = token[:, None]
            mx.async_eval(self._ids)
            if start:  # else it is the prompt, or was read in the call before
                self._append(last)
            start = end
            end += 1
        if start:
            self._append(self._ids)
        self._sound = self._sound[:, start:]

    def _append(self, ids: mx.array) -> None:
        """Append a token of each recording; a view of ids [B, 1] would wait for the next step."""
        end = self._times.popleft()
        rows: Any = zip(self.transcripts, self.lengths, ids.tolist())  # type: ignore
        for i, (transcript, length, [token]) in enumerate(rows):
            newest = len(transcript.tokens) + self._delay  # the step that this token heard last
            # The end of sequence is a token like any other until the recording is over.
            recording_over = newest * STEP >= length
            silence_over = (newest - self._right_pad) * STEP >= length
            self.ended[i] |= silence_over or (recording_over and token == self._eos_id)
            if not self.ended[i]:
                transcript.append(token, min(end, length / SAMPLE_RATE))


def transcribe(model: Voxtral, tokenizer: Any, audio: Any, *, delay_ms: float = DELAYS_MS[-1],
               temperature: float = 0.0) -> Any:
    """Transcribe a recording, 16 kHz mono samples [n] -> Transcript, or a list of them -> a list.

    A list runs in lockstep: decoding is bound by reading the weights, which its recordings share.
    Each ends where it would end alone. Latency does not matter here, so the delay is the longest.
    """
    several = isinstance(audio, (list, tuple))
    recordings = [as_samples(samples) for samples in (audio if several else [audio])]
    if not recordings:
        return []
    lengths = [len(samples) for samples in recordings]
    rows = np.stack([np.pad(x, (0, max(lengths) - len(x))) for x in recordings])  # [B, n]
    stream = Stream(model, tokenizer, delay_ms=delay_ms, temperature=temperature, lengths=lengths)
    stream._run(rows)
    stream.finish()
    return stream.transcripts if several else stream.transcripts[0]


# ------------------------------------------------------------------------------------- checkpoints
# The weights are published in four layouts, which differ in names: Mistral's original, mlx-audio's,
# transformers', and voxmlx's: our modules have its names, and `convert` writes it ("converted").

NAMES = {  # regular expressions, applied in turn: a dot is also the _ that mlx-audio has there
    "^(mm_streams_embeddings.embedding_module|mm_whisper_embeddings).": "",
    "^decoder.|^language_model.model.|^(?=layers|norm|tok_embeddings)": "language_model.",
    "^whisper_encoder.(transformer.)?|^encoder.transformer.|^audio_tower.(embedder.)?": "encoder.",
    "conv_layers.0.conv(.conv)?": "conv1", "conv_layers.1.conv(.conv)?": "conv2",
    "^(encoder.)?audio_language_projection.0|^multi_modal_projector.linear_1": "adapter.w_in",
    "^(encoder.)?audio_language_projection.2|^multi_modal_projector.linear_2": "adapter.w_out",
    "tok_embeddings": "embed_tokens",
    "attention_norm|self_attn_layer_norm|input_layernorm": "attn_norm",
    "final_layer_norm|post_attention_layernorm": "ffn_norm",
    r"(attention|self_attn)\.w?([qkvo])(_proj)?": r"attention.\2_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "ada_rms_norm(_t_cond.0|_t_cond.ada_down|.linear1)": "ada_norm.linear_in",
    "ada_rms_norm(_t_cond.2|_t_cond.ada_up|.linear2)": "ada_norm.linear_out"}
FIELDS = {  # of transformers' config.json, where they differ from params.json
    "hidden_size": "dim", "intermediate_size": "hidden_dim", "num_key_value_heads": "n_kv_heads",
    "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", "rms_norm_eps": "norm_eps"}


def read_config(folder: Path) -> dict:
    """The configuration of a checkpoint, in the form of params.json."""
    path = folder / "params.json"
    config = json.loads((path if path.exists() else folder / "config.json").read_bytes())
    if "multimodal" in config:  # Mistral's form, which the converted layout keeps
        return config
    if "encoder_args" in config:  # mlx-audio's
        text = config["decoder"]
        audio = {"audio_encoding_args": config.get("audio_encoding_args"), **config["encoder_args"]}
        factor = audio["downsample_factor"]
    elif config["model_type"] == "voxtral_realtime":  # transformers'
        text, audio = ({FIELDS.get(name, name): value for name, value in part.items()}
                       | {"rope_theta": part["rope_parameters"]["rope_theta"]}
                       for part in (config["text_config"], config["audio_config"]))
        text["ada_rms_norm_t_cond_dim"] = 32  # transformers hard-codes it
        audio["audio_encoding_args"] = asdict(Spectrogram())
        factor = config["downsample_factor"]
    else:
        raise ValueError(f"a {config['model_type']} model")
    whisper = {"encoder_args": audio, "downsample_args": {"downsample_factor": factor}}
    return {**text, "multimodal": {"whisper_model_args": whisper}}


def read_weights(folder: Path, model: Voxtral) -> dict[str, mx.array]:
    """All tensors of a checkpoint under their converted names, not yet read."""
    index = folder / "model.safetensors.index.json"
    files = list(folder.glob("consolidated.safetensors"))  # mistralai's repository has both
    if not files and index.exists():
        shards = json.loads(index.read_bytes())["weight_map"].values()
        files = [folder / shard for shard in set(shards)]
    loaded: Any = [mx.load(str(file)) for file in files or folder.glob("model*.safetensors")]
    weights: dict[str, mx.array] = {}
    for theirs, w in (tensor for tensors in loaded for tensor in tensors.items()):
        name = theirs
        for pattern, ours in NAMES.items():
            name = re.sub(pattern, ours, name)
        if w.ndim == 3 and w.shape[2] == 3:  # PyTorch's convolutions: [out, in, kernel]
            w = w.swapaxes(1, 2)
        if re.search(r"self_attn\.[qk]_proj", theirs):  # of transformers
            # There rows i and i + head_dim / 2 of a head turn together, here neighbours do.
            args = model.encoder_args if name.startswith("encoder") else model.decoder_args
            halves = w.reshape(-1, 2, args.head_dim // 2, *w.shape[1:])
            w = halves.swapaxes(1, 2).reshape(w.shape)
        if not re.search(r"\b(output|lm_head)\.\w+$", theirs):  # those are tied to the embedding
            weights[name] = w
    for name, w in weights.items():
        kind = mx.uint32 if name.replace(".weight", ".scales") in weights else mx.floating
        if name.endswith(".weight") and not mx.issubdtype(w.dtype, kind):
            raise ValueError(f"{name} is {w.dtype}: neither floats nor MLX's quantised")
    return weights


def quantisation(path: str, module: Any, weights: dict[str, mx.array]) -> dict | bool:
    """How the weights of a module are quantised, whatever the configuration says; False: not."""
    if f"{path}.scales" not in weights:
        return False
    inputs = module.weight.shape[-1]  # packed into words of 32 bits; each group has a scale
    bits = weights[f"{path}.weight"].shape[-1] * 32 // inputs
    group = inputs // weights[f"{path}.scales"].shape[-1]
    mode = f"nvfp{bits}" if group == 16 else f"mxfp{bits}"  # these have no biases
    mode = "affine" if f"{path}.biases" in weights else mode
    return {"group_size": group, "bits": bits, "mode": mode}


def load_voxtral_model(path_or_id: str | Path = DEFAULT_MODEL_ID, dtype: Any = None, *,
                       lazy: bool = False) -> tuple[Voxtral, Any, dict]:
    """Load a checkpoint: a folder in any of the four layouts, or a hub id, which is downloaded.

    `dtype` is the type to compute in ("float32", "float16", "bfloat16" or an mx.Dtype; default: the
    weights'). `lazy` weights are read when they are used. Returns the model, mistral-common's
    tokenizer and the content of params.json. Raises VoxtralError, or RuntimeError without memory.
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
        theirs = (tokenizer.n_words, audio.sampling_rate, audio.raw_audio_length_per_tok)
        assert audio.is_streaming and theirs == (config["vocab_size"], SAMPLE_RATE, STEP), theirs
    except Exception as error:  # whatever trips over the files, it is they that are wrong
        why = textwrap.shorten(f"{type(error).__name__}: {error}".replace(f"{folder}/", ""), 200)
        raise VoxtralError(f"{folder}: its {what}: missing, damaged or not those of Voxtral Mini"
                           f" 4B Realtime ({why})") from error
    # One type throughout: a norm in float32 would make everything after it float32.
    dtype = getattr(mx, dtype) if isinstance(dtype, str) else dtype
    model.set_dtype(dtype or model.encoder.conv1.weight.dtype)
    for _, module in model.named_modules():
        # The BLAS of MLX's Linux wheel is twice as fast with inputs outermost in memory.
        if type(module) is nn.Linear and mx.default_device() == mx.cpu:
            module.weight = mx.contiguous(module.weight.T).T
    if not lazy:
        mx.eval(model.parameters())  # reads all files, once
    return model, tokenizer, config


def download_weights(model_id: str) -> Path:
    """A folder as it is, or that of a hub repository in the cache. Raises VoxtralError."""
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
    except Exception as error:  # no such repository, another model, no network, no space, ...
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise VoxtralError(f"{model_id}: no such folder, and no Voxtral Mini 4B Realtime could be"
                           f" downloaded ({why})") from error


def convert(path_or_id: str | Path, out_dir: str | Path, *, bits: int | None = None,
            group_size: int = 64, dtype: Any = None) -> None:
    """Write a checkpoint in the converted layout, quantised to `bits` if given.

    Raises OSError, and VoxtralError if `out_dir` is neither new nor empty or weights are quantised
    already. config.json comes last: without it nothing is loaded.
    """
    out = Path(out_dir).expanduser()
    if out.is_file() or any(out.glob("*")):
        raise VoxtralError(f"{out}: exists and is not an empty folder")
    model, _, config = load_voxtral_model(path_or_id, dtype, lazy=True)
    if bits and any(hasattr(module, "bits") for module in model.modules()):
        raise VoxtralError(f"{path_or_id}: is quantised already")
    if bits:  # each Linear and the embedding: decoding is bound by reading them
        nn.quantize(model, group_size, bits, class_predicate=lambda _, part:
                    hasattr(part, "to_quantized") and part.weight.shape[-1] % group_size == 0)
    config = {key: value for key, value in config.items() if not key.startswith("quantization")}
    settings = {path: {"group_size": part.group_size, "bits": part.bits, "mode": part.mode}
                for path, part in model.named_modules() if hasattr(part, "bits")}
    if settings:  # for other programs: of most modules, then of the rest by name
        most = max(settings.values(), key=list(settings.values()).count)
        config["quantization"] = most | {path: s for path, s in settings.items() if s != most}
    out.mkdir(parents=True, exist_ok=True)
    weights: Any = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})
    shutil.copy(download_weights(str(path_or_id)) / "tekken.json", out)
    (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))


# ------------------------------------------------------------------------------------------- audio

FFMPEG = ["ffmpeg", "-nostdin", "-v", "error"]
# Time stamps jump where files were joined, so count samples; fill up sound that begins later than
# its picture; average channels.
FILTER = "asetpts=STARTPTS+N/SR/TB,aresample=16000:async=1:first_pts=0:rematrix_maxval=1"
TO_16K = ["-af", FILTER, "-ac", "1"]
PCM_16K = b"WAVEfmt \x10\0\0\0\1\0\1\0\x80>\0\0\0}\0\0\2\0\x10\0"  # a WAV of 16-bit mono samples
FILE = re.compile(rb"(?s)RIFF|RF64|FORM|caff|\.snd|OggS|fLaC|ID3|\xff[\xe2-\xfb][\x10-\xef]|"
                  rb".{4}ftyp|\x1aE\xdf\xa3|[\t\n\r -~]{12}")  # so files begin, or a text


def load_audio(path: str | Path) -> np.ndarray:
    """Read the sound of a file as float32 mono samples [n] at 16 kHz, within about -1..1.

    ffmpeg decodes the default track of anything; where it is not installed, libsndfile reads wav,
    flac, ogg, mp3 and more. Warns of what ffmpeg complains about. Raises VoxtralError for what is
    no file or holds no sound. Safe in threads.
    """
    if not os.path.isfile(path):
        raise VoxtralError(f"{path}: no such file; a pipe is read by: python voxtral.py - < {path}")
    if shutil.which("ffmpeg"):
        command = [*FFMPEG, "-i", f"file:{path}", *TO_16K, "-f", "f32le", "-"]
        done = subprocess.run(command, capture_output=True, check=False)
        samples = np.frombuffer(done.stdout, "<f4", len(done.stdout) // 4).copy()
        says = done.stderr.decode(errors="replace").replace(f"file:{path}: ", "").partition("\n")[0]
        if len(samples) and says:
            warnings.warn(f"{path}: {says}", stacklevel=2)
    else:
        import soundfile  # type: ignore[import-untyped]
        from mistral_common.tokens.tokenizers.audio import Audio

        try:
            soundfile.info(path)  # refuses a film before all of it is read
            audio = Audio.from_bytes(Path(path).read_bytes(), strict=False)
            audio.resample(SAMPLE_RATE)
        except Exception as error:  # of two libraries, for whatever is wrong with the file
            raise VoxtralError(f"{path}: {error}; ffmpeg, not installed, may read it") from error
        samples, says = audio.audio_array, ""
    if not len(samples):
        raise VoxtralError(f"{path}: {says or 'holds no samples'}")
    return as_samples(samples)


def received(stopped: threading.Event) -> Iterator[np.ndarray]:
    """Samples from standard input, which a thread receives until it ends or a signal stops it."""
    if sys.stdin is None or os.isatty(0) or os.path.isdir(0):
        raise VoxtralError("closed, or a terminal or folder: pipe sound into it")
    head = b""
    while len(head) < 120 and (piece := os.read(0, 1 << 16)):
        head += piece
    # The thread writes to `sink`, and we read `pieces`: a queue for raw samples, ffmpeg for files.
    waiting: Any = queue.Queue(1000)
    sink = waiting.put
    pieces = iter(waiting.get, b"")
    if head[8:36] == PCM_16K and b"data" in head:
        head = head[head.find(b"data") + 8 :]
    elif FILE.match(head):
        if not shutil.which("ffmpeg"):
            raise VoxtralError("not raw samples, and ffmpeg is not installed")
        # ffmpeg must not wait for more to probe, nor be ended by the Ctrl-C that is for us.
        child: Any = subprocess.Popen(
            [*FFMPEG, "-probesize", "32", "-i", "pipe:0", *TO_16K, "-f", "s16le", "-"], bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        pieces = iter(partial(child.stdout.read, 1 << 16), b"")
        sink = lambda piece: child.stdin.write(piece) if piece else child.stdin.close()

    def receive() -> None:
        with contextlib.suppress(OSError):  # ffmpeg has gone, and has said why
            sink(head)
            while not stopped.is_set():
                if os.name == "nt" or select.select([0], [], [], 0.1)[0]:
                    if not (piece := os.read(0, 1 << 16)):
                        break
                    sink(piece)
        sink(b"")

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one leaves at once
        stopped.set()

    signal.signal(signal.SIGINT, stop)
    threading.Thread(target=receive, daemon=True).start()
    half = b""  # of a sample: a piece may end inside of one
    for piece in pieces:
        piece = half + piece
        half = piece[len(piece) // 2 * 2 :]
        yield np.frombuffer(piece, "<i2", len(piece) // 2)


# --------------------------------------------------------------------------------------- subtitles

PAUSE = 5 / 6  # seconds: a longer one ends a cue, and a cue stays so long if the next one allows
SENTENCE = re.compile(r"[.!?…。！？][\"'”’»)」』]*\s*$")
# A character that is two columns wide, with the punctuation behind it: a line may end there.
WIDE = "([\u2e80-\ud7ff\uf900-\ufaff\ufe30-\ufe6f\uff01-\uff60\U0001f000-\U0003ffff][^\\w\\s]*)"


def wrap(text: str) -> list[str]:
    """Lines of at most 42 columns. To textwrap, a wide character is one with a space behind it."""
    text = re.sub(WIDE, r"\1 ", " ".join(text.split()))
    return [re.sub(f"{WIDE} ", r"\1", line) for line in textwrap.wrap(text, 42)]


def subtitles(transcripts: Iterable[Transcript], kind: str) -> Iterator[str]:
    """The states of a growing transcript -> cues of SubRip ("srt") or WebVTT ("vtt").

    A cue ends at a pause, after a sentence, and within 7 s and two lines of 42 columns.
    """
    yield "" if kind == "srt" else "WEBVTT\n\n"
    count = 0
    first = 0  # word of the next cue
    for transcript in transcripts:
        to_come = Word("", transcript.until - WORD_SECONDS, transcript.until)  # or later
        for i, word in enumerate([*transcript.words[first + 1 :], to_come], first + 1):
            cue = transcript.words[first:i]
            text = "".join(other.text for other in cue)
            full = word.text and (SENTENCE.search(text) or word.end > cue[0].start + 7
                                  or len(wrap(text + word.text)) > 2)
            if not cue or not (full or word.start > cue[-1].end + PAUSE):
                continue
            first = i
            start = cue[0].start
            length = max(cue[-1].end, min(start + PAUSE, word.start)) - start
            lines = wrap(text)
            for j in range(0, len(lines), 2):  # several cues, if what is taken for a word is long
                count += 1
                times = (start + length * min(1, k / len(lines)) for k in (j, j + 2))
                # As a date, 1.5 s is 1970-01-01T00:00:01.500.
                head = " --> ".join(str(np.datetime64(round(1000 * t), "ms"))[11:] for t in times)
                body = "\n".join(lines[j : j + 2])
                yield (f"{count}\n{head.replace('.', ',')}\n{body}\n\n" if kind == "srt" else
                       f"{head}\n{html.escape(body, quote=False)}\n\n")


# ------------------------------------------------------------------------------------ command line

def complain(error: Any, name: str = "") -> int:
    """Say in one line what is wrong, and with what; the result is the exit code for it."""
    why = str(getattr(error, "strerror", None) or error) or type(error).__name__
    why = " ".join((why if name in why else f"{name}: {why}").split())
    tqdm.write(f"voxtral.py: {why}", file=sys.stderr)  # above a progress bar
    return 1


class CommandLine:
    """What a command asks for: each recording is loaded, transcribed and written."""

    def __init__(self, args: argparse.Namespace):
        if not any(name == "-" or os.path.exists(name) for name in args.audio):
            raise VoxtralError("no such file: " + ", ".join(args.audio))
        os.makedirs(args.output_dir or ".", exist_ok=True)
        self.args = args
        self.code = 0  # to exit with
        self.stopped = threading.Event()
        # Where text goes to the terminal, it is the progress. None: no bar in a log.
        self.no_bar = args.quiet or (sys.stdout.isatty() and not args.output_dir) or None
        self.model, self.tokenizer, _ = load_voxtral_model(args.model, args.dtype)

    def run(self) -> int:
        """Transcribe all recordings; returns the exit code."""
        if self.args.batch > 1:
            self.run_batches([name for name in self.args.audio if name != "-"])
        for name in self.args.audio:
            if name == "-" or self.args.batch == 1:
                with self.failures(name):
                    self.write(name, self.follow(name))
            if self.stopped.is_set():
                return 130
        return self.code

    @contextlib.contextmanager
    def failures(self, name: str) -> Iterator[None]:
        """What fails inside is told in one line, and does not stop the other recordings."""
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:  # of writing: where reading fails, it raises VoxtralError
            self.code = complain(error, str(self.args.paths[name] or "standard output"))
        except (VoxtralError, RuntimeError, ValueError, MemoryError) as error:
            self.code = complain(error, "standard input" if name == "-" else name)

    def follow(self, name: str) -> Iterator[tuple[str, Transcript, float]]:
        """Transcribe a recording: yields new text, the transcript so far, and the seconds heard."""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # standard input had its own
        if name == "-":
            pieces: Any = received(self.stopped)
        else:
            samples = load_audio(name)
            pieces = tqdm(np.split(samples, range(64 * STEP, len(samples), 64 * STEP)), name,
                          unit="s", unit_scale=64 * STEP / SAMPLE_RATE, disable=self.no_bar)
        stream = Stream(self.model, self.tokenizer, delay_ms=self.args.delay,
                        temperature=self.args.temperature)
        seconds = 0.0
        for piece in pieces:
            seconds += len(piece) / SAMPLE_RATE
            yield stream.feed(piece), stream.transcripts[0], seconds
        if not seconds:
            raise KeyboardInterrupt if self.stopped.is_set() else VoxtralError("no sound came")
        yield stream.finish() + "\n", stream.transcripts[0], seconds

    def write(self, name: str, updates: Iterable[tuple[str, Transcript, float]]) -> None:
        """Write a transcript as it grows; a file of --output-dir appears when it is complete."""
        texts: Iterable[str] = (text for text, _, _ in updates)
        if self.args.format == "json":
            *_, (_, transcript, seconds) = updates
            record = {"file": name, "model": self.args.model, "delay_ms": self.args.delay,
                      "duration": seconds, "text": transcript.text, "tokens": transcript.tokens,
                      "words": [asdict(word) for word in transcript.words]}
            texts = [json.dumps(record, ensure_ascii=False) + "\n"]
        elif self.args.format != "text":
            texts = subtitles((transcript for _, transcript, _ in updates), self.args.format)
        if path := self.args.paths[name]:
            part = path.with_name(f".{path.name}.part")
            part.write_text("".join(texts), "utf-8", "backslashreplace")
            part.replace(path)
        else:
            for text in texts:
                print(text, end="", flush=True)

    def run_batches(self, names: list[str]) -> None:
        """Transcribe files, long ones in pieces, --batch pieces at a time."""
        n = self.args.batch
        # Similar lengths together: the size of a file stands in for its length.
        left = sorted(set(names), key=lambda x: os.path.isfile(x) and -os.path.getsize(x))
        waiting = list(left if self.args.output_dir else names)  # in the order of writing
        done: dict[str, tuple[str, Transcript, float]] = {}
        bar = tqdm(total=len(left), unit="file", disable=self.no_bar)
        while left:
            pieces: list[tuple[str, np.ndarray]] = []
            while left and len(pieces) < n:
                name = left.pop(0)
                with self.failures(name):
                    pieces += [(name, piece) for piece in cut_at_pauses(load_audio(name), n)]
            try:
                parts = [part for i in range(0, len(pieces), n) for part in transcribe(
                    self.model, self.tokenizer, [piece for _, piece in pieces[i : i + n]],
                    delay_ms=self.args.delay, temperature=self.args.temperature)]
            except (RuntimeError, MemoryError) as error:
                parts = []
                for name in dict(pieces):
                    self.code = complain(f"{error}; a smaller --batch needs less memory", name)
            for (name, piece), part in zip(pieces, parts):
                _, whole, start = done.get(name, ("", Transcript(self.tokenizer), 0.0))
                end = start + len(piece) / SAMPLE_RATE
                whole.extend(part, start, end)
                done[name] = (whole.text + "\n", whole, end)
            while waiting and waiting[0] not in left:
                name = waiting.pop(0)
                bar.update()
                if name in done:
                    with self.failures(name):
                        self.write(name, [done.pop(name)])


def cut_at_pauses(samples: np.ndarray, n: int) -> list[np.ndarray]:
    """Cut a recording into at most n pieces of 30 s or more, about equal, where it is quiet."""
    n = min(n, len(samples) // (40 * SAMPLE_RATE))
    if n < 2:
        return [samples]
    power = np.square(samples[: len(samples) // STEP * STEP]).reshape(-1, STEP).mean(axis=1)
    loudness = np.convolve(power, np.ones(4), "same")  # of the 0.3 s around the start of a step
    evens = [len(power) * k // n for k in range(1, n)]
    cuts = [even - 60 + int(np.argmin(loudness[even - 60 : even + 60])) for even in evens]
    return np.split(samples, [cut * STEP for cut in cuts])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("voxtral.py", description="Speech to text: Voxtral in MLX.")
    add = parser.add_argument
    add("audio", nargs="*", help="files, or -: live, raw 16-bit mono 16 kHz samples or any file")
    add("--model", default=DEFAULT_MODEL_ID, help="folder or hub id (default: %(default)s)")
    add("--delay", type=int, metavar="MS", choices=DELAYS_MS, help="of the text behind the sound:"
        " 80 to 1200 in steps of 80, or 2400 (default: 480 with -, else 2400)")
    add("--format", choices=("text", "srt", "vtt", "json"), default="text", help="default: text")
    add("--output-dir", metavar="DIR", help="write a file per recording to DIR: NAME.txt, ...")
    add("--batch", type=int, metavar="N", default=1, help="N recordings, or parts, at a time")
    add("--temperature", type=float, default=0.0, help="of sampling; 0, the default, is greedy")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="compute in this type")
    add("--quiet", action="store_true", help="no progress")
    add("--convert", metavar="DIR", help="write a converted checkpoint to DIR, do not transcribe")
    add("--bits", type=int, choices=(4, 6, 8), help="with --convert: quantise to so many bits")
    add("--group-size", type=int, choices=(32, 64, 128), default=64, help="... in such groups")
    args = parser.parse_args(argv)
    if bool(args.audio) == bool(args.convert) or args.bits and not args.convert:
        parser.error("name audio files; or --convert DIR, to which --bits belong, without any")
    if not 1 <= args.batch <= 1024 or not 0 <= args.temperature < math.inf:
        parser.error("--batch takes 1 to 1024, --temperature 0 or more")
    if len(args.audio) > 1 and args.format in ("srt", "vtt") and not args.output_dir:
        parser.error(f"several files as {args.format} need --output-dir")
    args.delay = args.delay or (480 if "-" in args.audio else DELAYS_MS[-1])
    stems = {name: "stdin" if name == "-" else Path(name).stem for name in args.audio}
    kind = args.format.replace("text", "txt")
    args.paths = {name: args.output_dir and Path(args.output_dir, f"{stems[name]}.{kind}")
                  for name in stems}
    owners: dict[Any, str] = {}
    for name, path in args.paths.items():
        if path and owners.setdefault(path, name) != name:
            parser.error(f"{owners[path]} and {name} would both be written to {path}")
    return args


def main(argv: list[str] | None = None) -> int:
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass  # a standard stream was closed: no file must get its number
    args = parse_args(argv)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        return complain("standard output is closed")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore
    warnings.showwarning = lambda message, *_: complain(message)  # type: ignore
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # which nohup asks for
            signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        if not args.convert:
            return CommandLine(args).run()
        convert(args.model, args.convert, bits=args.bits, group_size=args.group_size,
                dtype=args.dtype)
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit
        return complain("standard output was closed")
    except (VoxtralError, RuntimeError, OSError, MemoryError) as error:
        return complain(error, str(getattr(error, "filename", None) or ""))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
