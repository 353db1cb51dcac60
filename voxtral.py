#!/usr/bin/env python3
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
            the last text token *plus* that of 80 ms of sound, and it writes exactly one token:
            mostly [STREAMING_PAD], nothing to say yet; or [STREAMING_WORD], which announces a word,
            whose tokens follow, one per frame.
  delayed   The text runs some frames behind the sound: a longer delay hears more, errs less and
            answers later. One set of weights serves delays from 80 ms to 2.4 s; a small network
            turns the one it works at into a scale on the norms of the decoder.

So a file is a stream that arrives at once, and there is one path through the code: `Stream.feed`
any number of samples, then `Stream.finish`; `transcribe` is just these two.

Letters in shapes: B batch (1 in a stream), F mel frames, T new positions, D dim, H heads, C
channels. Sources: the Voxtral Realtime report (arXiv 2602.11298); delayed streams (Kyutai, arXiv
2509.08753); params.json of mistralai/Voxtral-Mini-4B-Realtime-2602; and mistral-common, which owns
the tokenizer and every constant of the audio format.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
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
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

# mistral-common, huggingface_hub, soundfile, soxr are slow to import: only where they are needed.

DEFAULT_MODEL_ID = "mlx-community/Voxtral-Mini-4B-Realtime-6bit"
SAMPLE_RATE = 16_000  # load_voxtral_model checks that the tokenizer says so too

class VoxtralError(Exception):
    """A mistake that the user can mend; the message says what is wrong, on one line."""

# ------------------------------------------------------------------------------------------- audio
# Sound to a log-mel spectrogram. The numbers are those of mistral-common's AudioSpectrogramConfig.

def load_audio(path: str | Path) -> np.ndarray:
    """Read an audio file as float32 mono samples [n] at 16 kHz, nominally within -1..1.

    Whatever libsndfile reads (wav, flac, ogg, mp3, aiff), any rate; channels are averaged. Raises
    OSError, and VoxtralError for what is not such a file, cut short, empty or not finite.
    """
    import soundfile  # type: ignore[import-untyped]
    try:
        with open(path, "rb") as file, soundfile.SoundFile(file) as sound:
            samples = np.concatenate(list(to_16k(sound, 1 << 16)))
            missing, log = sound.frames - sound.tell(), sound.extra_info
    except soundfile.SoundFileError as error:
        raise VoxtralError(f"{path}: damaged, or no audio that libsndfile reads; if ffmpeg does:"
                           " ffmpeg -i FILE -f wav - | python voxtral.py -") from error
    # What is left of a file that was cut short is read without an error; only the log tells. A
    # size near 2 or 4 GiB is no promise: it was written to a pipe, before the size was known.
    sizes = re.findall(r": (\d+) \(should be (\d+)\)", log)
    cut = any(int(real) < int(claimed) < 0x7FFF0000 for claimed, real in sizes)
    if cut or missing > 0 or re.search("(?i)(without an|lacks an) end-of-stream", log):
        raise VoxtralError(f"{path}: the file is cut short")
    if len(samples) == 0 or not np.isfinite(samples).all():
        raise VoxtralError(f"{path}: holds no samples, or some that are NaN or infinite")
    return samples

def to_16k(sound: Any, n: int) -> Iterator[np.ndarray]:
    """An open soundfile.SoundFile, n of its samples at a time -> blocks of mono sound at 16 kHz."""
    import soxr  # type: ignore[import-untyped]
    rate = sound.samplerate  # of the file, in Hz
    if rate < 1000:
        raise VoxtralError(f"a sample rate of {rate} Hz carries no speech")
    resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    # To the first empty block: the number of samples that a header promises may be anything.
    while len(block := sound.read(n, dtype="float32", always_2d=True)):
        mono = block.mean(axis=1)  # [n, channels] -> [n]
        yield mono if rate == SAMPLE_RATE else resampler.resample_chunk(mono)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)

@dataclass(frozen=True)
class Spectrogram:
    """The log-mel front end; the defaults are the published model's."""
    num_mel_bins: int = 128  # up to half the sampling rate, evenly on Slaney's scale
    hop_length: int = 160  # samples: 10 ms
    window_size: int = 400  # samples: 25 ms
    global_log_mel_max: float = 1.5  # what log10 of the power is taken to reach at most

    def frames(self, samples: np.ndarray) -> mx.array:
        """Log-mel [F, num_mel_bins] float32 of the F whole windows in `samples` [n]."""
        from mistral_common.audio import mel_filter_bank
        bins = self.window_size // 2 + 1
        bank = mel_filter_bank(bins, self.num_mel_bins, 0, SAMPLE_RATE / 2, SAMPLE_RATE)
        # Periodic, not symmetric: numpy's window of one more sample without its last.
        hann = np.hanning(self.window_size + 1)[:-1].astype(np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(samples, self.window_size)  # a view
        spectrum = np.fft.rfft(windows[:: self.hop_length] * hann)  # [F, bins]
        power = (np.abs(spectrum) ** 2).astype(np.float32)  # [F, bins]
        log = np.log10(np.maximum(power @ bank.astype(np.float32), 1e-10))  # [F, num_mel_bins]
        # Whisper clips at 8 below the loudest sound of the clip. A stream cannot know that, so a
        # constant of training stands in for it.
        return mx.array((np.maximum(log, self.global_log_mel_max - 8) + 4) / 4)

def log_mel_spectrogram(samples: np.ndarray, spectrogram: Spectrogram = Spectrogram()) -> mx.array:
    """Log-mel of a whole signal: 16 kHz samples [n] -> [n // 160, 128] float32.

    Frame f is centred on sample 160 f, with silence around; as in Whisper, the last is dropped.
    """
    padded = np.pad(np.asarray(samples, np.float32), spectrogram.window_size // 2)
    return spectrogram.frames(padded)[: len(samples) // spectrogram.hop_length]

class Carry:
    """What windows that move along a signal still need of its past.

    They have `kernel` inputs and move by `stride` <= `kernel`; `zeros` stand before the signal.
    After n windows the next begins at input n * stride: from there on everything is kept. (The last
    kernel - stride inputs look like the same, and lack some when a chunk ends between windows.)
    """
    def __init__(self, kernel: int, stride: int, zeros: int):
        self.kernel, self.stride, self.zeros = kernel, stride, zeros
        self.rest: Any = None  # [..., n, C], of the signal's own array type

    def __call__(self, x: Any) -> Any:
        """The next inputs [..., n, C] -> the inputs [..., m, C] of the windows they complete."""
        xp: Any = np if isinstance(x, np.ndarray) else mx
        if self.rest is None:
            self.rest = xp.zeros((*x.shape[:-2], self.zeros, x.shape[-1]), x.dtype)
        x = xp.concatenate([self.rest, x], axis=-2)  # [..., all that is known and needed, C]
        windows = max(0, (x.shape[-2] - self.kernel) // self.stride + 1)
        end = (windows - 1) * self.stride + self.kernel if windows else 0
        self.rest = x[..., windows * self.stride :, :]
        return x[..., :end, :]

# --------------------------------------------------------------------------------------- attention
# What encoder and decoder share. Names and sizes are those of params.json.

@dataclass(frozen=True)
class TransformerArgs:
    """The sizes of a transformer, from one section of params.json."""
    dim: int  # of the vector at a position
    n_layers: int
    n_heads: int  # of queries
    n_kv_heads: int  # of keys and values, each for n_heads / n_kv_heads of queries
    head_dim: int  # of a query, key or value; n_heads of them need not add up to dim
    hidden_dim: int  # inside the feed-forward part
    sliding_window: int  # positions that attention sees, its own included
    rope_theta: float  # rotary pairs turn in 2 pi to (nearly) 2 pi * this positions
    norm_eps: float  # added to the mean square before the root

@lru_cache(maxsize=4)  # the layers of a stack ask for the same one
def window_mask(start: int, T: int, size: int, window: int, dtype: mx.Dtype) -> mx.array:
    """What T positions from `start` on see of a buffer [T, size]: `window`, themselves last."""
    # To be added to the scores: CUDA has a fused kernel for that, and none for a boolean mask.
    distance = np.arange(start, start + T)[:, None] - np.arange(size)  # [T, size]; how far back
    return mx.array(np.where((distance >= 0) & (distance < window), 0, mx.finfo(dtype).min), dtype)

class KVCache:
    """Rotated keys, and values, of the last `window` positions, oldest first; and their attention.

    The buffer is appended to in place; a full one is replaced by one with as much room again, which
    starts with the entries still in the window. A position is an *index into the buffer*: attention
    sees only differences, so the kept keys are turned back to the new origin, each at most once.
    Counted from the start of the stream, positions would reach 4.3 million in a day, and float32
    angles be wrong by 0.25 rad.
    """
    def __init__(self, args: TransformerArgs):
        self.window, self.length = args.sliding_window, 0
        sizes: Any = {"dims": args.head_dim, "base": args.rope_theta, "scale": 1.0}
        self.rope: Any = partial(mx.fast.rope, traditional=True, **sizes)  # turns neighbours
        self.keys = self.values = mx.zeros((0, 0, 0))  # the first call makes the buffers

    def __call__(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """T new positions [B, H, T, head_dim], not rotated yet -> what they see, shaped like q."""
        T, kept, w = k.shape[2], min(self.length, self.window - 1), self.window
        first = self.length - kept  # of the entries that are still in the window
        if self.length + T > self.keys.shape[2]:
            old_k = old_v = k[:, :, :0]  # [B, H, 0, head_dim]
            if kept:
                old_k, old_v = (x[:, :, first : self.length] for x in (self.keys, self.values))
                # All turn by one angle: as if each were alone, at position 0, in a batch of keys.
                old_k = self.rope(old_k.swapaxes(0, 2), offset=-first).swapaxes(0, 2)
            room = mx.zeros((*k.shape[:2], max(T, kept), k.shape[3]), k.dtype)
            self.keys = mx.concatenate([old_k, room], axis=2)
            self.values = mx.concatenate([old_v, room], axis=2)
            first, self.length = 0, kept
        start, self.length = self.length, self.length + T  # of the new positions
        self.keys[:, :, start : self.length] = self.rope(k, offset=start)
        self.values[:, :, start : self.length] = v
        attend = partial(mx.fast.scaled_dot_product_attention, scale=q.shape[3] ** -0.5)
        q, size, out = self.rope(q, offset=start), self.keys.shape[2], []
        for i in range(start, self.length, w):  # by windows: a query meets two of them at most
            end = min(i + w, self.length)
            # While a window fills, rows take the whole buffer: CUDA is slow to plan for new shapes.
            a, b = (0, size) if 1 < T <= w and i + 1 < w else (max(first, i + 1 - w), end)
            keys, values = self.keys[:, :, a:b], self.values[:, :, a:b]  # views of the buffer
            if T == 1:  # sees all that is kept
                return attend(q, keys, values)
            mask = window_mask(i - a, end - i, b - a, w, q.dtype)
            out.append(attend(q[:, :, i - start : end - start], keys, values, mask=mask))
        return mx.concatenate(out, axis=2)  # [B, n_heads, T, head_dim]

class Attention(nn.Module):
    """Self-attention over a sliding window; grouped queries where n_kv_heads < n_heads."""
    def __init__(self, args: TransformerArgs, bias: bool):
        super().__init__()
        self.head_dim = args.head_dim
        q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.q_proj = nn.Linear(args.dim, q_dim, bias=bias)
        self.k_proj = nn.Linear(args.dim, kv_dim, bias=False)  # softmax would cancel a bias here
        self.v_proj = nn.Linear(args.dim, kv_dim, bias=bias)
        self.o_proj = nn.Linear(q_dim, args.dim, bias=bias)

    def __call__(self, x: mx.array, cache: KVCache, B: int) -> mx.array:
        T = x.shape[0] // B  # x [B * T, D] -> the same
        # One row needs no swap: [B, 1, H * head_dim] and [B, H, 1, head_dim] are the same numbers.
        heads = (B, -1, 1, self.head_dim) if T == 1 else (B, T, -1, self.head_dim)
        q, k, v = (proj(x).reshape(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if T > 1:
            q, k, v = (y.swapaxes(1, 2) for y in (q, k, v))  # [B, H, T, head_dim]
        out = cache(q, k, v)  # [B, n_heads, T, head_dim]
        return self.o_proj((out if T == 1 else out.swapaxes(1, 2)).reshape(B * T, -1))

swiglu = mx.compile(lambda gate, up: nn.silu(gate) * up, shapeless=True)  # as one kernel

class SwiGLU(nn.Module):
    """The feed-forward part: one projection gates another."""
    def __init__(self, args: TransformerArgs, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.up_proj = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.down_proj = nn.Linear(args.hidden_dim, args.dim, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

class Block(nn.Module):
    """A pre-norm transformer layer; the encoder's have biases."""
    def __init__(self, args: TransformerArgs, bias: bool):
        super().__init__()
        self.attn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args, bias)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.mlp = SwiGLU(args, bias)

    def __call__(self, x: mx.array, cache: KVCache, ffn_weight: mx.array, B: int) -> mx.array:
        """Rows [B * T, D] -> rows; `ffn_weight` [D] stands in for ffn_norm's, see Decoder."""
        x = x + self.attention(self.attn_norm(x), cache, B)  # mixes positions
        return x + self.mlp(mx.fast.rms_norm(x, ffn_weight, self.ffn_norm.eps))  # each by itself

# ------------------------------------------------------------------------ encoder, adapter, decoder

class Encoder(nn.Module):
    """Whisper's encoder made causal: two convolutions, then layers with a sliding window."""
    def __init__(self, args: TransformerArgs, num_mel_bins: int):
        super().__init__()
        self.conv1 = nn.Conv1d(num_mel_bins, args.dim, kernel_size=3)
        self.conv2 = nn.Conv1d(args.dim, args.dim, kernel_size=3, stride=2)
        self.layers = [Block(args, bias=True) for _ in range(args.n_layers)]
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)

    def __call__(self, mel: mx.array, memory: tuple) -> mx.array:
        """The next log-mel frames [B, F, C], F even -> frames as rows [B * F / 2, D]."""
        past1, past2, caches = memory
        x = mel.astype(self.conv1.weight.dtype)  # from here on all is in the type of the weights
        x = nn.gelu(self.conv1(past1(x)))  # [B, F, D]
        x = nn.gelu(self.conv2(past2(x)))  # [B, F / 2, D]
        x = x.reshape(-1, x.shape[2])  # rows: with more dimensions MLX reshapes at each product
        for layer, cache in zip(self.layers, caches):
            x = layer(x, cache, layer.ffn_norm.weight, mel.shape[0])
        return self.norm(x)

class Decoder(nn.Module):
    """A language model whose input at each position is a token's embedding plus a sound's."""
    def __init__(self, args: TransformerArgs, vocab_size: int, ada_dim: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, args.dim)  # also the output layer: tied
        self.layers = [Block(args, bias=False) for _ in range(args.n_layers)]
        for layer in self.layers:
            layer.ada_norm = nn.Module()  # its ear for the delay
            layer.ada_norm.linear_in = nn.Linear(args.dim, ada_dim, bias=False)
            layer.ada_norm.linear_out = nn.Linear(ada_dim, args.dim, bias=False)
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)

    def ffn_weights(self, delay: int) -> list[mx.array]:
        """Each layer's ffn_norm weight [D] times 1 + ada(t), for a delay of so many tokens.

        t embeds the delay as the first transformer did positions: cosines and sines of
        geometrically spaced frequencies. Nothing else enters: it is done once per stream.
        """
        weight, half = self.norm.weight, self.norm.weight.shape[0] // 2
        angles = delay * mx.exp(-math.log(10000.0) * mx.arange(half) / half)  # [D / 2]
        t = mx.concatenate([mx.cos(angles), mx.sin(angles)])[None].astype(weight.dtype)  # [1, D]
        norms = ((layer.ffn_norm, layer.ada_norm) for layer in self.layers)
        return [n.weight * (1 + ada.linear_out(nn.gelu(ada.linear_in(t)))[0]) for n, ada in norms]

    def __call__(self, x: mx.array, ffn_weights: list, caches: list, B: int = 1) -> mx.array:
        """Inputs [B * T, D] -> outputs, also rows; embed_tokens.as_linear makes logits of them."""
        for layer, weight, cache in zip(self.layers, ffn_weights, caches):
            x = layer(x, cache, weight, B)
        return self.norm(x)

class Voxtral(nn.Module):
    """The whole model; `config` is the content of params.json, else KeyError or ValueError."""
    def __init__(self, config: dict):
        super().__init__()
        whisper = config["multimodal"]["whisper_model_args"]
        audio = whisper["encoder_args"]
        self.spectrogram = read_args(Spectrogram, audio["audio_encoding_args"])
        audio = {"n_kv_heads": audio.get("n_heads"), **audio}
        self.encoder_args = encoder = read_args(TransformerArgs, audio)
        self.decoder_args = decoder = read_args(TransformerArgs, config)
        self.downsample_factor = factor = number(whisper["downsample_args"], "downsample_factor")
        self.vocab_size = number(config, "vocab_size")
        ada_dim = number(config, "ada_rms_norm_t_cond_dim")
        self.encoder = Encoder(encoder, self.spectrogram.num_mel_bins)
        self.adapter = nn.Module()  # encoder frames side by side -> the decoder's space
        self.adapter.w_in = nn.Linear(encoder.dim * factor, decoder.dim, bias=False)
        self.adapter.w_out = nn.Linear(decoder.dim, decoder.dim, bias=False)
        self.language_model = Decoder(decoder, self.vocab_size, ada_dim)
        self.block = max(1, 4 * encoder.sliding_window // factor)  # in tokens; keeps a GPU busy

    def audio_memory(self) -> tuple[Carry, Carry, list[KVCache]]:
        """What a stream's encoder remembers between two pieces of sound; of nothing yet."""
        caches = [KVCache(self.encoder_args) for _ in self.encoder.layers]
        return Carry(kernel=3, stride=1, zeros=2), Carry(kernel=3, stride=2, zeros=1), caches

    def embed_audio(self, mel: mx.array, memory: tuple) -> mx.array:
        """The next log-mel frames [B, F, C], F a multiple of 8 -> embeddings [B * F / 8, D]."""
        x = self.encoder(mel, memory)  # [B * F / 2, D of the encoder]
        x = x.reshape(-1, self.downsample_factor * x.shape[1])  # groups of 4 frames
        return self.adapter.w_out(nn.gelu(self.adapter.w_in(x)))

    def encode(self, mel: mx.array) -> mx.array:
        """Log-mel of a whole signal [F, C] -> its audio embeddings [F // 8, D], one per 80 ms."""
        token = 2 * self.downsample_factor  # in log-mel frames; a last part of one is left out
        memory, step, end = self.audio_memory(), self.block * token, len(mel) // token * token
        pieces = (mel[None, i : min(i + step, end)] for i in range(0, end, step))
        sound = [self.embed_audio(piece, memory) for piece in pieces]
        return mx.concatenate(sound) if sound else mx.zeros((0, self.decoder_args.dim))

# ------------------------------------------------------------------------------------- checkpoints
# The weights are published in four layouts: "converted" (voxmlx's), whose names the modules above
# have, and three that call modules differently: Mistral's original, mlx-audio's, transformers'. The
# names in each; N is the index of a layer, and a name that starts with a dot is inside one.

NAMES = (
    ("converted", "original", "mlx-audio", "transformers"),
    ("encoder.conv1", "whisper_encoder.conv_layers.0.conv",
     "encoder.conv_layers_0_conv.conv", "audio_tower.embedder.conv1"),
    ("encoder.conv2", "whisper_encoder.conv_layers.1.conv",
     "encoder.conv_layers_1_conv.conv", "audio_tower.embedder.conv2"),
    ("encoder.layers.N", "whisper_encoder.transformer.layers.N",
     "encoder.transformer_layers.N", "audio_tower.layers.N"),
    ("encoder.norm", "whisper_encoder.transformer.norm",
     "encoder.transformer_norm", "audio_tower.norm"),
    ("adapter.w_in", "audio_language_projection.0",
     "encoder.audio_language_projection_0", "multi_modal_projector.linear_1"),
    ("adapter.w_out", "audio_language_projection.2",
     "encoder.audio_language_projection_2", "multi_modal_projector.linear_2"),
    ("language_model.embed_tokens", "tok_embeddings",
     "decoder.tok_embeddings", "language_model.model.embed_tokens"),
    ("language_model.layers.N", "layers.N", "decoder.layers.N", "language_model.model.layers.N"),
    ("language_model.norm", "norm", "decoder.norm", "language_model.model.norm"),
    (".attn_norm", ".attention_norm", ".attention_norm", ".self_attn_layer_norm"),
    (".attn_norm", ".attention_norm", ".attention_norm", ".input_layernorm"),  # in the decoder
    (".attention.q_proj", ".attention.wq", ".attention.wq", ".self_attn.q_proj"),
    (".attention.k_proj", ".attention.wk", ".attention.wk", ".self_attn.k_proj"),
    (".attention.v_proj", ".attention.wv", ".attention.wv", ".self_attn.v_proj"),
    (".attention.o_proj", ".attention.wo", ".attention.wo", ".self_attn.o_proj"),
    (".ffn_norm", ".ffn_norm", ".ffn_norm", ".final_layer_norm"),
    (".ffn_norm", ".ffn_norm", ".ffn_norm", ".post_attention_layernorm"),  # in the decoder
    (".mlp.gate_proj", ".feed_forward.w1", ".feed_forward_w1", ".mlp.gate_proj"),
    (".mlp.down_proj", ".feed_forward.w2", ".feed_forward_w2", ".mlp.down_proj"),
    (".mlp.up_proj", ".feed_forward.w3", ".feed_forward_w3", ".mlp.up_proj"),
    (".ada_norm.linear_in", ".ada_rms_norm_t_cond.0",
     ".ada_rms_norm_t_cond.ada_down", ".ada_rms_norm.linear1"),
    (".ada_norm.linear_out", ".ada_rms_norm_t_cond.2",
     ".ada_rms_norm_t_cond.ada_up", ".ada_rms_norm.linear2"))
TRANSFORMERS_FIELDS = (  # in params.json, and in transformers' config.json
    ("dim", "hidden_size"), ("n_layers", "num_hidden_layers"), ("n_heads", "num_attention_heads"),
    ("n_kv_heads", "num_key_value_heads"), ("head_dim", "head_dim"), ("vocab_size", "vocab_size"),
    ("hidden_dim", "intermediate_size"), ("sliding_window", "sliding_window"),
    ("norm_eps", "rms_norm_eps"))

def number(config: dict, name: str, kind: str = "int") -> Any:
    """A field of a configuration: a positive number, of a size that can be."""
    value, most = config[name], 1000 if name == "n_layers" else 1 << 24
    if type(value).__name__ not in ("int", kind) or not 0 < value <= most:
        raise ValueError(f"{name} is {value!r}")
    return value

def read_args(cls: Any, config: dict) -> Any:
    """A dataclass of sizes, from the fields of a configuration that have the same names."""
    return cls(**{field.name: number(config, field.name, str(field.type)) for field in fields(cls)})

def read_config(folder: Path) -> tuple[str, dict]:
    """The layout of a folder, one of NAMES[0], and its configuration in the form of params.json."""
    params, path = folder / "params.json", folder / "config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    if "multimodal" in config:
        return "converted", config
    if params.is_file() and (folder / "consolidated.safetensors").is_file():
        return "original", json.loads(params.read_bytes())
    if "encoder_args" in config and "decoder" in config:
        layout, text, audio = "mlx-audio", config["decoder"], config["encoder_args"]
        audio = {"audio_encoding_args": config.get("audio_encoding_args"), **audio}
        factor, kept = audio["downsample_factor"], {"quantization": config.get("quantization")}
    elif config.get("model_type") == "voxtral_realtime":
        layout, factor = "transformers", config["downsample_factor"]
        audio, text = ({our: part[their] for our, their in TRANSFORMERS_FIELDS if their in part}
                       | {"rope_theta": part["rope_parameters"]["rope_theta"]}
                       for part in (config["audio_config"], config["text_config"]))
        audio["audio_encoding_args"] = asdict(Spectrogram())
        kept = {"ada_rms_norm_t_cond_dim": 32}  # a constant of that code
    else:
        what = f"a {config.get('model_type')} checkpoint" if config else "not a model folder"
        raise VoxtralError(f"{folder}: {what}; needed: Voxtral Mini 4B Realtime and its weights")
    whisper = {"encoder_args": audio, "downsample_args": {"downsample_factor": factor}}
    return layout, {**text, **kept, "multimodal": {"whisper_model_args": whisper}}

def weight_files(folder: Path, layout: str) -> list[Path]:
    """The safetensors files of a checkpoint; all of them are there."""
    index = folder / "model.safetensors.index.json"
    if layout == "original":
        names = {"consolidated.safetensors"}
    elif index.is_file():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    else:
        names = {path.name for path in folder.glob("model*.safetensors")} or {"model.safetensors"}
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise VoxtralError(f"{folder}: the weights are incomplete: {name} is not in the folder")
    return [folder / name for name in sorted(names)]

def converted_name(name: str, table: dict[str, str]) -> str:
    """A tensor's name in the converted layout; what the table does not know stays as it is."""
    name = re.sub(r"^(mm_streams_embeddings\.embedding_module|mm_whisper_embeddings)\.", "", name)
    module, _, kind = name.rpartition(".")
    match = re.fullmatch(r"(.*layers)\.(\d+)(\..+)", module)
    if match and f"{match[1]}.N" in table:
        module = table[f"{match[1]}.N"].replace("N", match[2]) + table.get(match[3], match[3])
    return f"{table.get(module, module)}.{kind}"

def read_weights(folder: Path, layout: str, model: Voxtral) -> dict[str, mx.array]:
    """All tensors of a checkpoint under their converted names; lazy, nothing is read yet."""
    table = {names[NAMES[0].index(layout)]: names[0] for names in NAMES[1:]}
    weights: dict[str, mx.array] = {}
    for path in weight_files(folder, layout):
        tensors: Any = mx.load(str(path))
        for theirs, w in tensors.items():
            name = converted_name(theirs, table)
            if layout in ("original", "transformers") and "conv" in name and w.ndim == 3:
                w = w.swapaxes(1, 2)  # [out, in, kernel] -> [out, kernel, in]
            if layout == "transformers" and re.search(r"\.[qk]_proj\.", name):
                # There rows i and i + head_dim / 2 of a head turn together, here neighbours do.
                args = model.encoder_args if name.startswith("encoder") else model.decoder_args
                halves = w.reshape(-1, 2, args.head_dim // 2, *w.shape[1:])
                w = halves.swapaxes(1, 2).reshape(w.shape)
            if not theirs.endswith(("output.weight", "lm_head.weight")):  # the embedding once more
                weights[name] = w
    return weights

def prepare_model(folder: Path, dtype: str | mx.Dtype | None) -> tuple[Voxtral, dict]:
    """The model of a folder with its weights in place, still lazy, and its configuration."""
    try:
        layout, config = read_config(folder)
        model = Voxtral(config)
        weights = read_weights(folder, layout, model)
        if any(name.endswith(".scales") for name in weights):
            settings = config["quantization"]
            # Just what the file has scales of, whatever rule its writer followed.
            nn.quantize(model, settings["group_size"], settings["bits"],
                        class_predicate=lambda path, _: f"{path}.scales" in weights)
        # One type throughout: one float32 norm would turn all activations behind it to float32.
        dtype = dtype or weights["encoder.conv1.weight"].dtype
        dtype = getattr(mx, dtype) if isinstance(dtype, str) else dtype
        typed = [(n, w if w.dtype == mx.uint32 else w.astype(dtype)) for n, w in weights.items()]
        model.load_weights(typed)  # strict: nothing may be missing, in excess or misshapen
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        why = ", ".join(str(error).split(",\n")[:5])  # names five tensors of possibly hundreds
        raise VoxtralError(f"{folder}: damaged, or not Voxtral Mini 4B Realtime"
                           f" ({type(error).__name__}: {why})") from error
    return model, config

def load_voxtral_model(path_or_id: str | Path = DEFAULT_MODEL_ID,
                       dtype: str | mx.Dtype | None = None) -> tuple[Voxtral, Any, dict]:
    """Load a checkpoint: a folder in any of the four layouts, or a hub id, which is downloaded.

    `dtype` ("float32", "float16", "bfloat16" or an mx.Dtype) is the type to compute in; default:
    the weights'. Returns the model, mistral-common's tokenizer, whose `audio` holds the constants
    of the stream, and the configuration in the form of params.json. Raises OSError, and
    VoxtralError for what is missing, damaged or does not go together.
    """
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    folder = download_weights(str(path_or_id))
    model, config = prepare_model(folder, dtype)
    samples = model.spectrogram.hop_length * 2 * model.downsample_factor
    try:
        tokenizer = Tekkenizer.from_file(folder / "tekken.json")
        audio: Any = tokenizer.audio
        theirs = (tokenizer.n_words, audio.sampling_rate, audio.raw_audio_length_per_tok)
        assert audio.is_streaming and theirs == (model.vocab_size, SAMPLE_RATE, samples), theirs
    except Exception as error:  # whatever mistral-common trips over, it is the file that is wrong
        why = f"missing, not this model's, or not for this mistral-common ({error!r})"[:300]
        raise VoxtralError(f"{folder / 'tekken.json'}: {why}") from error
    if mx.default_device() == mx.cpu:
        # The same matrices with inputs outermost in memory: reference BLAS takes half the time.
        for _, module in model.named_modules():
            if type(module) is nn.Linear:
                module.weight = mx.contiguous(module.weight.T).T
    mx.eval(model.parameters())  # reads all files, once
    return model, tokenizer, config

def choose_files(names: Iterable[str], config: dict) -> list[str]:
    """Of a repository's files, one set of weights (mistralai's has two) and what goes with it."""
    files, original = set(names), {"params.json", "consolidated.safetensors", "tekken.json"}
    if original <= files and "multimodal" not in config:
        return sorted(original)
    shards = {name for name in files if re.fullmatch(r"model-.*\.safetensors", name)}
    weights = {"model.safetensors"} & files or shards
    return sorted(weights | {"config.json", "model.safetensors.index.json", "tekken.json"} & files)

def download_weights(model_id: str) -> Path:
    """A hub repository's folder in the cache, with what is needed downloaded; or a local folder."""
    if (folder := Path(model_id).expanduser()).exists():
        return folder
    from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download
    try:
        names = [file.rfilename for file in HfApi().model_info(model_id).siblings or []]
        path = hf_hub_download(model_id, "config.json") if "config.json" in names else os.devnull
        config = json.loads(Path(path).read_bytes() or "{}")
        return Path(snapshot_download(model_id, allow_patterns=choose_files(names, config)))
    except Exception as error:  # no such repository, no network, no space: dozens of classes
        with contextlib.suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
            return Path(snapshot_download(model_id, local_files_only=True))
        raise VoxtralError(f"{model_id}: no such folder, and not to be had from the hub"
                           f" (if it is private: hf auth login): {error}") from error

def convert(path_or_id: str | Path, out_dir: str | Path, *, bits: int | None = None,
            group_size: int = 64, dtype: str | mx.Dtype | None = None) -> tuple[int, int]:
    """Write a checkpoint in the converted layout, quantised to `bits` if given.

    Returns the size of the weights before and after, in bytes. Raises VoxtralError unless `out_dir`
    is new or empty, or to quantise twice. Nothing appears there before all of it is written.
    """
    from huggingface_hub import split_state_dict_into_shards_factory as split
    folder, out = download_weights(str(path_or_id)), Path(out_dir).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise VoxtralError(f"{out}: exists and is not an empty folder")
    model, config = prepare_model(folder, dtype)
    if bits and config.get("quantization"):
        raise VoxtralError(f"{folder}: is quantised already")
    if bits:
        # Each Linear, and the embedding, which is the output layer too: their bytes are a step's
        # time. ada_norm, used once per stream, could stay, but voxmlx wants it quantised.
        config = {**config, "quantization": {"group_size": group_size, "bits": bits}}
        nn.quantize(model, group_size, bits, class_predicate=lambda _, part:
                    hasattr(part, "to_quantized") and part.weight.shape[-1] % group_size == 0)
    weights: Any = dict(tree_flatten(model.parameters()))
    del model  # so that each tensor can be read, written and forgotten
    shards = split(weights, get_storage_size=lambda w: w.nbytes, max_shard_size="4GB",
                   filename_pattern="model{suffix}.safetensors")
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, ignore_cleanup_errors=True) as scratch:
        (new := Path(scratch, "model")).mkdir()
        for file, names in shards.filename_to_tensors.items():
            part = {name: weights.pop(name) for name in names}
            mx.save_safetensors(str(new / file), part, {"format": "mlx"})
            del part  # room for the next
            note(f"{file}: {(new / file).stat().st_size / 1e9:.2f} GB")
        for file, content in (("config.json", config), ("model.safetensors.index.json", index)):
            (new / file).write_text(json.dumps(content, indent=1, sort_keys=True))
        (new / "tekken.json").write_bytes((folder / "tekken.json").read_bytes())
        os.replace(new, out)  # all or nothing
    files = weight_files(folder, read_config(folder)[0]), weight_files(out, "converted")
    before, after = (sum(path.stat().st_size for path in paths) for paths in files)
    return before, after

# ------------------------------------------------------------------------------------------ stream
# The schedule. Each 80 ms of sound make one token, from the sum of the sound's embedding and that
# of the last token; this goes on as long as there is sound, and nothing else ends it. The prompt is
# BOS and [STREAMING_PAD] for 32 frames of silence and the delay, so the first token has heard
# delay + 1 frames of the recording. The first second of shared/digits/clips/short.wav, in which
# somebody says "seven" from 0.25 to 0.50 s, at a delay of 160 ms or 2 frames:
#
#     frame    0    1    2    3    4    5    6    7    8    9   10   11   12
#     sound    .    .    .   se  -ve   -e   -n    .    .    .    .    .   ni
#     token              .    .    .    .    .    .   [W]  " se" "v" "en"  .
#     k                  0    1    2    3    4    5    6    7    8    9   10
#     text                                                  se  sev  seven
#
# [W] is [STREAMING_WORD], a word is over; a dot is [STREAMING_PAD], nothing to say. A word that is
# opened at k ended after (k + 1) * 80 ms of sound: here 560 ms, the end of frame 6.

LONGEST = 0.4  # seconds: an estimate of what a word takes, where no other word bounds it

@dataclass(frozen=True)
class Word:
    """A group of text that one [STREAMING_WORD] opened, and its place in the recording in seconds.

    Mostly one word, but the model may group several, and in scripts without spaces a group is what
    it heard as one. Joined, the texts are the transcript: they have their leading spaces. `end` is
    exact to a frame; `start` is the end of the word before, but at most LONGEST before `end`.
    """
    text: str
    start: float
    end: float  # both in seconds

@dataclass
class Transcript:
    """What was said: text, generated token ids (one per 80 ms), words with times."""
    text: str
    tokens: list[int]
    words: list[Word]

def transcribe(model: Voxtral, tokenizer: Any, audio: np.ndarray, *,
               delay_ms: float | None = None, temperature: float = 0.0) -> Transcript:
    """Transcribe a recording: 16 kHz mono float samples [n]. See Stream for the rest."""
    stream = Stream(model, tokenizer, delay_ms=delay_ms, temperature=temperature)
    stream.feed(audio)
    stream.finish()
    return Transcript(stream.text, stream.tokens, stream.words)

class Stream:
    """Speech to text while the speech comes: `feed` samples, in a pause `flush`, then `finish`.

    `delay_ms`, a multiple of 80 from 80 to 2400, is how long the model listens on before it commits
    itself (default: tekken.json's, 480). `temperature` 0 takes the likeliest token. `text`, `words`
    and `tokens` hold all there is so far; else memory does not grow. One call at a time, from any
    thread. Raises VoxtralError for an impossible delay, or samples other than finite floats [n].
    """
    def __init__(self, model: Voxtral, tokenizer: Any, *,
                 delay_ms: float | None = None, temperature: float = 0.0):
        audio, mel, decoder = tokenizer.audio, model.spectrogram, model.language_model
        if delay_ms is not None and (delay_ms % 80 or not 80 <= delay_ms <= 2400):
            raise VoxtralError(f"a delay of {delay_ms} ms is not a multiple of 80 from 80 to 2400")
        self.text, self.tokens, self.words = "", list[int](), list[Word]()
        self.time = 0.0  # up to which time in the recording, in seconds, all words are written
        self._model, self._tokenizer, self._temperature = model, tokenizer, temperature
        self._delay = audio.get_num_delay_tokens(delay_ms)  # in tokens
        self._right_pad = audio.n_right_pad_tokens(delay_ms)  # delay + 1 + 10
        self._frame = audio.raw_audio_length_per_tok  # in samples: 1280, 80 ms
        # The eight spectrogram windows of one token, taken together, are a moving window again.
        # Before the signal: half a window, to centre the first on it, and the prompt's silence.
        zeros = mel.window_size // 2 + audio.n_left_pad_tokens * self._frame
        self._samples = Carry(self._frame - mel.hop_length + mel.window_size, self._frame, zeros)
        self._memory = model.audio_memory()  # the encoder's
        self._ffn_weights = decoder.ffn_weights(self._delay)  # the same for all its steps
        mx.eval(self._ffn_weights)  # now: MLX cannot do in another thread what was asked for here
        self._caches = [KVCache(model.decoder_args) for _ in decoder.layers]  # the decoder's
        self._word_id = tokenizer.get_special_token("[STREAMING_WORD]")
        pad_id = tokenizer.get_special_token("[STREAMING_PAD]")
        prompt = [tokenizer.bos_id] + [pad_id] * (audio.n_left_pad_tokens + self._delay)
        self._token = mx.array(prompt)  # [n]: what the next n embeddings of sound go with
        self._sound = mx.array(np.zeros((0, model.decoder_args.dim)), decoder.norm.weight.dtype)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # keeps half a character
        self._group: int | None = None  # the token that opened a group, until its text begins
        self._fed = 0  # samples, with the silence of flushes
        self._pause = (0, 0, 0)  # of the last flush, in samples: start, silence, all silence before
        self._end = math.inf  # of the recording, in frames, once finish knows
        self._ended, self._ids = False, dict[int, int]()

    def feed(self, samples: np.ndarray) -> str:
        """Take the next samples [n] and return the text that they made possible, often none."""
        samples = np.asarray(samples)
        if samples.ndim != 1 or samples.dtype.kind != "f" or not np.isfinite(samples).all():
            raise VoxtralError("samples must be finite floats in one dimension, at 16 kHz")
        if self._end < math.inf:
            raise VoxtralError("the stream is finished")
        return self._run(samples)

    def flush(self) -> str:
        """In a pause: push the pending words out with silence, which later times do not count."""
        start, silence, before = self._pause
        if self._fed == start + silence or self._ended:
            return ""  # nothing was said since
        silent = (-(-self._fed // self._frame) + self._right_pad) * self._frame - self._fed
        self._pause = (self._fed, silent, before + silence)
        return self._run(np.zeros(silent, np.float32))

    def finish(self) -> str:
        """End the recording and return the rest of its text."""
        self._end = min(self._end, -(-self._fed // self._frame))
        centring = np.zeros(self._model.spectrogram.window_size // 2, np.float32)
        text = self.flush() + self._run(centring) + self._write(self._utf8.decode(b"", final=True))
        self._ended = True
        return text

    def _run(self, samples: np.ndarray) -> str:
        """The one path: samples to spectrogram, embeddings, tokens, text."""
        before, block = len(self.text), self._model.block * self._frame
        self._fed += len(samples)
        for i in range(0, len(samples), block):
            windows = self._samples(samples[i : i + block, None].astype(np.float32))[:, 0]
            if len(windows):
                mel = self._model.spectrogram.frames(windows)
                self._decode(self._model.embed_audio(mel[None], self._memory))
        mx.eval(self._sound, [carry.rest for carry in self._memory[:2]])  # now, as in __init__
        return self.text[before:]

    def _decode(self, sound: mx.array) -> None:
        """Take the next embeddings of sound [n, D] and generate the tokens that they allow."""
        self._sound = mx.concatenate([self._sound, sound])  # with what waited for the prompt
        unread: Any = None
        while not self._ended and (n := len(self._token)) <= len(self._sound):  # prompt, then one
            self._token, self._sound = self._generate(self._sound[:n]), self._sound[n:]
            if unread is not None:  # reading waits for a step; meanwhile the next one runs
                self._take(unread.item())
            unread = self._token
        if unread is not None:
            self._take(unread.item())

    def _generate(self, sound: mx.array) -> mx.array:
        """Submit a step with n embeddings of sound [n, D]; its token [1] is yet to come."""
        decoder = self._model.language_model
        x = decoder(decoder.embed_tokens(self._token) + sound, self._ffn_weights, self._caches)
        logits = decoder.embed_tokens.as_linear(x[-1:])  # [1, vocabulary], of the last row only
        t = self._temperature
        token = mx.random.categorical(logits / t) if t > 0 else mx.argmax(logits, axis=-1)
        mx.async_eval(token)
        return token

    def _take(self, token: int) -> None:
        """Append a token that was generated, and its text."""
        k = len(self.tokens)  # its index: it has heard k + 1 + delay frames
        # The end of sequence is a token like any other until the recording is over.
        self._ended |= token == self._tokenizer.eos_id and k + self._delay >= self._end
        if self._ended:
            return
        self.tokens.append(self._ids.setdefault(token, token))  # an object per id, not per token
        self.time = self._audio_time(k + 1)
        if token == self._word_id:
            self._group = k
        else:  # special tokens have no bytes; the bytes of a character may come in several tokens
            self._write(self._utf8.decode(self._tokenizer.id_to_byte_piece(token)))
        if k % 256 == 0:
            mx.clear_cache()  # freed buffers of sizes that do not come again

    def _write(self, text: str) -> str:
        """Append text to the group that is open, or to the last word."""
        text = text if self.text else text.lstrip()
        if text and (self._group is not None or not self.words):
            end = self.time if self._group is None else self._audio_time(self._group + 1)
            start = max(self.words[-1].end if self.words else 0.0, end - LONGEST)
            self.words.append(Word("", round(start, 3), round(end, 3)))
            self._group = None  # it has its text; more of it goes to the same word
        if text:
            self.words[-1] = replace(self.words[-1], text=self.words[-1].text + text)
            self.text += text
        return text

    def _audio_time(self, frames: int) -> float:
        """Seconds in the recording, without the silence of flushes, after so many frames."""
        (start, silence, before), end = self._pause, frames * self._frame
        return (min(end, max(start, end - silence)) - before) / SAMPLE_RATE

# --------------------------------------------------------------------------------------- subtitles

def columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)

def wrap(text: str, width: int = 42) -> list[str]:
    """Break text into lines of so many columns: at spaces, and around wide characters."""
    wide, lines = "\u2e80-\uffdc\U0001f000-\U0003ffff", [""]
    # Pieces that stay whole: a wide character with the punctuation behind it, a narrow word.
    for piece in re.findall(rf"\s*(?:[{wide}][^\w\s]{{,9}}|[^\s{wide}]{{1,{width}}})", text):
        if lines[-1] and columns(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] = (lines[-1] + piece).lstrip()  # no line starts with a space
    return lines

class Subtitles:
    """Words to cues of SubRip ("srt") or WebVTT ("vtt"), each as soon as it is complete.

    A cue ends at a pause over 0.8 s, after a sentence, and within 7 s and two lines of 42 columns.
    """
    def __init__(self, kind: str):
        self.srt, self.count, self.first = kind == "srt", 0, 0  # first word of the open cue
        self.header = "" if self.srt else "WEBVTT\n\n"

    def update(self, words: list[Word], time: float = math.inf) -> str:
        """The cues that are complete, now that all words up to `time` seconds are known."""
        out, self.header, cue = self.header, "", list[Word]()
        for word in words[self.first :]:
            text = "".join(other.text for other in cue)
            sentence = re.search(r"[.!?…。！？][\"'”’»)」』]*\s*$", text)
            if cue and (sentence or word.start - cue[-1].end > 0.8
                        or word.end - cue[0].start > 7 or len(wrap(text + word.text)) > 2):
                out, cue = out + self.close(cue), []
            cue.append(word)
        # Is there time for one more word that begins before the pause is too long?
        return out + self.close(cue) if cue and time > cue[-1].end + 0.8 + LONGEST else out

    def close(self, cue: list[Word]) -> str:
        lines = wrap("".join(word.text for word in cue))
        start, end, out = cue[0].start, cue[-1].end, ""
        step = (end - start) / -(-len(lines) // 2)  # one group alone may be too long for a cue
        for i in range(0, len(lines), 2):
            self.count += 1
            head = f"{self.count}\n" if self.srt else ""
            times = f"{self.clock(start)} --> {self.clock(start + step)}"
            out += f"{head}{times}\n" + "\n".join(lines[i : i + 2]) + "\n\n"
            start += step
        self.first += len(cue)
        return out

    def clock(self, seconds: float) -> str:
        minutes, ms = divmod(round(seconds * 1000), 60_000)
        dot = "," if self.srt else "."
        return f"{minutes // 60:02}:{minutes % 60:02}:{ms // 1000:02}{dot}{ms % 1000:03}"

# ------------------------------------------------------------------------------------ command line

def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

def arriving_samples(quiet: bool) -> Iterator[np.ndarray]:
    """Standard input as it comes, up to 4 s at once; threads read on while the model works."""
    import soundfile  # type: ignore[import-untyped]
    if sys.stdin.isatty():
        raise VoxtralError("standard input is a terminal: pipe sound into it")
    head, (source, sink) = sys.stdin.buffer.read(4), os.pipe()  # to see what it is
    raw: dict = {"format": "RAW", "subtype": "PCM_16", "endian": "LITTLE"}
    raw |= {"samplerate": SAMPLE_RATE, "channels": 1}
    known = head in (b"RIFF", b"RF64", b"fLaC", b"OggS") or head[:3] == b"ID3"
    blocks: queue.Queue = queue.Queue(1 << 14)  # a writer that is 10 minutes ahead must wait
    def copy() -> None:  # libsndfile reads pipes, but must find there what was looked at already
        with contextlib.suppress(OSError), open(sink, "wb", buffering=0) as file:
            file.write(head)
            while data := sys.stdin.buffer.read1():  # type: ignore[union-attr]
                file.write(data)
    def read() -> None:
        try:
            with soundfile.SoundFile(source, **({} if known else raw)) as sound:
                for block in to_16k(sound, sound.samplerate // 25):
                    blocks.put(block)
            blocks.put(None)
        except Exception as error:  # noqa: BLE001  whatever it is, the one who waits must learn it
            blocks.put(VoxtralError(f"cut short, or not sound for a pipe ({error})"))
    for work in (copy, read):
        threading.Thread(target=work, daemon=True).start()
    began, done, last = time.monotonic(), 0, False  # done: in blocks of 40 ms
    while not last:
        pieces = [blocks.get()]
        while len(pieces) < 100 and not blocks.empty():
            pieces.append(blocks.get())
        last = not isinstance(pieces[-1], np.ndarray)
        error = pieces.pop() if last else None
        done += len(pieces)
        yield np.concatenate([np.zeros(0, np.float32), *pieces])
        if error:
            raise error
        # A file in a pipe is there at once; a microphone's sound comes no faster than time.
        behind = min(time.monotonic() - began, (done + blocks.qsize()) / 25) - done / 25
        if behind > 2 and not quiet:
            note(f"standard input: decoding is {behind:.1f} s behind")
            quiet = True  # once is enough

def run_file(name: str, model: Voxtral, tokenizer: Any, args: argparse.Namespace, out: Any) -> None:
    """Transcribe one file, or standard input, to `out`; progress goes to standard error."""
    stream = Stream(model, tokenizer, delay_ms=args.delay, temperature=args.temperature)
    subtitles, total, pieces = Subtitles(args.format), "", arriving_samples(args.quiet)
    if name != "-":
        samples, step = load_audio(name), 4 * SAMPLE_RATE  # text is to appear as it is decoded
        total = f" of {len(samples) / SAMPLE_RATE:.1f}"
        pieces = (samples[i : i + step] for i in range(0, len(samples), step))
    # Where text and progress would share the line of a terminal, the text is the progress.
    shared = args.format == "text" and out.isatty()
    erase = "\r\x1b[K" if sys.stderr.isatty() and not args.quiet and not shared else ""
    began, heard, seconds, speed = time.perf_counter(), 0, 0.0, ""
    try:
        for piece in itertools.chain(pieces, [None]):
            text = stream.finish() if piece is None else stream.feed(piece)
            if args.format in ("srt", "vtt"):
                text = subtitles.update(stream.words, math.inf if piece is None else stream.time)
            print(erase, end="", file=sys.stderr, flush=True)
            print("" if args.format == "json" else text, end="", file=out, flush=True)
            heard += 0 if piece is None else len(piece)
            seconds = heard / SAMPLE_RATE
            times = seconds / (time.perf_counter() - began)
            speed = f"{seconds:.1f}{total} s, {times:.1f} x real time"
            print(speed if erase else "", end="", file=sys.stderr, flush=True)
    finally:  # what was printed ends with its line, even after Ctrl-C
        print(erase, end="", file=sys.stderr, flush=True)
        if args.format == "text" and seconds:
            print(file=out, flush=True)
    if not seconds:
        raise VoxtralError("holds no samples")
    if args.format == "json":
        delay = args.delay or int(tokenizer.audio.transcription_delay_ms)
        record = {"file": name, "model": args.model, "delay_ms": delay, "duration": seconds,
                  **asdict(Transcript(stream.text, stream.tokens, stream.words))}
        print(json.dumps(record, ensure_ascii=False), file=out, flush=True)
    if not args.quiet:
        note(f"{name}: {speed}")

def run_files(args: argparse.Namespace) -> int:
    """Transcribe all files; a bad one does not stop the others, but the exit code tells."""
    files = [name for name in args.audio if name == "-" or Path(name).exists()]
    failed = [complain(f"{name}: no such file") for name in args.audio if name not in files]
    if not files:  # say so before gigabytes are loaded
        return 1
    began, device = time.perf_counter(), mx.default_device()
    model, tokenizer, _ = load_voxtral_model(args.model, args.dtype)
    if not args.quiet:
        size = mx.get_active_memory() / 1e9
        slow = " only: far slower than real time" if device == mx.cpu and size > 1 else ""
        note(f"{args.model}: {size:.2f} GB in {time.perf_counter() - began:.1f} s, {device}{slow}")
    world = mx.distributed.init()  # under mlx.launch: each process takes every n-th file
    for name in files[world.rank() :: world.size()]:
        out = io.StringIO() if world.size() > 1 else sys.stdout
        try:
            run_file(name, model, tokenizer, args, out)
        except (VoxtralError, PermissionError, IsADirectoryError) as error:
            why = str(getattr(error, "strerror", error))
            failed.append(complain(why if name in why else f"{name}: {why}"))
        if isinstance(out, io.StringIO):  # in one piece, between those of the others
            print(out.getvalue(), end="", flush=True)
    return int(bool(failed))

def complain(message: str) -> int:  # in one line; the result is the exit code for it
    note("voxtral.py: " + " ".join(message.split()))
    return 1

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("voxtral.py", description="Speech to text: Voxtral in MLX.")
    add = parser.add_argument
    add("audio", nargs="*", help="audio files (wav, flac, ogg, mp3, aiff), or - for standard input:"
        " a WAV stream or raw 16-bit little-endian mono 16 kHz samples, transcribed as it arrives")
    add("--model", default=DEFAULT_MODEL_ID, help="folder or hub id (default: %(default)s)")
    add("--delay", type=int, metavar="MS", help="how long to listen before committing to a word:"
        " a multiple of 80 from 80 to 2400 (default: the model's, 480)")
    add("--format", choices=("text", "srt", "vtt", "json"), default="text", help="default: text")
    add("--temperature", type=float, default=0.0, help="of sampling; 0, the default, is greedy")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="compute in this type")
    add("--quiet", action="store_true", help="no progress, no summary")
    add("--convert", metavar="DIR", help="write a converted checkpoint to DIR, do not transcribe")
    add("--bits", type=int, choices=(4, 6, 8), help="with --convert: quantise to so many bits")
    add("--group-size", type=int, choices=(32, 64, 128), default=64, help="... in such groups")
    args = parser.parse_args(argv)
    if bool(args.audio) == bool(args.convert) or args.audio.count("-") > 1:
        parser.error("name audio files (- once at most), or --convert DIR without any")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    try:
        if not args.convert:
            return run_files(args)
        settings = {"bits": args.bits, "group_size": args.group_size, "dtype": args.dtype}
        before, after = convert(args.model, args.convert, **settings)
        note(f"{args.convert}: {before:,} bytes -> {after:,} bytes")
        return 0
    except (VoxtralError, RuntimeError) as error:  # the latter is MLX's: no memory, no space
        return complain(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return complain("standard output was closed")
    except OSError as error:
        return complain(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    sys.exit(main())
