#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "mlx>=0.31.0; sys_platform == 'darwin'",
#   "mlx[cpu]>=0.31.0; sys_platform == 'linux'",
#   "huggingface_hub>=1.0",
#   "mistral-common[audio]>=1.9.1",
#   "numpy>=1.26",
# ]
# ///
"""Voxtral Mini 4B Realtime, Mistral's streaming speech-to-text model, in one file of MLX.

    python voxtral.py speech.wav                                 # the words, as they are decoded
    ffmpeg -i talk.mp4 -f wav - | python voxtral.py - --format srt   # anything ffmpeg hears, live

    model, tokenizer, config = load_voxtral_model()
    print(transcribe(model, tokenizer, load_audio("speech.wav")).text)

The model is a pipe. Sound goes in at one end and text comes out at the other, at a fixed rate:

    samples      log-mel       encoder frames     audio embeddings     text tokens
    16 kHz  -->  100 Hz   -->  50 Hz         -->  12.5 Hz         -->  12.5 Hz
          window 400     conv 3        32 layers,        groups of 4       26 layers, one
          hop 160        conv 3 / 2    15 s of memory    side by side      token per 80 ms

Whisper, the textbook model, takes 30 s at a time: an encoder that looks both ways over all of it,
then a decoder that writes as many tokens as it likes and finds its place by cross-attention.
Voxtral Realtime differs in three ways, and each makes it a stream:

  causal    No part looks ahead. The convolutions look back, and attention sees the last `window`
            positions: 750 frames (15 s) in the encoder, 8192 tokens (11 min) in the decoder. What
            was computed stays valid whatever is said next, and memory does not grow.
  added     There is no cross-attention. At every position the decoder's input is the embedding of
            the last text token *plus* the embedding of 80 ms of sound, and every 80 ms it writes
            exactly one token. Mostly that is [STREAMING_PAD]: nothing to say yet. [STREAMING_WORD]
            announces a word, whose tokens follow, one per frame.
  delayed   The text stream runs some frames behind the sound. Nobody can write a word before it
            was heard; a longer delay hears more context, errs less and answers later. One set of
            weights serves delays from 80 ms to 2.4 s, so the decoder must be told which one it
            works at: a small network turns the delay into a scale on every layer's norm.

So here a file is a stream that arrives at once, and there is one path through the code:
`Stream.feed` any number of samples, then `Stream.finish`; `transcribe` is just these two. Leaf first:
audio, attention and its memory, encoder, decoder, checkpoints, the stream, subtitles, command line.

Letters in shape comments: B batch (1 in a stream), F mel frames, T positions, D dim, H heads,
C channels. Sources: the Voxtral Realtime report (arXiv 2602.11298), the params.json of
mistralai/Voxtral-Mini-4B-Realtime-2602, and mistral-common, which owns the tokenizer and every
constant of the audio format. Delayed streams: Kyutai, arXiv 2509.08753.
"""

from __future__ import annotations

import argparse
import codecs
import io
import itertools
import json
import math
import os
import queue
import re
import sys
import tempfile
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

# mistral-common, huggingface_hub, soundfile and soxr take half a second to import: each is imported
# in the function that needs it, so that `--help` and mistakes answer at once.

DEFAULT_MODEL_ID = "mlx-community/Voxtral-Mini-4B-Realtime-6bit"
SAMPLE_RATE = 16_000  # of the model; tekken.json says so too, and load_voxtral_model checks it


class VoxtralError(ValueError):
    """A mistake that the user can mend. The message is one line and says what is wrong."""


# ------------------------------------------------------------------------------------------- audio
# Sound to a log-mel spectrogram. The numbers are those of mistral-common's AudioSpectrogramConfig.


def load_audio(path: str | Path) -> np.ndarray:
    """Read an audio file as float32 mono samples at 16 kHz, [n], nominally within -1..1.

    Whatever libsndfile reads (wav, flac, ogg, mp3, aiff), at any rate and number of channels; the
    channels are averaged, the resampling is soxr's. Raises VoxtralError for what is not such a file,
    is cut short, holds no samples or samples that are not numbers.
    """
    import soundfile

    path = Path(path)
    try:
        if not path.is_file():
            raise VoxtralError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
        if path.stat().st_size == 0:
            raise VoxtralError(f"{path}: the file is empty")
        with open(path, "rb") as file, soundfile.SoundFile(file) as sound:
            blocks = list(to_16k(sound.blocks(1 << 16, dtype="float32", always_2d=True), sound.samplerate))
            heard, promised, log = sound.tell(), sound.frames, sound.extra_info
    except soundfile.SoundFileError as error:
        if path.suffix.lower() in (".flac", ".ogg", ".mp3", ".wav"):
            raise VoxtralError(f"{path}: damaged, cut short or not audio at all ({error})") from error
        hint = "if it is (m4a, mp4, webm, ...): ffmpeg -i FILE -f wav - | python voxtral.py -"
        raise VoxtralError(f"{path}: not audio that libsndfile reads; {hint}") from error
    except OSError as error:
        raise VoxtralError(f"{path}: cannot be read ({error.strerror})") from error
    # libsndfile reads what is left of a file that was cut short and says so in its log only. A
    # program that wrote to a pipe left a size near 2 or 4 GiB there, which promises nothing.
    sizes = re.findall(r": (\d+) \(should be (\d+)\)", log)
    if heard < promised or "without an End-Of-Stream" in log or any(
        int(real) < int(claimed) < 0x7FFF0000 for claimed, real in sizes
    ):
        raise VoxtralError(f"{path}: the file is cut short")
    samples = np.concatenate(blocks)
    if len(samples) == 0:
        raise VoxtralError(f"{path}: holds no samples")
    if not np.isfinite(samples).all():
        raise VoxtralError(f"{path}: holds samples that are NaN or infinite")
    return samples


def to_16k(blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Blocks [n, channels] at `rate` Hz -> blocks [n] of mono sound at 16 kHz."""
    import soxr

    if rate < 1000:
        raise VoxtralError(f"a sample rate of {rate} Hz carries no speech")
    resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    for block in blocks:
        mono = block.mean(axis=1)
        yield mono if rate == SAMPLE_RATE else resampler.resample_chunk(mono)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


@dataclass(frozen=True)
class Spectrogram:
    """The log-mel front end; the defaults are those of the published model."""

    num_mel_bins: int = 128
    hop_length: int = 160  # samples: 10 ms
    window_size: int = 400  # samples: 25 ms
    global_log_mel_max: float = 1.5

    def frames(self, samples: np.ndarray) -> mx.array:
        """Log-mel of every whole window: samples [n] -> [F, num_mel_bins] float32.

        It runs in numpy: the sound is on the CPU, the work is small, and float32 stays float32.
        """
        from mistral_common.audio import mel_filter_bank

        bins = self.window_size // 2 + 1
        bank = mel_filter_bank(bins, self.num_mel_bins, 0, SAMPLE_RATE / 2, SAMPLE_RATE)
        # A periodic Hann window: one period is `window_size`, so that shifted copies add up evenly.
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.window_size) / self.window_size)
        windows = np.lib.stride_tricks.sliding_window_view(samples, self.window_size)
        windows = windows[:: self.hop_length]  # [F, window_size]
        spectrum = np.fft.rfft(windows * window.astype(np.float32))  # [F, bins]
        power = (np.abs(spectrum) ** 2).astype(np.float32)
        log = np.log10(np.maximum(power @ bank.astype(np.float32), 1e-10))
        # Whisper clips at 8 below the loudest sound of the clip. A stream cannot know that, so a
        # constant of training stands in for it.
        log = np.maximum(log, self.global_log_mel_max - 8)
        return mx.array((log + 4) / 4)


def log_mel_spectrogram(samples: np.ndarray, spectrogram: Spectrogram = Spectrogram()) -> mx.array:
    """Log-mel of a whole signal: 16 kHz samples [n] -> [n // 160, 128] float32.

    Frame f is centred on sample 160 f; beyond both ends there is silence. As in Whisper, the frame
    centred on the end is dropped.
    """
    padded = np.pad(np.asarray(samples, np.float32), spectrogram.window_size // 2)
    return spectrogram.frames(padded)[: len(samples) // spectrogram.hop_length]


class Carry:
    """What a window that moves along a signal still needs of the past.

    The windows have `kernel` inputs and move by `stride` <= `kernel`; `zeros` stand in front of the
    signal. After n windows the next one starts at input n * stride, so everything from there on is
    kept. (Keeping the last kernel - stride inputs looks the same, and is wrong as soon as a chunk
    does not end where a window ends.) Spectrum, convolutions and adapter all are such windows.
    """

    def __init__(self, kernel: int, stride: int, zeros: int):
        self.kernel, self.stride, self.zeros = kernel, stride, zeros
        self.rest: Any = None  # [..., n, C], of the signal's own array type

    def __call__(self, x):
        """The next inputs [..., n, C] -> the inputs [..., m, C] of the windows now complete."""
        xp: Any = np if isinstance(x, np.ndarray) else mx
        if self.rest is None:
            self.rest = xp.zeros((*x.shape[:-2], self.zeros, x.shape[-1]), x.dtype)
        x = xp.concatenate([self.rest, x], axis=-2)
        windows = max(0, (x.shape[-2] - self.kernel) // self.stride + 1)
        end = (windows - 1) * self.stride + self.kernel if windows else 0
        self.rest = x[..., windows * self.stride :, :]
        return x[..., :end, :]


# --------------------------------------------------------------------------------------- attention
# Encoder and decoder share these blocks. Names and sizes are those of params.json.


@dataclass(frozen=True)
class TransformerArgs:
    """The sizes of a transformer, read from one section of params.json."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    sliding_window: int
    rope_theta: float
    norm_eps: float
    use_biases: bool


class KVCache:
    """Rotated keys, and values, of the last `window` positions, oldest first.

    The buffer is appended to in place. When it is full, one with as much room again takes over and
    starts with the entries that are still in the window; so nothing is ever moved within a buffer,
    and the cost per position is constant. A position is an *index into the buffer*: attention sees
    differences of positions only, so the kept keys can be turned back to the new origin. Counted
    from the start of the stream instead, positions would reach 4.3 million in a day, where float32
    angles are wrong by 0.25 rad; here they stay below twice the window, and a key turns back once.
    """

    def __init__(self, args: TransformerArgs):
        self.window = args.sliding_window
        self.rope = partial(
            mx.fast.rope, dims=args.head_dim, traditional=True, base=args.rope_theta, scale=1.0
        )
        self.length = 0
        self.keys = self.values = mx.array(0)  # the first append makes the buffers

    def append(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, int]:
        """Add k and v [B, H, T, head_dim], k not rotated yet.

        Returns the keys and values [B, H, L, head_dim] that the T new positions can see, L being
        at most window - 1 + T, and the position of the first new one.
        """
        T, kept = k.shape[2], min(self.length, self.window - 1)
        if self.length == 0 or self.length + T > self.keys.shape[2]:
            old_k = old_v = k[:, :, :0]
            if kept:
                first = self.length - kept
                old_k, old_v = (x[:, :, first : self.length] for x in (self.keys, self.values))
                # All positions move by the same amount: rope sees each as position 0 of a batch.
                old_k = self.rope(old_k.swapaxes(0, 2), offset=-first).swapaxes(0, 2)
            room = mx.zeros((*k.shape[:2], max(T, kept), k.shape[3]), k.dtype)
            self.keys = mx.concatenate([old_k, room], axis=2)
            self.values = mx.concatenate([old_v, room], axis=2)
            self.length = kept
        start, self.length = self.length, self.length + T
        self.keys[:, :, start : self.length] = self.rope(k, offset=start)
        self.values[:, :, start : self.length] = v
        seen = slice(start - kept, self.length)
        return self.keys[:, :, seen], self.values[:, :, seen], start


@lru_cache(maxsize=8)
def band(T: int, L: int, window: int, dtype: mx.Dtype) -> mx.array:
    """The mask [T, L] by which the last T of L positions see `window` positions, themselves last.

    It is added to the scores: CUDA has a fused kernel for that, but none for a boolean mask.
    """
    distance = mx.arange(L - T, L)[:, None] - mx.arange(L)
    hidden = (distance < 0) | (distance >= window)
    return mx.where(hidden, mx.finfo(dtype).min, 0.0).astype(dtype)


def windowed_attention(q: mx.array, k: mx.array, v: mx.array, window: int) -> mx.array:
    """Attention of the last T of L positions over `window` keys each: q [B, H, T, head_dim].

    Long chunks go in blocks of one window, so that a query meets two windows of keys at most,
    however long the chunk. Few rows go one by one: a single query sees all of its keys and needs
    no mask, and on CUDA the kernel for many rows is planned anew, for 3 ms, at every new L.
    """
    T, past = q.shape[2], k.shape[2] - q.shape[2]
    block = window if T > 8 else 1
    rows = []
    for start in range(0, T, block):
        end = min(start + block, T)
        seen = slice(max(0, past + start + 1 - window), past + end)
        n, length = end - start, seen.stop - seen.start
        mask = None if n == 1 else "causal" if length <= window else band(n, length, window, q.dtype)
        rows.append(
            mx.fast.scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, seen], v[:, :, seen], scale=q.shape[3] ** -0.5, mask=mask
            )
        )
    return rows[0] if len(rows) == 1 else mx.concatenate(rows, axis=2)


class Attention(nn.Module):
    """Self-attention over the sliding window, with grouped queries where n_kv_heads < n_heads."""

    def __init__(self, args: TransformerArgs):
        super().__init__()
        self.head_dim = args.head_dim
        q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.q_proj = nn.Linear(args.dim, q_dim, bias=args.use_biases)
        self.k_proj = nn.Linear(args.dim, kv_dim, bias=False)  # a constant here cancels in softmax
        self.v_proj = nn.Linear(args.dim, kv_dim, bias=args.use_biases)
        self.o_proj = nn.Linear(q_dim, args.dim, bias=args.use_biases)

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        B, T, _ = x.shape
        heads = (B, T, -1, self.head_dim)
        q = self.q_proj(x).reshape(heads).swapaxes(1, 2)  # [B, H, T, head_dim]
        k = self.k_proj(x).reshape(heads).swapaxes(1, 2)  # [B, kv heads, T, head_dim]
        v = self.v_proj(x).reshape(heads).swapaxes(1, 2)
        keys, values, position = cache.append(k, v)
        q = cache.rope(q, offset=position)
        out = windowed_attention(q, keys, values, cache.window)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """The feed-forward part: one projection gates another."""

    def __init__(self, args: TransformerArgs):
        super().__init__()
        self.gate_proj = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.up_proj = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.down_proj = nn.Linear(args.hidden_dim, args.dim, bias=args.use_biases)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class AdaNorm(nn.Module):
    """The decoder layer's ear for the delay: delay embedding [D] -> scale [D], around 0."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.linear_in = nn.Linear(dim, inner, bias=False)
        self.linear_out = nn.Linear(inner, dim, bias=False)

    def __call__(self, t: mx.array) -> mx.array:
        return self.linear_out(nn.gelu(self.linear_in(t)))


class Block(nn.Module):
    """A pre-norm transformer layer. Only a decoder's has `ada_norm`."""

    def __init__(self, args: TransformerArgs, ada_dim: int = 0):
        super().__init__()
        self.attention = Attention(args)
        self.mlp = SwiGLU(args)
        self.attn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        if ada_dim:
            self.ada_norm = AdaNorm(args.dim, ada_dim)

    def __call__(self, x: mx.array, cache: KVCache, ffn_weight: mx.array) -> mx.array:
        """x [B, T, D] -> [B, T, D]; `ffn_weight` [D] is ffn_norm's, in a decoder times 1 + ada."""
        x = x + self.attention(self.attn_norm(x), cache)
        return x + self.mlp(mx.fast.rms_norm(x, ffn_weight, self.ffn_norm.eps))


# ------------------------------------------------------------------------ encoder, adapter, decoder


class AudioMemory:
    """All that the encoder and the adapter of one stream remember between two pieces of sound."""

    def __init__(self, model: Voxtral):
        self.conv1 = Carry(kernel=3, stride=1, zeros=2)
        self.conv2 = Carry(kernel=3, stride=2, zeros=1)
        self.group = Carry(model.downsample_factor, model.downsample_factor, zeros=0)
        self.caches = [KVCache(model.encoder_args) for _ in model.encoder.layers]


class Encoder(nn.Module):
    """A Whisper-like encoder made causal: two convolutions, then layers with a sliding window."""

    def __init__(self, args: TransformerArgs, num_mel_bins: int):
        super().__init__()
        self.conv1 = nn.Conv1d(num_mel_bins, args.dim, kernel_size=3)
        self.conv2 = nn.Conv1d(args.dim, args.dim, kernel_size=3, stride=2)
        self.layers = [Block(args) for _ in range(args.n_layers)]
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)

    def __call__(self, mel: mx.array, memory: AudioMemory) -> mx.array:
        """The next log-mel frames [B, F, C] -> the encoder frames [B, about F / 2, D] they allow."""
        x = mel.astype(self.conv1.weight.dtype)  # all that follows is in the dtype of the weights
        for conv, carry in ((self.conv1, memory.conv1), (self.conv2, memory.conv2)):
            x = carry(x)
            if x.shape[1] == 0:  # too little for one window
                return mx.zeros((x.shape[0], 0, conv.weight.shape[0]), x.dtype)
            x = nn.gelu(conv(x))
        for layer, cache in zip(self.layers, memory.caches):
            x = layer(x, cache, layer.ffn_norm.weight)
        return self.norm(x)


class Adapter(nn.Module):
    """From sound to the decoder's space: `factor` frames side by side through two layers."""

    def __init__(self, frame_dim: int, dim: int):
        super().__init__()
        self.w_in = nn.Linear(frame_dim, dim, bias=False)
        self.w_out = nn.Linear(dim, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w_out(nn.gelu(self.w_in(x)))


class Decoder(nn.Module):
    """A language model whose input at every position is a token's embedding plus sound."""

    def __init__(self, args: TransformerArgs, vocab_size: int, ada_dim: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, args.dim)
        self.layers = [Block(args, ada_dim) for _ in range(args.n_layers)]
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)

    def ffn_weights(self, delay: int) -> list[mx.array]:
        """Every layer's ffn_norm weight [D] for a delay of so many tokens: weight * (1 + ada(t)).

        The delay is embedded like a position in the first transformers: cosines and sines of
        geometrically spaced frequencies. The scale depends on the delay alone, so it is folded into
        the norm's own weight once per stream and costs a step nothing.
        """
        dtype, D = self.norm.weight.dtype, self.norm.weight.shape[0]
        inv_freq = mx.exp(-math.log(10000.0) * mx.arange(D // 2) / (D // 2))
        t = mx.concatenate([mx.cos(delay * inv_freq), mx.sin(delay * inv_freq)]).astype(dtype)
        # [None] and [0]: a quantised product on CUDA wants two dimensions.
        return [layer.ffn_norm.weight * (1 + layer.ada_norm(t[None])[0]) for layer in self.layers]

    def __call__(self, x: mx.array, ffn_weights: list[mx.array], caches: list[KVCache]) -> mx.array:
        """Inputs [B, T, D] -> the last layer's normed output [B, T, D]."""
        for layer, weight, cache in zip(self.layers, ffn_weights, caches):
            x = layer(x, cache, weight)
        return self.norm(x)


class Voxtral(nn.Module):
    """The whole model; `config` is the content of params.json (see `read_config`)."""

    def __init__(self, config: dict):
        super().__init__()
        whisper = section(config, "multimodal", "whisper_model_args")
        audio = section(whisper, "encoder_args")
        self.encoder_args, self.decoder_args = transformer_args(audio), transformer_args(config)
        mel = section(audio, "audio_encoding_args")
        self.spectrogram = Spectrogram(
            **{field.name: number(mel, field.name, type(field.default)) for field in fields(Spectrogram)}
        )
        self.downsample_factor = number(section(whisper, "downsample_args"), "downsample_factor")
        self.vocab_size = number(config, "vocab_size")
        ada_dim = number(config, "ada_rms_norm_t_cond_dim")
        self.encoder = Encoder(self.encoder_args, self.spectrogram.num_mel_bins)
        self.adapter = Adapter(self.encoder_args.dim * self.downsample_factor, self.decoder_args.dim)
        self.language_model = Decoder(self.decoder_args, self.vocab_size, ada_dim)

    def embed_audio(self, mel: mx.array, memory: AudioMemory) -> mx.array:
        """The next log-mel frames [B, F, 128] -> the audio embeddings [B, about F / 8, D] they allow."""
        x = memory.group(self.encoder(mel, memory))  # [B, T * factor, D of the encoder]
        return self.adapter(x.reshape(x.shape[0], -1, self.downsample_factor * x.shape[2]))

    def encode(self, mel: mx.array) -> mx.array:
        """Log-mel of a whole signal [F, 128] -> its audio embeddings [F // 8, D], one per 80 ms."""
        memory, block = AudioMemory(self), self.encoder_block * 2 * self.downsample_factor
        parts = [self.embed_audio(mel[None, i : i + block], memory) for i in range(0, len(mel), block)]
        return mx.concatenate(parts, axis=1)[0]

    @property
    def encoder_block(self) -> int:
        """How many audio embeddings of a long signal are made at once: four encoder windows' worth.

        Enough rows to keep a GPU busy, while what they need stays small beside the weights.
        """
        return max(1, 4 * self.encoder_args.sliding_window // self.downsample_factor)


# ------------------------------------------------------------------------------------- checkpoints
# The same weights are published in four layouts. Three of them are renamed to the fourth, which voxmlx
# defined and whose names the modules above carry. A table maps names of modules; "N" stands for the
# index of a layer, and a name that starts with a dot is inside every layer.

ORIGINAL = {
    "whisper_encoder.conv_layers.0.conv": "encoder.conv1",
    "whisper_encoder.conv_layers.1.conv": "encoder.conv2",
    "whisper_encoder.transformer.norm": "encoder.norm",
    "audio_language_projection.0": "adapter.w_in",
    "audio_language_projection.2": "adapter.w_out",
    "tok_embeddings": "language_model.embed_tokens",
    "norm": "language_model.norm",
    "whisper_encoder.transformer.layers.N": "encoder.layers.N",
    "layers.N": "language_model.layers.N",
    ".attention_norm": ".attn_norm",
    ".attention.wq": ".attention.q_proj",
    ".attention.wk": ".attention.k_proj",
    ".attention.wv": ".attention.v_proj",
    ".attention.wo": ".attention.o_proj",
    ".ffn_norm": ".ffn_norm",
    ".feed_forward.w1": ".mlp.gate_proj",
    ".feed_forward.w2": ".mlp.down_proj",
    ".feed_forward.w3": ".mlp.up_proj",
    ".ada_rms_norm_t_cond.0": ".ada_norm.linear_in",
    ".ada_rms_norm_t_cond.2": ".ada_norm.linear_out",
}
MLX_AUDIO = {
    "encoder.conv_layers_0_conv.conv": "encoder.conv1",
    "encoder.conv_layers_1_conv.conv": "encoder.conv2",
    "encoder.transformer_norm": "encoder.norm",
    "encoder.audio_language_projection_0": "adapter.w_in",
    "encoder.audio_language_projection_2": "adapter.w_out",
    "decoder.tok_embeddings": "language_model.embed_tokens",
    "decoder.norm": "language_model.norm",
    "encoder.transformer_layers.N": "encoder.layers.N",
    "decoder.layers.N": "language_model.layers.N",
    ".attention_norm": ".attn_norm",
    ".attention.wq": ".attention.q_proj",
    ".attention.wk": ".attention.k_proj",
    ".attention.wv": ".attention.v_proj",
    ".attention.wo": ".attention.o_proj",
    ".ffn_norm": ".ffn_norm",
    ".feed_forward_w1": ".mlp.gate_proj",
    ".feed_forward_w2": ".mlp.down_proj",
    ".feed_forward_w3": ".mlp.up_proj",
    ".ada_rms_norm_t_cond.ada_down": ".ada_norm.linear_in",
    ".ada_rms_norm_t_cond.ada_up": ".ada_norm.linear_out",
}
TRANSFORMERS = {
    "audio_tower.embedder.conv1": "encoder.conv1",
    "audio_tower.embedder.conv2": "encoder.conv2",
    "audio_tower.norm": "encoder.norm",
    "multi_modal_projector.linear_1": "adapter.w_in",
    "multi_modal_projector.linear_2": "adapter.w_out",
    "language_model.model.embed_tokens": "language_model.embed_tokens",
    "language_model.model.norm": "language_model.norm",
    "audio_tower.layers.N": "encoder.layers.N",
    "language_model.model.layers.N": "language_model.layers.N",
    ".self_attn_layer_norm": ".attn_norm",  # so in the encoder
    ".input_layernorm": ".attn_norm",  # ... and so in the decoder
    ".self_attn.q_proj": ".attention.q_proj",
    ".self_attn.k_proj": ".attention.k_proj",
    ".self_attn.v_proj": ".attention.v_proj",
    ".self_attn.o_proj": ".attention.o_proj",
    ".final_layer_norm": ".ffn_norm",
    ".post_attention_layernorm": ".ffn_norm",
    ".mlp.gate_proj": ".mlp.gate_proj",
    ".mlp.down_proj": ".mlp.down_proj",
    ".mlp.up_proj": ".mlp.up_proj",
    ".ada_rms_norm.linear1": ".ada_norm.linear_in",
    ".ada_rms_norm.linear2": ".ada_norm.linear_out",
}
TABLES: dict[str, dict[str, str]] = {
    "converted": {}, "original": ORIGINAL, "mlx-audio": MLX_AUDIO, "transformers": TRANSFORMERS
}
TIED = ("output.weight", "lm_head.weight", "language_model.lm_head.weight")  # = the embedding
ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4}  # bytes; U32 holds packed quantised weights
TRANSFORMERS_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "sliding_window": "sliding_window",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}


def section(config: Any, *names: str) -> dict:
    """A part of a configuration that must be there and be a JSON object."""
    for name in names:
        config = config.get(name) if isinstance(config, dict) else None
    if not isinstance(config, dict):
        raise VoxtralError(f"the configuration has no section {'.'.join(names)}")
    return config


def number(config: dict, name: str, kind: Any = int, default: Any = None, most: float = 1 << 20) -> Any:
    """A field of a configuration that must be a positive number of a possible size."""
    value = config.get(name, default)
    right_type = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not right_type or not 0 < value <= most:
        raise VoxtralError(f"the configuration's {name} is {value!r}, not a number that is possible")
    return kind(value)


def transformer_args(config: dict) -> TransformerArgs:
    """The sizes in one section of params.json. Raises VoxtralError for what cannot be."""
    names = ("dim", "n_heads", "head_dim", "hidden_dim", "sliding_window")
    args = TransformerArgs(
        **{name: number(config, name) for name in names},
        n_layers=number(config, "n_layers", most=1000),
        n_kv_heads=number(config, "n_kv_heads", default=config.get("n_heads")),
        rope_theta=number(config, "rope_theta", float, most=1e12),
        norm_eps=number(config, "norm_eps", float, most=1),
        use_biases=config.get("use_biases") is True,
    )
    if args.n_heads % args.n_kv_heads or args.head_dim % 2 or args.dim % 2:
        raise VoxtralError(f"these sizes do not go together: {args}")
    return args


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise VoxtralError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise VoxtralError(f"{path}: not JSON ({error})") from error


def read_config(folder: Path) -> tuple[str, dict]:
    """Recognise the layout of a folder: its name in TABLES, and its configuration as in params.json."""
    params = folder / "params.json"
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not isinstance(config, dict):
        raise VoxtralError(f"{folder / 'config.json'}: not a configuration")
    if "multimodal" in config:
        layout = "converted"
    elif params.is_file() and ((folder / "consolidated.safetensors").is_file() or not config):
        layout, config = "original", section({str(params): read_json(params)}, str(params))
    elif "encoder_args" in config and "decoder" in config:
        layout, config = "mlx-audio", config_of_mlx_audio(config)
    elif config.get("model_type") == "voxtral_realtime":
        layout, config = "transformers", config_of_transformers(config)
    elif config:
        kind = config.get("model_type", "unknown")
        raise VoxtralError(f"{folder}: a {kind} checkpoint; this program runs Voxtral Realtime only")
    else:
        raise VoxtralError(f"{folder}: not a model folder (no config.json, no params.json)")
    if "ada_rms_norm_t_cond_dim" not in config:  # the delay's network: offline models have none
        raise VoxtralError(
            f"{folder}: a Voxtral that is not Realtime, or an incomplete configuration"
            " (no ada_rms_norm_t_cond_dim); needed: Voxtral Mini 4B Realtime"
        )
    return layout, config


def config_of_mlx_audio(config: dict) -> dict:
    audio = dict(section(config, "encoder_args"))
    audio.setdefault("audio_encoding_args", config.get("audio_encoding_args"))
    downsample = {"downsample_factor": audio.pop("downsample_factor", 4)}
    whisper = {"encoder_args": audio, "downsample_args": downsample}
    rest = {"quantization": config["quantization"]} if "quantization" in config else {}
    return {**section(config, "decoder"), **rest, "multimodal": {"whisper_model_args": whisper}}


def config_of_transformers(config: dict) -> dict:
    def renamed(part: dict) -> dict:
        found = {ours: part[theirs] for ours, theirs in TRANSFORMERS_FIELDS.items() if theirs in part}
        return {**found, "rope_theta": section(part, "rope_parameters").get("rope_theta")}

    audio_config = section(config, "audio_config")
    mel = {**asdict(Spectrogram()), "num_mel_bins": audio_config.get("num_mel_bins")}
    encoder = {**renamed(audio_config), "use_biases": True, "audio_encoding_args": mel}
    downsample = {"downsample_factor": config.get("downsample_factor", 4)}
    ada = {"ada_rms_norm_t_cond": True, "ada_rms_norm_t_cond_dim": 32}  # fixed there
    whisper = {"encoder_args": encoder, "downsample_args": downsample}
    decoder = {**renamed(section(config, "text_config")), "tied_embeddings": True}
    return {**decoder, **ada, "multimodal": {"whisper_model_args": whisper}}


def weight_files(folder: Path, layout: str) -> list[Path]:
    """The safetensors files of a checkpoint, all of them there."""
    index = folder / "model.safetensors.index.json"
    if layout == "original":
        names = ["consolidated.safetensors"]
    elif index.is_file():
        names = sorted(set(map(str, section(read_json(index), "weight_map").values())))
        if strange := [name for name in names if Path(name).name != name]:
            raise VoxtralError(f"{index}: names a file outside the folder: {strange[0]}")
    else:
        names = sorted(path.name for path in folder.glob("model*.safetensors"))
    if absent := [name for name in names or ["model.safetensors"] if not (folder / name).is_file()]:
        raise VoxtralError(f"{folder}: the weights are missing: {', '.join(absent[:5])}")
    return [folder / name for name in names]


def check_safetensors(path: Path) -> None:
    """Raise VoxtralError unless every tensor's bytes are in the file.

    MLX maps the file and reads it later, from another thread: what is wrong is better found now.
    """
    try:
        with open(path, "rb") as file:
            room = os.fstat(file.fileno()).st_size - 8
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if 0 < size <= room else None
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                shape = tensor["shape"]
                n = math.prod(shape) * ITEM_SIZE[tensor["dtype"]]
                if not (0 <= begin <= end <= room - size and n == end - begin and min(shape, default=1) > 0):
                    raise ValueError(name)
    except OSError as error:
        raise VoxtralError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise VoxtralError(f"{path}: damaged or cut short, or no weights in float32, float16,"
                           f" bfloat16 or MLX's quantisation ({type(error).__name__}: {error})") from error


def converted_name(name: str, table: dict[str, str]) -> str:
    """A tensor's name in the converted layout; a name that the table does not know stays as it is."""
    for prefix in ("mm_streams_embeddings.embedding_module.", "mm_whisper_embeddings."):
        name = name.removeprefix(prefix)
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"(.*\blayers|.*_layers)\.(\d+)(\..+)", module):
        layer, inside = table.get(f"{match[1]}.N"), table.get(match[3])
        if layer and inside:
            return f"{layer.replace('N', match[2])}{inside}.{kind}"
    return f"{table.get(module, module)}.{kind}"


def interleaved(w: mx.array, head_dim: int) -> mx.array:
    """Rows of q or k [H * head_dim, ...] from transformers' rotary order to pairs of neighbours.

    There the pair (i, i + head_dim / 2) turns together, in every other layout (2i, 2i + 1).
    """
    return w.reshape(-1, 2, head_dim // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def read_weights(folder: Path, layout: str, model: Voxtral) -> dict[str, mx.array]:
    """All tensors of a checkpoint under their converted names; lazy, nothing is read yet."""
    weights: dict[str, mx.array] = {}
    for path in weight_files(folder, layout):
        check_safetensors(path)
        try:
            tensors = mx.load(str(path))
        except (RuntimeError, ValueError) as error:
            raise VoxtralError(f"{path}: cannot be loaded ({error})") from error
        for theirs, w in tensors.items():
            name = converted_name(theirs, TABLES[layout])
            if theirs in TIED:
                continue
            if name in weights:
                raise VoxtralError(f"{path}: the tensor {theirs} stands in the checkpoint twice")
            foreign = layout in ("original", "transformers")
            if foreign and re.fullmatch(r"encoder\.conv\d\.weight", name) and w.ndim == 3:
                w = w.swapaxes(1, 2)  # [out, in, kernel] -> [out, kernel, in]
            if layout == "transformers" and re.search(r"\.[qk]_proj\.", name):
                args = model.encoder_args if name.startswith("encoder") else model.decoder_args
                w = interleaved(w, args.head_dim) if w.shape[0] % args.head_dim == 0 else w
            weights[name] = w
    return weights


def prepare_model(folder: Path, dtype: mx.Dtype | None) -> tuple[Voxtral, dict]:
    """The model of a folder with its weights in place, still lazy, and its configuration."""
    layout, config = read_config(folder)
    model = Voxtral(config)
    weights = read_weights(folder, layout, model)
    if any(name.endswith(".scales") for name in weights):
        settings = section(config, "quantization")
        group_size, bits = (number(settings, name) for name in ("group_size", "bits"))
        try:
            # What is quantised is what the file has scales of, whatever rule its writer followed.
            nn.quantize(model, group_size, bits, class_predicate=lambda path, _: f"{path}.scales" in weights)
        except ValueError as error:
            raise VoxtralError(f"{folder}: quantisation that does not fit the model ({error})") from error
    check_weights(folder, model, weights)
    # One type throughout, so that no stray float32 norm turns all activations behind it to float32.
    dtype = dtype or weights["encoder.conv1.weight"].dtype
    weights = {name: w if w.dtype == mx.uint32 else w.astype(dtype) for name, w in weights.items()}
    model.load_weights(list(weights.items()))
    return model, config


def check_weights(folder: Path, model: Voxtral, weights: dict[str, mx.array]) -> None:
    """Raise VoxtralError, naming up to five tensors, unless `weights` are just those of `model`."""
    expected: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    wrong = [
        f"{name} is {list(weights[name].shape)}, not {list(w.shape)}"
        for name, w in expected.items()
        if name in weights and (weights[name].shape, weights[name].dtype == mx.uint32)
        != (w.shape, w.dtype == mx.uint32)
    ]
    for what, names in (
        ("missing", sorted(expected.keys() - weights.keys())),
        ("unexpected", sorted(weights.keys() - expected.keys())),
        ("of the wrong shape", wrong),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise VoxtralError(f"{folder}: tensors are {what}: {', '.join(names[:5])}{more}")


def load_tokenizer(folder: Path) -> Any:
    """mistral-common's Tekkenizer of a folder; its `audio` holds the constants of the stream."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    path = folder / "tekken.json"
    if not path.is_file():
        raise VoxtralError(f"{folder}: has no tekken.json, the tokenizer of mistralai's repository")
    try:
        tokenizer = Tekkenizer.from_file(path)
        tokenizer.get_special_token("[STREAMING_PAD]"), tokenizer.get_special_token("[STREAMING_WORD]")
    except Exception as error:  # whatever mistral-common trips over, the file is what is wrong
        reason = f"{type(error).__name__}: {error}"[:200]
        raise VoxtralError(f"{path}: not a tokenizer that this mistral-common reads ({reason})") from error
    if tokenizer.audio is None or not tokenizer.audio.is_streaming:
        raise VoxtralError(f"{path}: not the tokenizer of a Realtime model (no streaming audio section)")
    return tokenizer


def load_voxtral_model(
    path_or_id: str | Path = DEFAULT_MODEL_ID, dtype: str | mx.Dtype | None = None
) -> tuple[Voxtral, Any, dict]:
    """Load a checkpoint: a folder in any of the four layouts, or a hub id, which is downloaded.

    `dtype` ("float32", "float16", "bfloat16" or an mx.Dtype) is the type to compute in; by default
    that of the weights. Returns the model, its tokenizer and its configuration (as in params.json).
    Raises VoxtralError for anything that is missing, damaged or does not fit together.
    """
    folder = find_folder(path_or_id)
    model, config = prepare_model(folder, getattr(mx, dtype) if isinstance(dtype, str) else dtype)
    tokenizer = load_tokenizer(folder)
    audio, mel = tokenizer.audio, model.spectrogram
    samples = mel.hop_length * 2 * model.downsample_factor
    theirs = (tokenizer.n_words, audio.sampling_rate, audio.raw_audio_length_per_tok)
    if theirs != (model.vocab_size, SAMPLE_RATE, samples):
        raise VoxtralError(
            f"{folder}: tokenizer and model differ: (vocabulary, sampling rate, samples per token)"
            f" is {theirs} in tekken.json and {(model.vocab_size, SAMPLE_RATE, samples)} in the model"
        )
    mx.eval(model.parameters())
    return model, tokenizer, config


def find_folder(path_or_id: str | Path) -> Path:
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise VoxtralError(f"{path}: is a file; a model is a folder")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)) or str(path_or_id)[0] in "./~":
        raise VoxtralError(f"{path_or_id}: no such folder, and not a hub id (owner/name)")
    return download_weights(str(path_or_id))


def choose_files(names: Iterable[str], config: dict) -> list[str]:
    """Of a repository's files those to download: one set of weights, its configuration, tekken.json.

    `config` is the content of its config.json. mistralai's repository holds the 8.9 GB twice.
    """
    names = set(names)
    shards = {name for name in names if re.fullmatch(r"model-.*\.safetensors", name)}
    weights = {"model.safetensors"} & names or shards
    chosen = {"config.json", "model.safetensors.index.json"} | weights
    if "multimodal" not in config and {"params.json", "consolidated.safetensors"} <= names:
        chosen = weights = {"params.json", "consolidated.safetensors"}
    if not weights or "tekken.json" not in names:
        raise VoxtralError("the repository has no weights in safetensors, or no tekken.json")
    return sorted((chosen | {"tekken.json"}) & names)


def download_weights(model_id: str) -> Path:
    """Download what is needed of a hub repository, or find it in the cache; return its folder."""
    from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

    try:
        names = [file.rfilename for file in HfApi().model_info(model_id).siblings or []]
        config: Any = {}
        if "config.json" in names:
            config = read_json(Path(hf_hub_download(model_id, "config.json")))
        return Path(snapshot_download(model_id, allow_patterns=choose_files(names, config)))
    except VoxtralError as error:
        raise VoxtralError(f"{model_id}: {error}") from error
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise VoxtralError(
            f"{model_id}: no such repository on the hub, or a private one (then: hf auth login)"
        ) from error
    except Exception as error:  # the hub is out of reach, in one of a dozen classes of exceptions
        try:
            return Path(snapshot_download(model_id, local_files_only=True))
        except Exception:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise VoxtralError(
                f"{model_id}: cannot be downloaded ({reason}); with the files on disk: --model FOLDER"
            ) from error


def convert(
    path_or_id: str | Path, out_dir: str | Path, *,
    bits: int | None = None, group_size: int = 64, dtype: str | mx.Dtype | None = None,
) -> tuple[int, int]:
    """Write a checkpoint in the converted layout, quantised to `bits` if given.

    Returns the bytes of its tensors before and after. Raises VoxtralError if `out_dir` exists and
    is not empty; whatever happens, nothing appears there before all of it is written.
    """
    folder, out = find_folder(path_or_id), Path(out_dir).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise VoxtralError(f"{out}: exists and is not an empty folder")
    model, config = prepare_model(folder, getattr(mx, dtype) if isinstance(dtype, str) else dtype)
    load_tokenizer(folder)
    before = sum(path.stat().st_size for path in weight_files(folder, read_config(folder)[0]))
    if bits is not None:
        if "quantization" in config:
            raise VoxtralError(f"{folder}: is quantised already")
        # All Linear layers and the embedding, which is the output layer too: their bytes are the
        # time of a step. Norms, biases and the two convolutions are under 0.1 % of the bytes and
        # stay. ada_norm.linear_in runs once a stream and could stay, but voxmlx expects it here.
        nn.quantize(
            model, group_size, bits, class_predicate=lambda _, module: hasattr(module, "to_quantized")
            and module.weight.shape[-1] % group_size == 0,
        )
        config = {**config, "quantization": {"group_size": group_size, "bits": bits}}
    weights = dict(tree_flatten(model.parameters()))
    del model  # each tensor is read, written and forgotten
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, ignore_cleanup_errors=True) as scratch:
            after = write_checkpoint(Path(scratch) / "model", weights, config, folder / "tekken.json")
            os.replace(Path(scratch) / "model", out)
    except OSError as error:
        raise VoxtralError(f"{out}: cannot be written ({error.strerror})") from error
    return before, after


def write_checkpoint(out: Path, weights: dict[str, mx.array], config: dict, tekken: Path) -> int:
    """Write shards of under 5 GB with their index, config.json and tekken.json; empties `weights`."""
    out.mkdir()
    shards: list[list[str]] = [[]]
    sizes = {name: w.nbytes for name, w in weights.items()}
    for name in sizes:
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + sizes[name] > 4_900_000_000:
            shards.append([])
        shards[-1].append(name)
    where = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: weights.pop(name) for name in names}
        mx.save_safetensors(str(out / file), shard, metadata={"format": "mlx"})
        where.update(dict.fromkeys(names, file))
        note(f"wrote {file}: {sum(map(sizes.get, names)) / 1e9:.2f} GB")
    total = sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (out / "config.json").write_text(json.dumps(config, indent=1))
    (out / "tekken.json").write_bytes(tekken.read_bytes())
    return total


# ------------------------------------------------------------------------------------------ stream
# The schedule. For each 80 ms of sound one token is generated, from the sum of the last token's
# embedding and the sound's; this goes on as long as there is sound, and nothing else ends it.
#
# The prompt is BOS and then [STREAMING_PAD] for 32 frames of silence plus the delay, so the first
# token that is generated has heard `delay` + 1 frames of the recording. A second of "one two" at a
# delay of 160 ms (2 frames); token k is generated when the sound of frames 0 .. k + 2 is in:
#
#       frame   0    1    2    3    4    5    6    7    8    9   10   11   12
#       sound   .    o    n    e    .    .    t    w    o    .    .    .    .
#       token             .    .    .   [W] " one"  .    .    .   [W]  " t" "wo"
#                         k=0  1    2    3    4    5    6    7    8    9   10
#
# [STREAMING_WORD] comes when the word is over and the delay has passed: opened at token k = 3, the
# word ended in frame 3, so at (k + 1) * 80 ms = 320 ms. Times of words come from this alone.


@dataclass(frozen=True)
class Word:
    """A group of text that [STREAMING_WORD] opened, with its place in the audio in seconds.

    Mostly one word; the model may put several into a group, and in scripts without spaces a group
    is what it heard as one. `text` has its leading space: the texts joined are the transcript.
    `start` is an estimate: the end of the word before, but at most `LONGEST` before `end`.
    """

    text: str
    start: float
    end: float


LONGEST = 0.4  # seconds; what a spoken word takes on average


@dataclass
class Transcript:
    """What was said: text, generated token ids (one per 80 ms), words with times."""

    text: str
    tokens: list[int]
    words: list[Word]


def transcribe(
    model: Voxtral, tokenizer: Any, audio: np.ndarray, *,
    delay_ms: float | None = None, temperature: float = 0.0,
) -> Transcript:
    """Transcribe 16 kHz mono samples [n], float, within -1..1; see Stream."""
    stream = Stream(model, tokenizer, delay_ms=delay_ms, temperature=temperature)
    stream.feed(audio)
    stream.finish()
    return Transcript(stream.text, stream.tokens, stream.words)


class Stream:
    """Speech to text as the speech comes: `feed` sound of any length, at a pause `flush`, `finish`.

    `delay_ms`, a multiple of 80 from 80 to 2400, is how long the model listens on before it commits
    to a word (default: tekken.json's, 480). `temperature` 0 takes the likeliest token.
    `text`, `words` and `tokens` hold all that came so far; memory is otherwise constant.
    Raises VoxtralError for an impossible delay and for samples that are not finite floats [n].
    """

    def __init__(self, model: Voxtral, tokenizer: Any, *, delay_ms: float | None = None, temperature: float = 0.0):
        audio = tokenizer.audio
        frame = audio.frame_duration_ms
        if delay_ms is not None and not (frame <= delay_ms <= 30 * frame and delay_ms % frame == 0):
            raise VoxtralError(f"a delay of {delay_ms} ms: it must be a multiple of 80 from 80 to 2400")
        self.text, self.words, self.tokens = "", [], []
        self._model, self._tokenizer, self._temperature = model, tokenizer, temperature
        self._delay = audio.get_num_delay_tokens(delay_ms)
        self._right_pad = audio.n_right_pad_tokens(delay_ms)
        self._word_id = tokenizer.get_special_token("[STREAMING_WORD]")
        pad_id = tokenizer.get_special_token("[STREAMING_PAD]")
        prompt = [tokenizer.bos_id] + [pad_id] * (audio.n_left_pad_tokens + self._delay)
        self._frame = audio.raw_audio_length_per_tok  # samples: 1280, 80 ms
        # The windows of 8 mel frames, enough for one token, are windows themselves. In front of the
        # signal: half a window, to centre the first frame on it, and the prompt's silence.
        mel = model.spectrogram
        self._samples = Carry(
            kernel=self._frame - mel.hop_length + mel.window_size,
            stride=self._frame,
            zeros=mel.window_size // 2 + audio.n_left_pad_tokens * self._frame,
        )
        self._memory = AudioMemory(model)
        self._ffn_weights = model.language_model.ffn_weights(self._delay)
        self._caches = [KVCache(model.decoder_args) for _ in model.language_model.layers]
        self._waiting: mx.array | None = None  # audio embeddings [1, n, D] not yet decoded
        self._token = mx.array([prompt])  # [1, n]: what the next n of them are added to
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._group: int | None = None  # the token that opened a group which has no text yet
        self._fed = 0  # samples so far, with the silence that flush put in
        self._pause = (0, 0, 0)  # the last flush, in samples: its place, its silence, all before it
        self._last_frame: float = math.inf  # where the recording ends, once finish knows
        self._ended = False

    def feed(self, samples: np.ndarray) -> str:
        """Take the next samples [n] and return the text that they made possible, often none."""
        samples = np.asarray(samples)
        if samples.ndim != 1 or samples.dtype.kind != "f" or not np.isfinite(samples).all():
            raise VoxtralError("samples must be finite floats in one dimension, at 16 kHz")
        if self._last_frame < math.inf:
            raise VoxtralError("this stream is finished")
        return self._run(samples)

    def flush(self) -> str:
        """At a pause: push the words still pending out with silence; the stream stays open.

        The times of later words are those of the recording, without that silence.
        """
        start, silence, before = self._pause
        if self._fed == start + silence:
            return ""  # nothing was said since
        frames = -(-self._fed // self._frame) + self._right_pad
        self._pause = (self._fed, frames * self._frame - self._fed, before + silence)
        return self._run(np.zeros(self._pause[1], np.float32))

    def finish(self) -> str:
        """End the recording and return the rest of its text."""
        self._last_frame = min(self._last_frame, -(-self._fed // self._frame))
        text = self.flush()
        # What the last windows look ahead: the rest of the centring.
        text += self._run(np.zeros(self._model.spectrogram.window_size // 2, np.float32))
        return text + self._write(self._utf8.decode(b"", final=True))

    @property
    def time(self) -> float:
        """Up to which time of the recording, in seconds, every word has been written."""
        return self._audio_time(len(self.tokens))

    def _run(self, samples: np.ndarray) -> str:
        """The one path: samples to spectrogram, embeddings, tokens, text."""
        before = len(self.text)
        self._fed += len(samples)
        block = self._model.encoder_block * self._frame
        for start in range(0, len(samples), block):
            piece = np.asarray(samples[start : start + block], np.float32)
            windows = self._samples(piece[:, None])[:, 0]
            if len(windows):
                mel = self._model.spectrogram.frames(windows)
                self._decode(self._model.embed_audio(mel[None], self._memory))
        return self.text[before:]

    def _decode(self, audio: mx.array) -> None:
        """Generate tokens from the next audio embeddings [1, n, D], the prompt's first."""
        if self._waiting is not None:
            audio = mx.concatenate([self._waiting, audio], axis=1)
        unread = None
        while not self._ended and self._token.shape[1] <= audio.shape[1]:
            n = self._token.shape[1]  # the whole prompt at first, then one token at a time
            self._token = self._generate(self._token, audio[:, :n])
            audio = audio[:, n:]
            if unread is not None:  # reading waits for the step before, while this one runs
                self._take(unread.item())
            unread = self._token
        if unread is not None:
            self._take(unread.item())
        self._waiting = audio

    def _generate(self, token: mx.array, audio: mx.array) -> mx.array:
        """Submit one step: tokens [1, n] and audio embeddings [1, n, D] -> the next token [1, 1]."""
        decoder = self._model.language_model
        x = decoder(decoder.embed_tokens(token) + audio, self._ffn_weights, self._caches)
        logits = decoder.embed_tokens.as_linear(x[:, -1])  # [1, vocabulary]: only the last counts
        if self._temperature > 0:
            token = mx.random.categorical(logits / self._temperature)[None]
        else:
            token = mx.argmax(logits, axis=-1)[None]
        mx.async_eval(token)
        return token

    def _take(self, token: int) -> None:
        """Append a generated token and its text."""
        k = len(self.tokens)
        # The end of sequence is a token like any other until the recording is over.
        if self._ended or (token == self._tokenizer.eos_id and k + self._delay >= self._last_frame):
            self._ended = True
            return
        self.tokens.append(token)
        if token == self._word_id:
            self._group = k
        else:  # special tokens have no bytes, and a character's bytes may come in several tokens
            self._write(self._utf8.decode(self._tokenizer.id_to_byte_piece(token)))
        if k % 256 == 0:
            mx.clear_cache()  # freed buffers of sizes that do not come again

    def _write(self, text: str) -> str:
        """Append text, to the open group's word or to the last one."""
        text = text if self.text else text.lstrip()
        if text and (self._group is not None or not self.words):
            end = self._audio_time((len(self.tokens) - 1 if self._group is None else self._group) + 1)
            start = max(self.words[-1].end if self.words else 0.0, end - LONGEST)
            self.words.append(Word(text, round(start, 3), round(end, 3)))
            self._group = None
        elif text:
            self.words[-1] = replace(self.words[-1], text=self.words[-1].text + text)
        self.text += text
        return text

    def _audio_time(self, frames: int) -> float:
        """Seconds in the recording at the end of so many frames of the stream."""
        start, silence, before = self._pause
        end = frames * self._frame
        return (min(end, max(start, end - silence)) - before) / SAMPLE_RATE


# ------------------------------------------------------------------------------------------ output


def columns(text: str) -> int:
    """The width on a screen: East Asian wide characters take two columns."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrap(text: str, width: int = 42) -> list[str]:
    """Break text into lines at spaces and around wide characters, not before closing punctuation."""
    units = [""]
    for c in text:
        wide = columns(units[-1][-1:] + c) > len(units[-1][-1:] + c)
        if c.isspace() or (wide and unicodedata.category(c) not in ("Po", "Pe", "Pf")):
            units.append("")
        units[-1] += c
    lines = [""]
    for unit in units:
        if columns((lines[-1] + unit).strip()) > width and lines[-1].strip():
            lines.append("")
        for c in unit:  # one by one, for a unit longer than a line
            if columns((lines[-1] + c).strip()) > width:
                lines.append("")
            lines[-1] += c
    return [line.strip() for line in lines if line.strip()]


class Subtitles:
    """Cues of SubRip or WebVTT from words, each written as soon as it is complete.

    A cue ends before a pause of over 0.8 s, after a sentence, and before it would last over 7 s or
    need more than two lines of 42 columns.
    """

    def __init__(self, kind: str):
        self.kind, self.written, self.used = kind, 0, 0
        self.cue: list[Word] = []

    def update(self, words: list[Word], time: float = math.inf) -> str:
        """The cues that are complete now that all words up to `time` seconds are known."""
        out = "WEBVTT\n\n" if self.kind == "vtt" and not self.written and not self.used else ""
        # The last word may still grow, until no other can come within a pause of it.
        settled = bool(words) and time > words[-1].end + 0.8 + LONGEST
        for word in words[self.used : None if settled else -1]:
            if self.cue and self.breaks_before(word):
                out += self.take_cue()
            self.cue.append(word)
            self.used += 1
        return out + self.take_cue() if settled and self.cue else out

    def breaks_before(self, word: Word) -> bool:
        text = "".join(other.text for other in self.cue)
        return (
            word.start - self.cue[-1].end > 0.8
            or word.end - self.cue[0].start > 7
            or re.search(r"[.!?…。！？][\"'”’»)\]」』]*\s*$", text) is not None
            or len(wrap(text + word.text)) > 2
        )

    def take_cue(self) -> str:
        lines = wrap("".join(word.text for word in self.cue))
        start, end, out = self.cue[0].start, self.cue[-1].end, ""
        step = (end - start) / max(1, -(-len(lines) // 2))  # a group alone may need several cues
        for i in range(0, len(lines), 2):
            self.written += 1
            out += f"{self.written}\n" if self.kind == "srt" else ""
            out += f"{self.clock(start)} --> {self.clock(start + step)}\n"
            out += "\n".join(lines[i : i + 2]) + "\n\n"
            start += step
        self.cue = []
        return out

    def clock(self, seconds: float) -> str:
        ms = round(seconds * 1000)
        comma = "," if self.kind == "srt" else "."
        return f"{ms // 3600000:02}:{ms // 60000 % 60:02}:{ms // 1000 % 60:02}{comma}{ms % 1000:03}"


# ------------------------------------------------------------------------------------ command line


def standard_input(blocks: queue.Queue) -> None:
    """Read sound from standard input into a queue of blocks at 16 kHz, or the error; None ends it.

    A WAV stream of any rate, or raw 16-bit little-endian mono 16 kHz samples. It runs in a thread,
    so that a slow step of the model loses nothing.
    """
    import soundfile

    try:
        head = sys.stdin.buffer.read(4)  # libsndfile reads from pipes, but must be told what is raw
        pipe, into = os.pipe()
        threading.Thread(target=pump, args=(head, into), daemon=True).start()
        raw = dict(format="RAW", subtype="PCM_16", endian="LITTLE", samplerate=SAMPLE_RATE, channels=1)
        known = head in (b"RIFF", b"RF64", b"fLaC", b"OggS") or head[:3] == b"ID3"
        with soundfile.SoundFile(pipe, **({} if known else raw)) as sound:
            pieces = sound.blocks(sound.samplerate // 25, dtype="float32", always_2d=True)
            for block in to_16k(pieces, sound.samplerate):
                blocks.put(block)
        blocks.put(None)
    except soundfile.SoundFileError as error:
        blocks.put(VoxtralError(f"not sound that can be read from a pipe, or cut short ({error})"))
    except Exception as error:  # to be raised where it is waited for
        blocks.put(error)


def pump(head: bytes, into: int) -> None:
    with open(into, "wb", buffering=0) as pipe:
        pipe.write(head)
        while data := sys.stdin.buffer.read1(1 << 16):
            pipe.write(data)


def arriving_samples(quiet: bool) -> Iterator[np.ndarray]:
    """Standard input as it comes: whatever has arrived, up to 4 s at a time."""
    if sys.stdin.isatty():
        raise VoxtralError("is a terminal; pipe sound into it")
    blocks: queue.Queue = queue.Queue(1 << 14)  # of 40 ms: a writer that is 10 minutes ahead waits
    threading.Thread(target=standard_input, args=(blocks,), daemon=True).start()
    started, done = time.monotonic(), 0.0
    while True:
        pieces = [blocks.get()]
        while len(pieces) < 100 and not blocks.empty():
            pieces.append(blocks.get())
        if sound := [piece for piece in pieces if isinstance(piece, np.ndarray)]:
            yield np.concatenate(sound)
        if isinstance(pieces[-1], Exception):
            raise pieces[-1]
        if pieces[-1] is None:
            return
        done += len(sound) / 25
        # A file in a pipe is there at once; a microphone's sound comes no faster than time.
        behind = min(time.monotonic() - started, done + blocks.qsize() / 25) - done
        if behind > 2 and not quiet:
            quiet = True  # once is enough
            note(f"standard input: decoding is {behind:.1f} s behind")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="voxtral.py", description="Speech to text with Voxtral Mini 4B Realtime, in MLX."
    )
    add = parser.add_argument
    add("audio", nargs="*", help="audio files (wav, flac, ogg, mp3, aiff), or - for standard input:"
        " a WAV stream or raw 16-bit little-endian mono 16 kHz samples, transcribed as they arrive")
    add("--model", default=DEFAULT_MODEL_ID, help="folder or hub id (default: %(default)s)")
    add("--delay", type=int, metavar="MS", help="how long to listen before a word is committed: a"
        " multiple of 80 from 80 to 2400 (default: the model's, 480)")
    add("--format", choices=("text", "srt", "vtt", "json"), default="text", help="default: text")
    add("--temperature", type=float, default=0.0, help="sampling temperature (default: 0, greedy)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="type to compute in")
    add("--quiet", action="store_true", help="no progress, no summary")
    add("--convert", metavar="DIR", help="write a converted checkpoint to DIR instead")
    add("--bits", type=int, choices=(4, 6, 8), help="with --convert: quantise to so many bits")
    add("--group-size", type=int, choices=(32, 64, 128), default=64, help="... in groups of so many")
    args = parser.parse_args(argv)
    if bool(args.audio) == bool(args.convert):
        parser.error("name audio to transcribe, or --convert DIR; not both")
    if args.audio.count("-") > 1:
        parser.error("standard input (-) can be read only once")
    if not 0 <= args.temperature < math.inf:
        parser.error("--temperature must be 0 or more")
    return args


def run_file(name: str, model: Voxtral, tokenizer: Any, args: argparse.Namespace, out: Any) -> None:
    """Transcribe one file, or standard input, to `out`; progress goes to standard error."""
    stream = Stream(model, tokenizer, delay_ms=args.delay, temperature=args.temperature)
    if name == "-":
        total, pieces = "", arriving_samples(args.quiet)
    else:
        samples, step = load_audio(name), 4 * SAMPLE_RATE
        total = f" / {len(samples) / SAMPLE_RATE:.1f}"
        pieces = (samples[i : i + step] for i in range(0, len(samples), step))
    subtitles = Subtitles(args.format) if args.format in ("srt", "vtt") else None
    # On a terminal the text itself shows the progress.
    progress = sys.stderr.isatty() and not args.quiet and not (args.format == "text" and out.isatty())
    began, seconds, erase = time.perf_counter(), 0.0, ""
    try:
        for piece in itertools.chain(pieces, [None]):
            if piece is None and not seconds:
                raise VoxtralError("holds no samples")
            text = stream.finish() if piece is None else stream.feed(piece)
            seconds += 0 if piece is None else len(piece) / SAMPLE_RATE
            speed = f"{seconds / (time.perf_counter() - began):.1f} x real time"
            if subtitles:
                text = subtitles.update(stream.words, math.inf if piece is None else stream.time)
            if args.format != "json":
                sys.stderr.write(erase)
                print(text, end="", file=out, flush=True)
            if progress:
                erase = "\r\033[K"
                print(f"{erase}{seconds:.1f}{total} s, {speed}", end="", file=sys.stderr, flush=True)
    finally:
        sys.stderr.write(erase)
        if args.format == "text" and (stream.text or seconds):
            print(file=out, flush=True)
    if args.format == "json":
        delay = args.delay or int(tokenizer.audio.transcription_delay_ms)
        record = dict(file=name, model=args.model, delay_ms=delay, duration=round(seconds, 3), text=stream.text)
        record |= dict(words=[asdict(word) for word in stream.words], tokens=stream.tokens)
        print(json.dumps(record, ensure_ascii=False), file=out, flush=True)
    if not args.quiet:
        note(f"{name}: {seconds:.1f} s of audio in {time.perf_counter() - began:.1f} s, {speed}")


def transcribe_command(args: argparse.Namespace) -> int:
    files = [name for name in args.audio if name == "-" or Path(name).exists()]
    for name in args.audio:
        if name not in files:  # better known before gigabytes are loaded
            complain(f"{name}: no such file")
    if not files:
        return 1
    began = time.perf_counter()
    model, tokenizer, _ = load_voxtral_model(args.model, args.dtype)
    size, device = sum(w.nbytes for _, w in tree_flatten(model.parameters())), mx.default_device()
    if not args.quiet:
        note(f"{args.model}: {size / 1e9:.2f} GB loaded in {time.perf_counter() - began:.1f} s, {device}")
        if device == mx.cpu and size > 1e9:
            note("MLX has only the CPU here: expect this to be far slower than real time")
    world = mx.distributed.init() if len(files) > 1 else None  # under mlx.launch: one of several
    failed = len(files) < len(args.audio)
    for name in files[world.rank() :: world.size()] if world else files:
        out = io.StringIO() if world and world.size() > 1 else sys.stdout
        try:
            run_file(name, model, tokenizer, args, out)
        except VoxtralError as error:
            failed = True
            complain(str(error) if name in str(error) else f"{name}: {error}")
        if out is not sys.stdout:  # in one piece, between those of the other processes
            print(out.getvalue(), end="", flush=True)
    return int(failed)


def complain(message: str) -> int:
    """Say on one line what is wrong; the exit code for it."""
    note("voxtral.py: " + " ".join(message.split()))
    return 1


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        if args.convert:
            before, after = convert(
                args.model, args.convert, bits=args.bits, group_size=args.group_size, dtype=args.dtype
            )
            note(f"{args.convert}: {before / 1e9:.2f} GB -> {after / 1e9:.2f} GB")
            return 0
        return transcribe_command(args)
    except VoxtralError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return complain("standard output was closed")


if __name__ == "__main__":
    sys.exit(main())
