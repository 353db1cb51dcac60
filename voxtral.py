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

    python voxtral.py speech.wav                                 # the words, as they are decoded
    ffmpeg -f alsa -i default -f wav - | python voxtral.py -     # a microphone, live

    model, tokenizer, config = load_voxtral_model()
    print(transcribe(model, tokenizer, load_audio("speech.wav")).text)

The model is a pipe. Sound goes in at one end and text comes out at the other, at a fixed rate:

    samples      log-mel       encoder frames     audio embeddings     text tokens
    16 kHz  -->  100 Hz   -->  50 Hz         -->  12.5 Hz         -->  12.5 Hz
          window 400     conv 3        32 layers,        groups of 4       26 layers, one
          hop 160        conv 3 / 2    window of 15 s    side by side      token per 80 ms

Whisper takes 30 s at a time: an encoder that looks both ways over all of it, then a decoder that
writes as many tokens as it likes and finds its place by cross-attention. Voxtral Realtime differs
in three ways, and each makes it a stream:

  causal    No layer looks ahead; only the spectrogram does, 2.5 ms past the end of a step. The
            convolutions look back, and attention sees the last `window` positions: 750 encoder
            frames (15 s), 8192 steps (11 min) in the decoder. What was computed stays valid
            whatever is said next, and memory does not grow.
  added     There is no cross-attention. The decoder's input at each position is the embedding of
            the last token *plus* that of 80 ms of sound, and its output exactly one token: mostly
            [STREAMING_PAD], nothing to say yet; or [STREAMING_WORD], a word is over, and then that
            word's tokens, one per step.
  delayed   The text runs some steps behind the sound: with a longer delay the model hears more
            before it writes, errs less and answers later. One set of weights serves delays from
            80 ms to 2.4 s; a small network turns the delay into a scale on the decoder's norms.

So a file is a stream that arrives at once, and all sound takes one path, `Stream._run`: by `feed`
and `finish` if it is live, by `transcribe` if it is whole, several recordings in lockstep.

Words that have one meaning in this file:

  mel frame       one column of the spectrogram, 10 ms
  encoder frame   20 ms
  step            80 ms: 1,280 samples, 8 mel frames, 4 encoder frames, 1 audio embedding, 1 token
  delay           how many steps the text runs behind the sound
  token           an id (mistral-common also calls 80 ms of sound a token; here that is a step)
  recording       what a user hands over; B of them can run in lockstep

Letters in shapes: B recordings, F mel frames, T new positions, D dim, H heads, C channels. Sources:
the Voxtral Realtime report (arXiv 2602.11298); delayed streams (Kyutai, arXiv 2509.08753);
params.json of mistralai/Voxtral-Mini-4B-Realtime-2602; and mistral-common, which owns the tokenizer
and every constant of the audio format.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import html
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
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
from mlx.utils import tree_flatten

# mistral-common, huggingface_hub, soundfile and soxr are slow to import, so the functions that
# need them import them.

DEFAULT_MODEL_ID = "mlx-community/Voxtral-Mini-4B-Realtime-6bit"
SAMPLE_RATE = 16_000  # load_voxtral_model checks that model and tokenizer say so too
STEP = 1280  # samples, 80 ms; likewise
DELAYS_MS = (*range(80, 1201, 80), 2400)  # those that the model was trained with


class VoxtralError(Exception):
    """A mistake that the user can mend; the message says what is wrong, on one line."""


# ------------------------------------------------------------------------------------------- audio
# How files are read comes first. For the model, go straight to Spectrogram.

IS_WAV = re.compile(rb"(RIFF|RF64)....WAVE", re.DOTALL)
JOINT = re.compile(rb"(?s)(?=OggS\0\x02|fLaC[\0\x80]\0\0\x22|RIFF....WAVE)")  # a file begins
DAMAGE = (RuntimeError, struct.error, KeyError)  # raised where a file cannot be parsed


def load_audio(path: str | Path) -> np.ndarray:
    """Read an audio file as float32 mono samples [n] at 16 kHz, within about -1..1.

    libsndfile reads wav, flac, ogg, mp3 and more; ffmpeg, where it is installed, reads what
    libsndfile refuses or leaves a part of. Channels are averaged. Warns where a part is missing.
    Raises OSError, and VoxtralError for what holds no sound.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise VoxtralError(f"{path}: a pipe or device; to read it: python voxtral.py - < {path}")
    samples, problem = decode(Path(path).read_bytes())
    if problem and not shutil.which("ffmpeg"):
        problem += "; ffmpeg, which is not installed, may read more"
    elif problem:
        done = subprocess.run(ffmpeg(f"file:{path}", "f32le"), capture_output=True, check=False)
        more = np.frombuffer(done.stdout, "<f4", len(done.stdout) // 4)
        if len(more) > len(samples) + 160 or not len(samples):  # more, by 10 ms at least
            samples = more
            # "[mp3 @ 0x55d0] Header missing" -> "mp3: Header missing"
            says = re.sub(r"^\[(\S+) @ \w+\]", r"\1:", done.stderr.decode(errors="replace").strip())
            says = says and "ffmpeg says: " + says.splitlines()[0].removeprefix(f"file:{path}: ")
            # A cut file stays cut, and ffmpeg knows what is damaged. Bytes that libsndfile left
            # unread count only if ffmpeg fails: it also complains where files were joined.
            if not problem.startswith("cut"):
                problem = says if done.returncode or problem.startswith("damaged") else ""
    if not len(samples):
        raise VoxtralError(f"{path}: {problem or 'holds no samples'}")
    if problem:
        warnings.warn(f"{path}: {problem}", stacklevel=2)
    return as_samples(samples)


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Descriptor 2, to which libmpg123 prints its remarks, is /dev/null for a while."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@silent_stderr()
def decode(data: bytes) -> tuple[np.ndarray, str]:
    """The samples that libsndfile reads of a file, and what is wrong with them, or ""."""
    pieces = [np.zeros(0, np.float32)]
    missing = stated_size(data) - len(data)
    problem = f"cut short: {missing:,} bytes are missing" if missing > 0 else ""
    try:
        for part in filter(None, JOINT.split(data) if JOINT.match(data) else [data]):
            file = io.BytesIO(part)
            # List += keeps what came before an error.
            pieces += to_16k(wav_pieces(file.read) if IS_WAV.match(part) else file_pieces(file))
            # A header may lie about the length. What counts is where the reader stands now.
            rest = file.read().strip(b"\0")
            if rest and not re.match(rb"TAG|[A-Za-z0-9 ]{4}", rest):  # no tag and no chunk
                problem = problem or f"the last {len(rest):,} bytes were not read"
    except EOFError as error:
        problem = str(error)
    except DAMAGE:
        problem = problem or "damaged, or no sound that libsndfile reads"
    return np.concatenate(pieces), problem


def stated_size(data: bytes) -> int:
    """How long a file must be at least by its own account, in bytes; 0 if it does not say."""
    size = 0
    if data.startswith(b"OggS"):  # the last page states the sizes of its segments
        start = data.rfind(b"OggS")
        segments = data[start + 27 : start + 27 + sum(data[start + 26 : start + 27])]
        size = start + 27 + len(segments) + sum(segments)
    elif data.startswith(b"FORM"):  # AIFF
        size = int.from_bytes(data[4:8], "big")
    elif data.startswith(b".snd"):
        size = int.from_bytes(data[4:8], "big") + int.from_bytes(data[8:12], "big")
    elif note := re.search(rb"(?s)(?:Xing|Info)\0\0\0[\3\7\13\17].{4}(.{4})", data[:5000]):  # mp3
        size = int.from_bytes(note[1], "big")
    return size if size < 0x7F000000 else 0  # larger: written to a pipe, not known


def file_pieces(file: Any) -> Iterator[tuple[int, np.ndarray]]:
    """What libsndfile reads of an open file: the rate in Hz, and samples [n, channels]."""
    import soundfile  # type: ignore[import-untyped]

    with soundfile.SoundFile(file) as sound:
        sound.seekable = lambda: False  # else it seeks after each piece
        left = sound.frames
        while len(piece := sound.read(min(4096, left), dtype="float32", always_2d=True)):
            left -= len(piece)
            yield sound.samplerate, piece
        # The length of an mp3 may be an estimate, that of an endless one is huge.
        if sound.samplerate < left < 1 << 48 and left > 0.05 * sound.frames:
            raise EOFError(f"cut short: {left / sound.samplerate:.1f} s are missing")


def wav_pieces(read: Callable[[int], bytes],
               waiting: Callable[[], int] = lambda: 1 << 30) -> Iterator[tuple[int, np.ndarray]]:
    """A WAV stream, which may be a pipe, in pieces: the rate in Hz, and samples [n, channels].

    A piece is 40 ms long, or up to 4 s if so many bytes are `waiting`. If its writer did not know
    the size of the sound, or did not live to note it, the size is 0 or about 2 or 4 GiB, and the
    sound goes on to the end.
    """
    import soundfile  # type: ignore[import-untyped]

    read(12)  # RIFF, a size that nobody needs, WAVE
    chunks: dict[bytes, bytes] = {}
    name, size = struct.unpack("<4sI", read(8))
    while name != b"data":
        chunks[name] = read(size + size % 2)
        name, size = struct.unpack("<4sI", read(8))
    if b"ds64" in chunks:
        size = int.from_bytes(chunks[b"ds64"][8:16], "little")
    form = chunks[b"fmt "]
    _, channels, rate, _, unit, bits = struct.unpack("<HHIIHH", form[:16])
    least = unit * max(1, rate * channels * bits // 200 // max(1, unit))  # bytes in 40 ms
    empty = size == 0
    total = math.inf if empty or 0x7F000000 <= size <= 0xFFFFFFFF else size
    done = 0
    while done < total:
        wanted = min(total - done, least * max(1, min(100, waiting() // max(1, least))))
        if not (data := read(int(wanted))):
            break
        if empty and not done and re.match(rb"[A-Za-z]{3}[A-Za-z ]", data):
            return  # there is no sound, and this is the next chunk
        done += len(data)
        head = b"RIFF" + struct.pack("<I8sI", 36, b"WAVEfmt ", len(form)) + form
        whole = io.BytesIO(head + b"data" + struct.pack("<I", len(data)) + data)
        yield rate, soundfile.read(whole, dtype="float32", always_2d=True)[0]
    if done < total < math.inf:
        raise EOFError(f"cut short: {total - done:,} bytes are missing")


def to_16k(pieces: Iterable[tuple[int, np.ndarray]]) -> Iterator[np.ndarray]:
    """Pieces of one rate in Hz, samples [n, channels] -> pieces of mono samples at 16 kHz."""
    import soxr  # type: ignore[import-untyped]

    resampler = None
    for rate, piece in pieces:
        if rate < 1000:
            raise VoxtralError(f"a sample rate of {rate} Hz carries no speech")
        resampler = resampler or soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
        mono = piece.mean(axis=1)
        yield mono if rate == SAMPLE_RATE else resampler.resample_chunk(mono)
    if resampler:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def as_samples(samples: Any) -> np.ndarray:
    """Check samples [n], finite floats within about -1..1 or int16, and return them as float32."""
    samples = np.asarray(samples)
    if samples.dtype == np.int16:
        samples = samples / np.float32(32768)
    if samples.ndim != 1 or samples.dtype.kind != "f" or not np.isfinite(samples).all():
        raise VoxtralError("samples must be int16 or finite floats (not NaN or infinite), [n]")
    if np.abs(samples).max(initial=0) > 1000:
        raise VoxtralError("samples far outside -1..1: these look like int16 values as floats")
    return samples.astype(np.float32, copy=False)


def ffmpeg(source: str, form: str) -> list[str]:
    """The command that decodes the first sound of `source` to mono at 16 kHz."""
    # Timestamps jump where files were joined; asetpts counts samples instead.
    return ["ffmpeg", "-nostdin", "-v", "error", "-i", source, "-map", "0:a:0",
            "-af", "asetpts=N/SR/TB", "-ac", "1", "-ar", str(SAMPLE_RATE), "-f", form, "-"]


@dataclass(frozen=True)
class Spectrogram:
    """The log-mel front end; the defaults are those of params.json and mistral-common."""

    num_mel_bins: int = 128  # bands up to half the sampling rate, evenly spaced on Slaney's scale
    hop_length: int = 160  # samples: 10 ms
    window_size: int = 400  # samples: 25 ms
    global_log_mel_max: float = 1.5  # log10 of the greatest power to expect

    def mel_frames(self, samples: np.ndarray) -> mx.array:
        """Log-mel of every whole window in samples [..., n] -> float32 [..., F, num_mel_bins]."""
        from mistral_common.audio import mel_filter_bank

        bins = self.window_size // 2 + 1
        bank = mel_filter_bank(bins, self.num_mel_bins, 0, SAMPLE_RATE / 2, SAMPLE_RATE)  # cached
        bank = bank.astype(np.float32)  # [bins, num_mel_bins]
        # A periodic Hann window, as torch.stft has it; numpy's is symmetric.
        hann = np.hanning(self.window_size + 1)[:-1].astype(np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(samples, self.window_size, axis=-1)
        spectrum = np.fft.rfft(windows[..., :: self.hop_length, :] * hann)  # [..., F, bins]
        power = (np.abs(spectrum) ** 2).astype(np.float32)
        # Eight rows at a time: for more, numpy's BLAS starts threads, which then spin beside MLX.
        rows = power.reshape(-1, bins)
        mel = np.concatenate([rows[i : i + 8] @ bank for i in range(0, len(rows), 8)])
        log = np.log10(np.maximum(mel, 1e-10)).reshape(*power.shape[:-1], self.num_mel_bins)
        # Whisper clips at 80 dB, 8 in log10, below the loudest mel frame of the recording. A stream
        # cannot know how loud the rest will be, so a constant takes its place.
        return mx.array((np.maximum(log, self.global_log_mel_max - 8) + 4) / 4)


def log_mel_spectrogram(samples: np.ndarray, spectrogram: Spectrogram = Spectrogram()) -> mx.array:
    """Log-mel of a whole signal: 16 kHz samples [n] -> [n // 160, 128] float32.

    Mel frame f is centred on sample 160 f, with silence around the signal; as in Whisper, the last
    one is dropped. Stream does not use this: it is for whole signals.
    """
    padded = np.pad(np.asarray(samples, np.float32), spectrogram.window_size // 2)
    return spectrogram.mel_frames(padded)[: len(samples) // spectrogram.hop_length]


@dataclass
class Carry:
    """What a window that moves along a signal still needs of the signal's past.

    After n windows the next one begins at input n * stride, so everything from there on is kept.
    Example with kernel 3, stride 2 and inputs x0 x1 x2 x3: the window x0-x2 is complete, the next
    begins at x2, so x2 and x3 are kept. (Keeping the last kernel - stride inputs instead would lose
    x2 whenever a chunk ends between two windows.)
    """

    kernel: int  # inputs that the window covers
    stride: int  # by how many it moves, at most `kernel`
    zeros: int  # how many stand in front of the signal
    rest: Any = None  # [..., n, C], a numpy or MLX array like the signal

    def __call__(self, x: Any) -> Any:
        """The next inputs [..., n, C] -> the inputs [..., m, C] of the windows they complete."""
        xp: Any = np if isinstance(x, np.ndarray) else mx
        if self.rest is None:
            self.rest = xp.zeros((*x.shape[:-2], self.zeros, x.shape[-1]), x.dtype)
        x = xp.concatenate([self.rest, x], axis=-2)
        windows = max(0, (x.shape[-2] - self.kernel) // self.stride + 1)
        end = (windows - 1) * self.stride + self.kernel if windows else 0
        self.rest = x[..., windows * self.stride :, :]
        return x[..., :end, :]


# --------------------------------------------------------------------------------------- attention
# What encoder and decoder share. Only attention and the convolutions look at several positions, so
# everywhere else activations are rows [B * T, D]; row b * T + t is position t of recording b. MLX
# multiplies rows in one product, and a batch of B matrices more slowly or one by one.


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
    """Mask [T, size] for queries at positions start, start + 1, ... of a buffer of `size` keys.

    Query i sees keys i - window + 1 .. i. The mask is added to the scores: CUDA has a fused kernel
    for that, and none for a boolean one.
    """
    back = np.arange(start, start + T)[:, None] - np.arange(size)  # from query to key
    return mx.array(np.where((back >= 0) & (back < window), 0, mx.finfo(dtype).min), dtype)


class KVCache:
    """Rotated keys, and values, of the last `window` positions of B recordings.

    New entries are appended to a buffer in place. A full buffer is replaced: by a larger one at
    first, later by one that begins with the last `window - 1` entries. A position is an index into
    the buffer, not the time since the stream began: attention depends on distances alone, and small
    positions keep float32 angles exact after days. So kept keys are rotated back as they move.

    Capacities are 255, 511, ... up to 2 * window - 1, or more where more than `window` positions
    come at once. They are few, because CUDA plans kernels for each new shape, and odd, because MLX
    0.32 on CUDA computes wrong numbers from a view that does not begin at 0 if the capacity of the
    buffer is a multiple of 256.
    """

    def __init__(self, args: TransformerArgs, batch: int = 1):
        self.batch = batch
        self.window = args.sliding_window
        self.rope_theta = args.rope_theta
        self.length = 0  # entries in the buffer
        self.keys: Any = None  # [B, n_kv_heads, capacity, head_dim] after an update
        self.values: Any = None
        # Rotary embedding turns neighbouring pairs of numbers (traditional=True), not half-splits.
        self.rope = partial(mx.fast.rope, dims=args.head_dim, traditional=True,
                            base=args.rope_theta, scale=1.0)

    def update(self, q: mx.array, k: mx.array, v: mx.array) -> tuple:
        """Append T new positions: q [B, n_heads, T, head_dim], k, v [B, n_kv_heads, T, head_dim].

        Returns q rotated, keys, values [B, n_kv_heads, seen, head_dim], and mask [T, seen] or None.
        """
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
        if T == 1:  # one position sees its whole window and needs no mask
            seen = slice(max(0, self.length - self.window), self.length)
            return q, self.keys[:, :, seen], self.values[:, :, seen], None
        # Several positions get the whole buffer under a mask, which hides its unused end like any
        # future. (A view of the used part would be a new shape in each feed.)
        mask = window_mask(start, T, self.keys.shape[2], self.window, q.dtype)
        return q, self.keys, self.values, mask

    def renew(self, T: int) -> None:
        """Make buffers with room for T entries behind those that are still in the window."""
        kept = min(self.length, self.window - 1)
        first = self.length - kept
        need = kept + T + (self.window // 4 if first else 0)  # spare: not each step renews
        doubling = (1 << max(8, need.bit_length())) - 1
        capacity = min(doubling, (self.window - 1 + max(self.window, T)) | 1)
        old_k = self.keys[:, :, first : self.length]
        old_k = self.turn_back(old_k, first) if first else old_k
        old_v = self.values[:, :, first : self.length]
        room = mx.zeros((*old_k.shape[:2], capacity - kept, old_k.shape[3]), old_k.dtype)
        self.keys = mx.concatenate([old_k, room], axis=2)
        self.values = mx.concatenate([old_v, room], axis=2)
        self.length = kept
        if kept and self.batch > 1:
            # Evaluate here: the old buffers are free before the next layer makes its new ones.
            mx.eval(self.keys, self.values)

    def turn_back(self, keys: mx.array, distance: int) -> mx.array:
        """Rotate keys [..., head_dim] to positions that are smaller by `distance`."""
        # A pair of numbers is a complex number, and its rotation a product. Not by mx.fast.rope:
        # on CUDA (MLX 0.32) that is wrong when its offset is negative.
        half = keys.shape[-1] // 2
        angles = -distance * self.rope_theta ** (-np.arange(half) / half)
        turns = mx.array(np.exp(1j * angles).astype(np.complex64))
        pairs = keys.astype(mx.float32).view(mx.complex64)  # [..., head_dim / 2]
        return (pairs * turns).view(mx.float32).astype(keys.dtype)


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
        q, k, v, mask = cache.update(q, k, v)  # k, v: [B, n_kv_heads, seen, head_dim]
        scale = self.head_dim**-0.5
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)  # like q
        return self.o_proj(out.swapaxes(1, 2).reshape(len(x), -1))


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up as one kernel."""
    return nn.silu(gate) * up


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

    def __call__(self, x: mx.array, cache: KVCache, ffn_weight: mx.array) -> mx.array:
        """Rows [B * T, D] -> rows; `ffn_weight` [D] stands in for ffn_norm's, see Decoder."""
        x = x + self.attention(self.attn_norm(x), cache)
        return x + self.mlp(mx.fast.rms_norm(x, ffn_weight, self.ffn_norm.eps))


# ------------------------------------------------------------------------ encoder, adapter, decoder


class EncoderState:
    """What the encoder remembers of B recordings between two pieces of sound."""

    def __init__(self, args: TransformerArgs, batch: int = 1):
        self.conv1 = Carry(kernel=3, stride=1, zeros=2)
        self.conv2 = Carry(kernel=3, stride=2, zeros=1)
        self.caches = [KVCache(args, batch) for _ in range(args.n_layers)]


class Encoder(nn.Module):
    """Whisper's encoder made causal: two convolutions that look back, then layers.

    The layers have a sliding window, rotary positions, RMSNorm and SwiGLU, where Whisper has full
    attention, fixed positions, LayerNorm and a GELU network."""

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
            x = layer(x, cache, layer.ffn_norm.weight)
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
    """A language model whose input at each position is a token's embedding plus a sound's."""

    def __init__(self, args: TransformerArgs, vocab_size: int, ada_dim: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, args.dim)  # tied: also makes the logits
        self.layers = [Block(args, ada_dim=ada_dim) for _ in range(args.n_layers)]
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)

    def ffn_weights(self, delay: int) -> list[mx.array]:
        """The weights [D] of each layer's ffn_norm at a delay of so many steps.

        A layer feeds h = ffn_norm(x) * (1 + ada(t)) to its mlp. t embeds the delay as the
        transformer of 2017 embeds positions: cosines and sines of geometrically spaced
        frequencies. The factor is the same at all steps of a stream, and ffn_norm itself ends with
        a product by its weight, so the two are multiplied once, here.
        """
        half = self.norm.weight.shape[0] // 2
        angles = delay * mx.exp(-math.log(10000.0) * mx.arange(half) / half)  # [D / 2]
        t = mx.concatenate([mx.cos(angles), mx.sin(angles)])[None].astype(self.norm.weight.dtype)
        return [layer.ffn_norm.weight * (1 + layer.ada_norm(t)[0]) for layer in self.layers]

    def __call__(self, x: mx.array, ffn_weights: list, caches: list[KVCache]) -> mx.array:
        """Inputs as rows [B * T, D] -> outputs as rows; embed_tokens.as_linear makes the logits."""
        for layer, weight, cache in zip(self.layers, ffn_weights, caches):
            x = layer(x, cache, weight)
        return self.norm(x)


def read_args(cls: Any, config: dict) -> Any:
    """A dataclass of sizes, from the fields of the same names; ValueError for what is none."""
    for field in fields(cls):
        value = config[field.name]
        most = 1000 if field.name == "n_layers" else 1 << 24  # a damaged file may ask for anything
        if type(value).__name__ not in ("int", field.type) or not 0 < value <= most:
            raise ValueError(f"{field.name} is {value!r}")
    return cls(**{field.name: config[field.name] for field in fields(cls)})


class Voxtral(nn.Module):
    """The whole model. `config` is the content of params.json."""

    def __init__(self, config: dict):
        super().__init__()
        whisper = config["multimodal"]["whisper_model_args"]
        audio = whisper["encoder_args"]
        factor = whisper["downsample_args"]["downsample_factor"]  # encoder frames of a step: 4
        self.step_mel_frames = 2 * factor  # mel frames of a step: 8
        self.spectrogram = read_args(Spectrogram, audio["audio_encoding_args"])
        if self.spectrogram.hop_length * self.step_mel_frames != STEP:
            raise ValueError(f"a step is not {STEP} samples")
        # params.json may leave out the encoder's n_kv_heads, which is its n_heads.
        audio = {"n_kv_heads": audio.get("n_heads"), **audio}
        self.encoder_args = read_args(TransformerArgs, audio)
        self.decoder_args = read_args(TransformerArgs, config)
        self.vocab_size = config["vocab_size"]
        self.encoder = Encoder(self.encoder_args, self.spectrogram.num_mel_bins)
        self.adapter = Adapter(self.encoder_args.dim, self.decoder_args.dim, factor)
        self.language_model = Decoder(
            self.decoder_args, self.vocab_size, config["ada_rms_norm_t_cond_dim"])

    def most_steps(self, batch: int) -> int:
        """How many steps of each of B recordings the encoder takes at once."""
        # A window of attention, 187 steps; two for one recording on a GPU, which is faster there.
        # More would cost more attention. Recordings in lockstep share the steps, to save memory.
        windows = 2 if batch == 1 and mx.default_device() == mx.gpu else 1
        steps = windows * self.encoder_args.sliding_window * 2 // self.step_mel_frames
        return max(16, steps // batch)  # for fewer, launching costs more than computing

    def embed_audio(self, mel: mx.array, state: EncoderState) -> mx.array:
        """The next mel frames [B, F, C], F a multiple of 8 -> audio embeddings [B, F / 8, D].

        Runs in pieces of few sizes, `most_steps` and powers of two: see KVCache. MLX on CUDA stops
        with "Cache thrashing" after some hundred shapes.
        """
        B, F, _ = mel.shape
        assert F % self.step_mel_frames == 0, f"{F} mel frames are not whole steps"
        most = self.most_steps(B)
        embeddings = []
        while mel.shape[1]:
            steps = mel.shape[1] // self.step_mel_frames
            steps = most if steps >= most else 1 << (steps.bit_length() - 1)
            end = steps * self.step_mel_frames
            x = self.adapter(self.encoder(mel[:, :end], state))  # [B * steps, D]
            mx.async_eval(x)  # compute this piece while the next one is submitted
            embeddings.append(x.reshape(B, steps, -1))
            mel = mel[:, end:]
        return mx.concatenate(embeddings, axis=1)

    def encode(self, mel: mx.array) -> mx.array:
        """Log-mel of a whole signal [F, C] -> all its audio embeddings [F // 8, D]."""
        whole = len(mel) // self.step_mel_frames * self.step_mel_frames
        if not whole:
            return mx.zeros((0, self.decoder_args.dim))
        return self.embed_audio(mel[None, :whole], EncoderState(self.encoder_args))[0]


# ------------------------------------------------------------------------------------------ stream
# The schedule. Each step of sound makes one token, from the sum of the sound's embedding and that
# of the last token. This goes on while there is sound: an end-of-sequence token is ignored until
# the recording is over, and then delay + 11 steps of silence draw out the words still to come.
#
# Before the recording the model hears 32 steps of silence: it was trained with these, and Mistral
# reports fewer errors with them. Its text for these and for the first `delay` steps of the
# recording is not decoded but given as [STREAMING_PAD], for the text runs that far behind the
# sound. So the prompt is BOS and 32 + delay pads, which go in with the silence and the first
# delay + 1 steps of the recording. The decoder reads the prompt in one pass, the prefill, and its
# last row gives token 0. From there on, each step decodes one token.
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
# with step k + delay, so it has heard k + 1 + delay steps, and speaks about the first k + 1 of
# them: the word that [W] at k opens ended after (k + 1) * 80 ms of sound. Here that is 560 ms, the
# end of step 6.

LONGEST_WORD = 0.4  # seconds: an estimate of what a word takes, where no other word bounds it


@dataclass(frozen=True)
class Word:
    """A group of text that one [STREAMING_WORD] opened, and its place in the recording.

    Mostly one word, but the model may open several at once, and in scripts without spaces a group
    is whatever it opens at once. Joined, the texts are the transcript.
    """

    text: str  # with its leading space; the first word has none
    start: float  # seconds: the end of the word before, but at most LONGEST_WORD before `end`
    end: float  # seconds: of the step in which the model marks it, or of the recording


class Transcript:
    """What was said: tokens to text and words. It needs no model."""

    def __init__(self, tokenizer: Any):
        self.text = ""
        self.tokens: list[int] = []  # generated, one per step
        self.words: list[Word] = []
        self.time = 0.0  # up to which second of the recording all words are written
        self._tokenizer = tokenizer
        self._word_id = tokenizer.get_special_token("[STREAMING_WORD]")
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # keeps half a character
        self._word_end: float | None = None  # of a word whose text has not begun, in seconds

    def append(self, token: int, time: float) -> None:
        """Take the next token, which speaks of the recording up to `time` seconds."""
        self.tokens.append(token)
        self.time = time
        if token == self._word_id:
            self._word_end = time
        else:  # special tokens have no bytes; a character may come in several tokens
            self._write(self._utf8.decode(self._tokenizer.id_to_byte_piece(token)))

    def extend(self, other: Transcript, seconds: float) -> None:
        """Take the transcript of a piece of the recording that begins at `seconds`."""
        for k, token in enumerate(other.tokens):
            self.append(token, seconds + min((k + 1) * STEP / SAMPLE_RATE, other.time))
        self.close()

    def close(self) -> None:
        """No more tokens: half a character becomes U+FFFD."""
        self._write(self._utf8.decode(b"", final=True))

    def _write(self, text: str) -> None:
        """Append text to the word that was opened, else to the last word."""
        text = text if self.text else text.lstrip()
        if not text:
            return
        if self._word_end is not None or not self.words:
            end = self.time if self._word_end is None else self._word_end
            start = max(self.words[-1].end if self.words else 0.0, end - LONGEST_WORD)
            self.words.append(Word("", round(start, 3), round(end, 3)))
            self._word_end = None
        self.words[-1] = replace(self.words[-1], text=self.words[-1].text + text)
        self.text += text


class Generator:
    """The decoder at work on B recordings in lockstep: prefill, then one token per step."""

    def __init__(self, model: Voxtral, prompt: list[int], delay: int, batch: int = 1,
                 temperature: float = 0.0):
        self._decoder = model.language_model
        self._temperature = temperature
        self._ffn_weights = self._decoder.ffn_weights(delay)
        self._caches = [KVCache(model.decoder_args, batch) for _ in self._decoder.layers]
        # The ids that go in next: at first the whole prompt, then the last token.
        self.ids = mx.array([prompt] * batch)  # [B, T]
        # Evaluate here: a lazy array belongs to the thread that made it.
        mx.eval(self._ffn_weights, self.ids)

    def __call__(self, embeddings: mx.array) -> mx.array:
        """Audio embeddings [B, T, D] of the next ids -> tokens [B, 1], still being computed."""
        B, T, D = embeddings.shape
        x = self._decoder.embed_tokens(self.ids) + embeddings
        x = self._decoder(x.reshape(-1, D), self._ffn_weights, self._caches)  # [B * T, D]
        logits = self._decoder.embed_tokens.as_linear(x.reshape(B, T, D)[:, -1])  # [B, vocabulary]
        token = (mx.random.categorical(logits / self._temperature) if self._temperature > 0
                 else mx.argmax(logits, axis=-1))
        self.ids = token[:, None]
        mx.async_eval(self.ids)
        return self.ids


class Stream:
    """Speech to text while the speech comes: `feed` samples, in a pause `flush`, then `finish`.

    `delay_ms`, one of DELAYS_MS, is how long the model listens on before it commits itself
    (default: tekken.json's, 480). `temperature` 0 takes the likeliest token. `text`, `words` and
    `tokens` grow with the recording, and nothing else does. One call at a time, from any thread.
    Raises VoxtralError for other delays, and for samples that as_samples refuses. `lengths` is for
    transcribe: how many samples of each of its padded rows are sound.
    """

    def __init__(self, model: Voxtral, tokenizer: Any, *, delay_ms: float | None = None,
                 temperature: float = 0.0, lengths: Iterable[float] = (math.inf,)):
        if delay_ms is not None and delay_ms not in DELAYS_MS:
            raise VoxtralError(f"delay_ms is {delay_ms}, not a multiple of 80 up to 1200, or 2400")
        self.lengths = list(lengths)  # in samples fed; infinite while a recording goes on
        self.transcripts = [Transcript(tokenizer) for _ in self.lengths]
        self.ended = [length == 0 for length in self.lengths]  # no sound has no words
        audio = tokenizer.audio
        self._delay = audio.get_num_delay_tokens(delay_ms)  # steps
        self._right_pad = audio.n_right_pad_tokens(delay_ms)  # steps of silence: delay + 1 + 10
        self._eos_id = tokenizer.eos_id
        self._model = model
        self._encoder_state = EncoderState(model.encoder_args, len(self.lengths))
        # The eight spectrogram windows of a step, taken together, are a moving window again. In
        # front stand half a window, to centre the first one, and the 32 steps of silence.
        window = model.spectrogram.window_size
        silence = audio.n_left_pad_tokens * STEP
        self._windows = Carry(STEP - model.spectrogram.hop_length + window, STEP,
                              zeros=window // 2 + silence)
        pad_id = tokenizer.get_special_token("[STREAMING_PAD]")
        prompt = [tokenizer.bos_id] + [pad_id] * (audio.n_left_pad_tokens + self._delay)
        self._generator = Generator(model, prompt, self._delay, len(self.lengths), temperature)
        self._embeddings: mx.array | None = None  # [B, n, D] that wait for their token
        self._times: deque[float] = deque()  # where steps that wait for their token end, in seconds
        # Two clocks: what was fed makes the steps, what was heard gives their times.
        self._fed = 0  # samples, with the silence that flush puts in
        self._heard = 0  # samples of the recording
        self._flushed = 0  # samples of the recording at the last flush

    text = property(lambda self: self.transcripts[0].text)
    tokens = property(lambda self: self.transcripts[0].tokens)
    words = property(lambda self: self.transcripts[0].words)

    def feed(self, samples: np.ndarray) -> str:
        """Take the next samples [n] and return the text that they made possible, often none."""
        if self.lengths[0] < math.inf:
            raise VoxtralError("the stream is finished")
        return self._run(as_samples(samples)[None])

    def flush(self) -> str:
        """In a pause: push the pending words out with silence, which later times do not count."""
        if self._heard == self._flushed:
            return ""  # nothing was said since
        self._flushed = self._heard
        steps = -(-self._fed // STEP) + self._right_pad
        return self._run_silence(steps * STEP - self._fed)

    def finish(self) -> str:
        """End the recording and return the rest of its text."""
        before = len(self.text)
        self.lengths = [min(length, self._fed) for length in self.lengths]  # a live one ends here
        self.flush()
        # Half a window of silence completes the last window of the spectrogram.
        self._run_silence(self._model.spectrogram.window_size // 2)
        for transcript in self.transcripts:
            transcript.close()
        self.ended = [True] * len(self.ended)
        return self.text[before:]

    def _run_silence(self, n: int) -> str:
        return self._run(np.zeros((len(self.lengths), n), np.float32), silence=True)

    def _run(self, samples: np.ndarray, silence: bool = False) -> str:
        """The one path: samples [B, n] -> mel frames -> audio embeddings -> tokens -> text."""
        before = len(self.text)
        n = samples.shape[1]
        for end in range(STEP - self._fed % STEP, n + 1, STEP):
            self._times.append((self._heard + (0 if silence else end)) / SAMPLE_RATE)
        self._heard += 0 if silence else n
        self._fed += n
        most = 4 * self._model.most_steps(len(samples)) * STEP
        pieces = (self._windows(samples[:, start : start + most, None])[..., 0]
                  for start in range(0, n, most))
        mels = (self._model.spectrogram.mel_frames(x) for x in pieces if x.shape[1])
        mel = next(mels, None)
        while mel is not None:
            embeddings = self._model.embed_audio(mel, self._encoder_state)
            mel = next(mels, None)  # numpy makes it while the GPU computes the embeddings
            self._decode(embeddings)
        # Evaluate here, as in Generator: the next call may come from another thread.
        mx.eval(self._embeddings, self._encoder_state.conv1.rest, self._encoder_state.conv2.rest)
        return self.text[before:]

    def _decode(self, embeddings: mx.array) -> None:
        """Take the next audio embeddings [B, n, D] and generate the tokens that they allow."""
        if self._embeddings is not None:
            embeddings = mx.concatenate([self._embeddings, embeddings], axis=1)
        start = 0
        end = self._generator.ids.shape[1]  # the prompt needs so many; then each token needs one
        unread: mx.array | None = None
        while not all(self.ended) and end <= embeddings.shape[1]:
            ids = self._generator(embeddings[:, start:end])
            # Reading a token waits until it is computed. So read the one before while the GPU
            # computes this one: the decoder takes its own last token without our reading it.
            if unread is not None:
                self._append(unread)
            unread = ids
            start = end
            end += 1
        if unread is not None:
            self._append(unread)
        self._embeddings = embeddings[:, start:]

    def _append(self, ids: mx.array) -> None:
        """Append a token of each recording, ids [B, 1]."""
        time = self._times.popleft()
        rows: Any = ids.tolist()  # ids[:, 0] would be a new operation, queued behind the next step
        for i, (transcript, length) in enumerate(zip(self.transcripts, self.lengths)):
            (token,) = rows[i]
            newest = len(transcript.tokens) + self._delay  # the step that this token heard last
            # The end of sequence is a token like any other until the recording is over.
            recording_over = newest * STEP >= length
            silence_over = (newest - self._right_pad) * STEP >= length
            self.ended[i] |= silence_over or (recording_over and token == self._eos_id)
            if not self.ended[i]:
                transcript.append(token, min(time, length / SAMPLE_RATE))


def transcribe(model: Voxtral, tokenizer: Any, audio: Any, *,
               delay_ms: float | None = None, temperature: float = 0.0) -> Any:
    """Transcribe a recording, 16 kHz mono samples [n] -> Transcript, or a list of them -> a list.

    The recordings of a list run in lockstep. Decoding is bound by reading the weights, which they
    share, so a token for each of them costs little more than one. Shorter recordings are padded
    with silence, and end where they would end alone. `delay_ms` is 2400 by default. See Stream for
    the rest.
    """
    several = isinstance(audio, (list, tuple))
    recordings = [as_samples(samples) for samples in (audio if several else [audio])]
    if not recordings:
        return []
    lengths = [len(samples) for samples in recordings]
    rows = np.stack([np.pad(x, (0, max(lengths) - len(x))) for x in recordings])  # [B, n]
    delay_ms = max(DELAYS_MS) if delay_ms is None else delay_ms  # latency does not matter here
    stream = Stream(model, tokenizer, delay_ms=delay_ms, temperature=temperature, lengths=lengths)
    stream._run(rows)
    stream.finish()
    return stream.transcripts if several else stream.transcripts[0]


# ------------------------------------------------------------------------------------- checkpoints
# The weights are published in four layouts, which differ in the names of modules. The first names
# are voxmlx's and those of the modules above. What begins with a dot is inside a layer, and a bar
# separates the names that transformers gives to a norm in the encoder and in the decoder.

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
.attention.q_proj .attention.wq .attention.wq .self_attn.q_proj
.attention.k_proj .attention.wk .attention.wk .self_attn.k_proj
.attention.v_proj .attention.wv .attention.wv .self_attn.v_proj
.attention.o_proj .attention.wo .attention.wo .self_attn.o_proj
.ffn_norm .ffn_norm .ffn_norm .final_layer_norm|.post_attention_layernorm
.mlp.gate_proj .feed_forward.w1 .feed_forward_w1 .mlp.gate_proj
.mlp.down_proj .feed_forward.w2 .feed_forward_w2 .mlp.down_proj
.mlp.up_proj   .feed_forward.w3 .feed_forward_w3 .mlp.up_proj
.ada_norm.linear_in  .ada_rms_norm_t_cond.0 .ada_rms_norm_t_cond.ada_down .ada_rms_norm.linear1
.ada_norm.linear_out .ada_rms_norm_t_cond.2 .ada_rms_norm_t_cond.ada_up   .ada_rms_norm.linear2
"""
WORDS = NAMES.split()
CONVERTED = {name: WORDS[i - i % 4] for i, names in enumerate(WORDS) for name in names.split("|")}
FIELDS = {  # of transformers' config.json -> of params.json
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads", "head_dim": "head_dim", "vocab_size": "vocab_size",
    "intermediate_size": "hidden_dim", "sliding_window": "sliding_window",
    "rms_norm_eps": "norm_eps"}


def converted_name(name: str) -> str:
    """A tensor's name in the converted layout; modules that NAMES does not know keep theirs."""
    name = re.sub(r"^(mm_streams_embeddings\.embedding_module|mm_whisper_embeddings)\.", "", name)
    split: Any = re.fullmatch(r"((?:.*\.)?(?:transformer_)?layers)?(\.\d+)?(.*?)(\.\w+)?", name)
    stack, layer, module, kind = split.groups("")
    return CONVERTED.get(stack, stack) + layer + CONVERTED.get(module, module) + kind


def read_config(folder: Path, files: set[str]) -> tuple[str, dict]:
    """The layout that these files have, and their configuration in the form of params.json."""
    config = json.loads((folder / "config.json").read_bytes()) if "config.json" in files else {}
    if "multimodal" in config:
        return "converted", config
    if {"params.json", "consolidated.safetensors"} <= files:
        return "original", json.loads((folder / "params.json").read_bytes())
    if "encoder_args" in config and "decoder" in config:
        layout = "mlx-audio"
        text = config["decoder"]
        audio = {"audio_encoding_args": config.get("audio_encoding_args"), **config["encoder_args"]}
    elif config.get("model_type") == "voxtral_realtime":
        layout = "transformers"
        text, audio = ({our: part[name] for name, our in FIELDS.items() if name in part}
                       | {"rope_theta": part["rope_parameters"]["rope_theta"]}
                       for part in (config["text_config"], config["audio_config"]))
        text["ada_rms_norm_t_cond_dim"] = 32  # transformers hard-codes it
        audio["audio_encoding_args"] = asdict(Spectrogram())
        audio["downsample_factor"] = config["downsample_factor"]
    else:
        what = f"a {config.get('model_type')} checkpoint" if config else "not a model folder"
        raise VoxtralError(f"{what}; needed: Voxtral Mini 4B Realtime and its weights")
    factor = {"downsample_factor": audio.pop("downsample_factor")}
    whisper = {"encoder_args": audio, "downsample_args": factor}
    return layout, {**text, "multimodal": {"whisper_model_args": whisper}}


def weight_files(folder: Path, files: set[str], layout: str) -> list[str]:
    """The files with the weights: one set of them, since mistralai's repository has two."""
    names = {"consolidated.safetensors" if layout == "original" else "model.safetensors"}
    if layout != "original" and "model.safetensors.index.json" in files:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        names = set(index["weight_map"].values())
    if missing := names - files:
        raise VoxtralError(f"the weights are incomplete: {min(missing)} is not there")
    return sorted(names)


def read_weights(paths: list[Path], layout: str, model: Voxtral) -> dict[str, mx.array]:
    """All tensors of a checkpoint under their converted names; lazy, nothing is read yet."""
    tensors: Any = {}
    for path in paths:
        tensors |= mx.load(str(path))
    weights: dict[str, mx.array] = {}
    for theirs, w in tensors.items():
        name = converted_name(theirs)
        if layout in ("original", "transformers") and "conv" in name and w.ndim == 3:
            w = w.swapaxes(1, 2)  # [out, in, kernel] -> [out, kernel, in]
        if layout == "transformers" and re.search(r"\.[qk]_proj\.", name):
            # There rows i and i + head_dim / 2 of a head turn together, here neighbours do.
            args = model.encoder_args if name.startswith("encoder") else model.decoder_args
            halves = w.reshape(-1, 2, args.head_dim // 2, *w.shape[1:])
            w = halves.swapaxes(1, 2).reshape(w.shape)
        if not re.search(r"\b(output|lm_head)\.\w+$", theirs):  # those are tied to the embedding
            weights[name] = w
    return weights


def quantisation(path: str, module: Any, weights: dict[str, mx.array]) -> dict | bool:
    """How the weights of a module are quantised, whatever the configuration says; False: not."""
    if f"{path}.scales" not in weights:
        return False
    packed = weights[f"{path}.weight"]
    assert packed.dtype == mx.uint32, f"{path}.weight is of type {packed.dtype}"
    inputs = module.weight.shape[-1]  # packed into words of 32 bits; a group has a scale
    bits = packed.shape[-1] * 32 // inputs
    group = inputs // weights[f"{path}.scales"].shape[-1]
    affine = f"{path}.biases" in weights  # mxfp4, mxfp8 and nvfp4 have none
    mode = "affine" if affine else f"nvfp{bits}" if group == 16 else f"mxfp{bits}"
    return {"group_size": group, "bits": bits, "mode": mode}


def prepare_model(folder: Path, dtype: str | mx.Dtype | None) -> tuple[Voxtral, dict]:
    """The model of a folder with its weights in place, still lazy, and its configuration."""
    dtype = getattr(mx, dtype) if isinstance(dtype, str) else dtype
    try:
        files = set(os.listdir(folder))
        layout, config = read_config(folder, files)
        model = Voxtral(config)
        paths = [folder / name for name in weight_files(folder, files, layout)]
        weights = read_weights(paths, layout, model)
        nn.quantize(model, class_predicate=lambda path, part: quantisation(path, part, weights))
        model.load_weights(list(weights.items()))  # strict: none missing, unknown or misshapen
        # One type throughout: a norm in float32 would make everything after it float32.
        model.set_dtype(dtype or model.encoder.conv1.weight.dtype)
        return model, config
    except OSError:
        raise
    except Exception as error:  # whatever trips over the files, it is they that are wrong
        why = ", ".join(str(error).split(",\n")[:5])  # names five tensors of possibly hundreds
        if not isinstance(error, VoxtralError):
            why = f"damaged, or not Voxtral Mini 4B Realtime ({type(error).__name__}: {why})"
        raise VoxtralError(f"{folder}: {why}") from error


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
    try:
        tokenizer = Tekkenizer.from_file(folder / "tekken.json")
        audio: Any = tokenizer.audio
        theirs = (tokenizer.n_words, audio.sampling_rate, audio.raw_audio_length_per_tok)
        assert audio.is_streaming and theirs == (model.vocab_size, SAMPLE_RATE, STEP), theirs
    except Exception as error:  # whatever mistral-common trips over, it is the file that is wrong
        why = f"missing, not this model's, or not for this mistral-common ({error!r})"[:300]
        raise VoxtralError(f"{folder / 'tekken.json'}: {why}") from error
    if mx.default_device() == mx.cpu:
        # The BLAS of MLX's Linux wheel is twice as fast with inputs outermost in memory.
        for _, module in model.named_modules():
            if type(module) is nn.Linear:
                module.weight = mx.contiguous(module.weight.T).T
    mx.eval(model.parameters())  # reads all files, once
    return model, tokenizer, config


HUB_ERRORS = {
    "HFValidationError": "no such folder, and no name for the hub either (OWNER/NAME)",
    "RepositoryNotFoundError": "no such folder, nor on the hub (if private: hf auth login)",
    "GatedRepoError": "accept its owner's terms on huggingface.co first, then: hf auth login"}


def download_weights(model_id: str) -> Path:
    """A local folder; or a hub repository's in the cache, with one set of weights downloaded.

    What was downloaded before is used when the hub cannot be reached. Raises VoxtralError.
    """
    folder = Path(model_id).expanduser()
    if folder.exists():
        return folder
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    files = set[str]()
    try:
        files = {file.rfilename for file in HfApi().model_info(model_id).siblings or []}
        folder = Path(snapshot_download(model_id, allow_patterns="*.json"))
        wanted = weight_files(folder, files, read_config(folder, files)[0])
        return Path(snapshot_download(model_id, allow_patterns=[*wanted, "*.json"]))
    except VoxtralError as error:
        raise VoxtralError(f"{model_id}: {error}") from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise VoxtralError(f"{model_id}: its configuration is damaged") from error
    except Exception as error:  # no such repository, no network, no space: dozens of classes
        name = type(error).__name__
        why = HUB_ERRORS.get(name, f"could not be downloaded ({name}: {error})"[:90])
        if not files and name not in HUB_ERRORS:  # the hub did not answer
            if isinstance(cached := try_to_load_from_cache(model_id, "tekken.json"), str):
                return Path(cached).parent
            why = f"no such folder, not downloaded yet, and no answer from the hub ({name})"
        raise VoxtralError(f"{model_id}: {why}") from error


def convert(path_or_id: str | Path, out_dir: str | Path, *, bits: int | None = None,
            group_size: int = 64, dtype: str | mx.Dtype | None = None) -> int:
    """Write a checkpoint in the converted layout, quantised to `bits` if given.

    A quantised one keeps its quantisation, and VoxtralError is raised to give it another. Returns
    the size of the weights in bytes. Raises VoxtralError also unless `out_dir` is new or empty, and
    OSError; nothing appears there before all of it is written.
    """
    from huggingface_hub import split_state_dict_into_shards_factory as split

    folder = download_weights(str(path_or_id))
    out = Path(out_dir).expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise VoxtralError(f"{out}: exists and is not an empty folder")
    model, config = prepare_model(folder, dtype)
    if bits and any(hasattr(module, "bits") for module in model.modules()):
        raise VoxtralError(f"{folder}: is quantised already")
    if bits:
        # Each Linear, and the embedding, which is the output layer too: decoding is bound by
        # reading them. ada_norm, used once per stream, could stay, but voxmlx wants it quantised.
        nn.quantize(model, group_size, bits, class_predicate=lambda _, part:
                    hasattr(part, "to_quantized") and part.weight.shape[-1] % group_size == 0)
    config = {key: value for key, value in config.items() if not key.startswith("quantization")}
    settings = {path: {"group_size": part.group_size, "bits": part.bits, "mode": part.mode}
                for path, part in model.named_modules() if hasattr(part, "bits")}
    if settings:  # for other programs: of most modules, then of the rest by name
        most = max(settings.values(), key=list(settings.values()).count)
        config["quantization"] = most | {path: s for path, s in settings.items() if s != most}
    weights: Any = dict(tree_flatten(model.parameters()))
    del model  # so that each tensor can be read, written and forgotten
    shards = split(weights, get_storage_size=lambda w: w.nbytes, max_shard_size="4GB",
                   filename_pattern="model{suffix}.safetensors")
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, ignore_cleanup_errors=True) as scratch:
        new = Path(scratch, "model")
        new.mkdir()
        for file, names in shards.filename_to_tensors.items():
            part = {name: weights.pop(name) for name in names}
            mx.save_safetensors(str(new / file), part, {"format": "mlx"})
            del part  # room for the next
        for file, content in (("config.json", config), ("model.safetensors.index.json", index)):
            (new / file).write_text(json.dumps(content, indent=1, sort_keys=True))
        (new / "tekken.json").write_bytes((folder / "tekken.json").read_bytes())
        os.replace(new, out)  # all or nothing
    return shards.metadata["total_size"]


# --------------------------------------------------------------------------------------- subtitles

SHORTEST = 5 / 6  # seconds that a cue stays on screen, and the pause that ends one
WIDE = "\u2e80-\ud7ff\uf900-\ufaff\ufe30-\ufe6f\uff01-\uff60\U0001f000-\U0003ffff"  # two columns


def wrap(text: str, width: int = 42) -> list[str]:
    """Break text into lines of so many columns: at spaces, and around wide characters."""
    lines = [""]
    # Pieces that stay whole: a wide character with the punctuation behind it, a narrow word.
    for piece in re.findall(rf"\s*(?:[{WIDE}][^\w\s]{{,9}}|[^\s{WIDE}]{{1,{width}}})", text):
        line = lines[-1] + re.sub(r"\s+", " ", piece)  # an empty line would end the cue
        if lines[-1] and len(line) + len(re.findall(f"[{WIDE}]", line)) > width:
            lines.append("")
            line = piece
        lines[-1] = line.strip()
    return lines


class Subtitles:
    """Words to cues of SubRip ("srt") or WebVTT ("vtt"), each as soon as it is complete.

    A cue ends at a pause, after a sentence, and within 7 s and two lines of 42 columns.
    """

    def __init__(self, kind: str):
        self.srt = kind == "srt"
        self.header = "" if self.srt else "WEBVTT\n\n"
        self.count = 0
        self.first = 0  # word of the open cue

    def update(self, words: list[Word], time: float = math.inf) -> str:
        """The cues that are complete, now that all words up to `time` seconds are known."""
        out = self.header
        self.header = ""
        cue: list[Word] = []
        for word in words[self.first :]:
            text = "".join(other.text for other in cue)
            sentence = re.search(r"[.!?…。！？][\"'”’»)」』]*\s*$", text)
            if cue and (sentence or word.start - cue[-1].end > SHORTEST
                        or word.end - cue[0].start > 7 or len(wrap(text + word.text)) > 2):
                out += self.close(cue, word.start)
                cue = []
            cue.append(word)
        # A word still to come ends after `time` and begins at most LONGEST_WORD earlier.
        done = cue and time > cue[-1].end + SHORTEST + LONGEST_WORD
        return out + self.close(cue, math.inf) if done else out

    def close(self, cue: list[Word], limit: float) -> str:
        """The text of a cue, which must be off the screen at `limit` seconds."""
        self.first += len(cue)
        lines = list(filter(None, wrap("".join(word.text for word in cue))))
        lines = lines if self.srt else [html.escape(line, quote=False) for line in lines]
        start = cue[0].start
        end = max(cue[-1].end, min(start + SHORTEST, limit))
        out = ""
        for i in range(0, len(lines), 2):  # one group alone may be too long for a cue
            self.count += 1
            times = [self.clock(start + (end - start) * min(1, j / len(lines))) for j in (i, i + 2)]
            text = " --> ".join(times) + "\n" + "\n".join(lines[i : i + 2]) + "\n\n"
            out += f"{self.count}\n{text}" if self.srt else text
        return out

    def clock(self, seconds: float) -> str:
        minutes, ms = divmod(round(seconds * 1000), 60_000)
        dot = "," if self.srt else "."
        return f"{minutes // 60:02}:{minutes % 60:02}:{ms // 1000:02}{dot}{ms % 1000:03}"


# ------------------------------------------------------------------------------------ command line

NOT_PCM = re.compile(  # how mp3, aac, mp4, Matroska, AIFF, CAF, AU, Ogg, FLAC, text, ... begin
    rb"ID3|\xff[\xe2-\xfb][\x10-\xef]|.{4}ftyp|\x1aE\xdf\xa3|FORM|RIF|caff|\.snd|OggS|fLaC|"
    rb"\x30\x26\xb2\x75|\x89PNG|\xff\xd8\xff|PK\x03\x04|\x1f\x8b|[\t\n\r -~]{12}", re.DOTALL)
PCM_HEADER = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 0, b"WAVEfmt ", 16,
                         1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16, b"data", 0xFFFFFFFF)
FAILURES = (OSError, VoxtralError, RuntimeError, ValueError, MemoryError)  # of one recording


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def complain(error: Any, name: str = "") -> int:
    """Say in one line what is wrong, and with what; the result is the exit code for it."""
    why = str(getattr(error, "strerror", None) or error) or type(error).__name__
    named = not name or why.startswith(f"{name}: ")
    note("voxtral.py: " + " ".join((why if named else f"{name}: {why}").split()))
    return 1


def on_interrupt(handler: Any) -> None:
    """Have Ctrl-C and SIGTERM call `handler`."""
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


class Writer:
    """A recording of the command line: where its transcript goes, and what is wrong with it."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name = name
        self.args = args
        self.delay_ms = args.delay or (480 if name == "-" else max(DELAYS_MS))
        kind = "txt" if args.format == "text" else args.format
        stem = "stdin" if name == "-" else Path(name).stem
        self.path = Path(args.output_dir or "", f"{stem}.{kind}")
        self.size = os.path.getsize(name) if os.path.exists(name) else 0  # bytes
        self.out: Any = sys.stdout
        self.subtitles = Subtitles(args.format)
        self.seconds = 0.0  # of sound
        self.loudest = 0.0
        self.problems: list[Any] = []
        # Where text and progress would share the line of a terminal, the text is the progress.
        shared = args.format == "text" and not args.output_dir and sys.stdout.isatty()
        self.erase = "\r\x1b[K" if sys.stderr.isatty() and not args.quiet and not shared else ""

    def load(self) -> np.ndarray:
        """The samples of the file; what load_audio warns of is a problem."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            samples = load_audio(self.name)
        self.problems += [w.message for w in caught if w.category is UserWarning]
        return samples

    def hear(self, samples: np.ndarray) -> float:
        """Count samples that were heard; returns the second at which they begin."""
        begin = self.seconds
        self.seconds += len(samples) / SAMPLE_RATE
        self.loudest = max(self.loudest, np.abs(samples).max(initial=0))
        return begin

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """What fails inside is a problem of this recording and does not stop the others."""
        try:
            yield
        except BrokenPipeError:
            raise
        except FAILURES as error:
            self.problems.append(error)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open the output; a file of --output-dir appears only when it is complete."""
        if not self.args.output_dir:
            yield
            return
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".") as scratch:
            with open(Path(scratch, "new"), "w", encoding="utf-8") as self.out:
                yield
            os.replace(self.out.name, self.path)

    def write(self, text: str, transcript: Transcript, time: float = math.inf,
              progress: str = "") -> None:
        """Write new text, or the cues that are complete; then show progress."""
        if self.args.format in ("srt", "vtt"):
            text = self.subtitles.update(transcript.words, time)
        print(self.erase, end="", file=sys.stderr, flush=True)
        print("" if self.args.format == "json" else text, end="", file=self.out, flush=True)
        print(progress if self.erase else "", end="", file=sys.stderr, flush=True)

    def end(self, text: str, transcript: Transcript) -> None:
        """Write the last text, or the JSON record."""
        self.write(text + "\n", transcript)
        if self.args.format == "json":
            record = {"file": self.name, "model": self.args.model, "duration": self.seconds,
                      "delay_ms": self.delay_ms, "text": transcript.text,
                      "tokens": transcript.tokens,
                      "words": [asdict(word) for word in transcript.words]}
            print(json.dumps(record, ensure_ascii=False), file=self.out, flush=True)

    def complain(self) -> int:
        """Say what was wrong; returns the exit code."""
        name = "standard input" if self.name == "-" else self.name
        if self.seconds and self.loudest < 1e-4 and not self.problems:
            note(f"voxtral.py: {name}: nothing is heard: silence, or channels that cancel out")
        return complain(self.problems[0], name) if self.problems else 0  # the others follow from it


class StandardInput:
    """Standard input, which a thread receives as a WAV stream while the model works."""

    def __init__(self, problems: list[Any], stopped: threading.Event):
        if sys.stdin is None or os.isatty(0):
            raise VoxtralError("closed, or a terminal: pipe sound into it")
        # One thread appends and the other takes from the front; both are atomic and need no lock.
        self.data = bytearray()
        self.taken = 0  # bytes
        self.ended = False
        self.stopped = stopped
        self.problems = problems  # takes what is wrong
        on_interrupt(self.stop)

    def stop(self, *_: Any) -> None:
        """Handle the first Ctrl-C or SIGTERM; the next one leaves at once."""
        self.ended = True
        self.stopped.set()
        on_interrupt(signal.default_int_handler)

    def receive(self) -> None:
        """The thread. It reads the descriptor, since a reader of sys.stdin holds a lock at exit."""
        head = b""
        try:
            while len(head) < 12 and (piece := os.read(0, 1 << 16)):
                head += piece
            rest = iter(partial(os.read, 0, 1 << 16), b"")
            pieces: Iterator[bytes] = itertools.chain([head], rest)
            if not IS_WAV.match(head) and NOT_PCM.match(head):
                pieces = by_ffmpeg(pieces)
            elif not IS_WAV.match(head):  # raw samples
                self.data += PCM_HEADER
            for piece in pieces:
                while len(self.data) > 1 << 27:  # 128 MiB: the writer must wait
                    time.sleep(0.1)
                if self.ended:
                    break
                self.data += piece
        except (OSError, VoxtralError) as error:
            self.problems.append(error)
        self.ended = True

    def read(self, n: int) -> bytes:
        """The next n bytes; fewer only at the end."""
        while len(self.data) < n and not self.ended:
            time.sleep(0.005)
        wanted = bytes(self.data[:n])
        self.taken += len(wanted)
        del self.data[:n]
        return wanted

    def pieces_of_sound(self, quiet: bool) -> Iterator[np.ndarray]:
        """The samples, 40 ms to 4 s at once; one line says if the model falls behind."""
        threading.Thread(target=self.receive, daemon=True).start()
        began = time.monotonic()
        heard = 0.0  # seconds
        try:
            for piece in to_16k(wav_pieces(self.read, lambda: len(self.data))):
                yield piece
                heard += len(piece) / SAMPLE_RATE
                waiting = len(self.data) * heard / self.taken  # seconds
                behind = min(waiting, time.monotonic() - began - heard)
                if behind > 2 and not quiet:
                    note(f"standard input: decoding is {behind:.1f} s behind")
                    quiet = True  # once is enough
        except (EOFError, VoxtralError) as error:
            self.problems.append(error)
        except DAMAGE:  # also where ffmpeg gave nothing, and has said why
            self.problems.append("cut short, or no sound")


def by_ffmpeg(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Sound of any kind, as it arrives -> a WAV stream."""
    if not shutil.which("ffmpeg"):
        raise VoxtralError("neither WAV nor raw PCM; ffmpeg, which is not installed, may read it:"
                           " ffmpeg -i FILE -f wav - | python voxtral.py -")
    child: Any = subprocess.Popen(ffmpeg("pipe:0", "wav"), bufsize=0, stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def feed() -> None:
        with contextlib.suppress(OSError), child.stdin:
            for piece in pieces:
                child.stdin.write(piece)

    threading.Thread(target=feed, daemon=True).start()
    yield from iter(partial(child.stdout.read, 1 << 16), b"")
    if child.wait():
        raise VoxtralError("ffmpeg could not read all of it")


def run_one(writer: Writer, model: Voxtral, tokenizer: Any, args: argparse.Namespace) -> None:
    """Transcribe a recording piece by piece, and write the text as it is decoded."""
    total = ""
    stopped = threading.Event()  # by Ctrl-C
    if writer.name == "-":
        pieces: Any = StandardInput(writer.problems, stopped).pieces_of_sound(args.quiet)
    else:
        samples = writer.load()
        pieces = np.split(samples, range(64 * STEP, len(samples), 64 * STEP))
        total = f" of {len(samples) / SAMPLE_RATE:.1f}"
    began = time.perf_counter()
    stream = Stream(model, tokenizer, delay_ms=writer.delay_ms, temperature=args.temperature)
    transcript = stream.transcripts[0]
    with writer.opened():
        try:
            for piece in pieces:
                text = stream.feed(piece)
                writer.hear(piece)
                times = writer.seconds / (time.perf_counter() - began)
                progress = f"{writer.seconds:.1f}{total} s, {times:.1f} x real time"
                writer.write(text, transcript, transcript.time, progress)
        except BaseException:  # what was printed ends with its line, also after a second Ctrl-C
            writer.write("\n" if writer.seconds else "", transcript, time=0)
            raise
        if not writer.seconds:
            raise KeyboardInterrupt if stopped.is_set() else VoxtralError("holds no samples")
        writer.end(stream.finish(), transcript)
    if not args.quiet:
        note(f"{writer.name}: {progress}")
    if stopped.is_set():
        raise KeyboardInterrupt  # now that all is written


def cut_at_pauses(samples: np.ndarray, n: int) -> list[np.ndarray]:
    """Cut a recording into at most n pieces of at least 30 s where it is quietest.

    Cuts into equal parts each move, by less than 5 s, to the middle of the quietest 0.3 s there.
    """
    tick = SAMPLE_RATE // 50  # 20 ms; a cut is at a multiple of four, so that steps stay steps
    n = max(1, min(n, len(samples) // (40 * SAMPLE_RATE)))
    power = np.square(samples[: len(samples) // tick * tick]).reshape(-1, tick).mean(axis=1)
    loudness = np.convolve(power, np.ones(15), "same")  # of the 0.3 s around each tick
    evens = [len(power) * k // n for k in range(1, n)]
    cuts = [even - 250 + int(np.argmin(loudness[even - 250 : even + 250])) for even in evens]
    return np.split(samples, [cut // 4 * 4 * tick for cut in cuts])


def run_batch(writers: list[Writer], model: Voxtral, tokenizer: Any,
              args: argparse.Namespace) -> int:
    """Transcribe files --batch at a time and write them in their order; returns the exit code."""
    code = 0
    waiting = list(writers)
    transcripts: dict[Writer, Transcript] = {}
    # The size of a file stands in for its length, which is not known before it is read.
    left = sorted(writers, key=lambda writer: -writer.size)
    while left:
        pieces: list[tuple[Writer, float, np.ndarray]] = []  # of whom, from which second on
        while left and len(pieces) < args.batch:
            writer = left.pop(0)
            with writer.failures():
                cut = cut_at_pauses(writer.load(), args.batch)
                pieces += [(writer, writer.hear(piece), piece) for piece in cut]
        began = time.perf_counter()
        parts: list[Transcript] = []
        try:
            for i in range(0, len(pieces), args.batch):
                samples = [piece for _, _, piece in pieces[i : i + args.batch]]
                parts += transcribe(model, tokenizer, samples, delay_ms=args.delay,
                                    temperature=args.temperature)
            for (writer, second, _), part in zip(pieces, parts):
                transcripts.setdefault(writer, Transcript(tokenizer)).extend(part, second)
        except FAILURES as error:
            for writer in {writer for writer, _, _ in pieces}:
                writer.problems.append(f"{error}; a smaller --batch needs less memory")
        seconds = sum(len(piece) for _, _, piece in pieces) / SAMPLE_RATE
        if pieces and not args.quiet:
            times = seconds / (time.perf_counter() - began)
            note(f"{len(pieces)} pieces: {seconds:.1f} s, {times:.1f} x real time")
        while waiting and waiting[0] not in left:
            writer = waiting.pop(0)
            if writer not in transcripts:
                code |= writer.complain()
                continue
            with writer.failures(), writer.opened():
                writer.end(transcripts[writer].text, transcripts.pop(writer))
            code |= writer.complain()
    return code


def run_files(args: argparse.Namespace) -> int:
    """Transcribe all recordings; a bad one does not stop the others, but the exit code tells."""
    files = [name for name in args.audio if name == "-" or os.path.exists(name)]
    code = max([complain(f"{n!r}: no such file") for n in args.audio if n not in files], default=0)
    if not files:  # say so before gigabytes are loaded
        return code
    Path(args.output_dir or "").mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    model, tokenizer, _ = load_voxtral_model(args.model, args.dtype)
    if not args.quiet:
        size = mx.get_active_memory() / 1e9
        seconds = time.perf_counter() - began
        device = mx.default_device()
        slow = " only: far slower than real time" if device == mx.cpu and size > 1 else ""
        note(f"{args.model}: {size:.2f} GB in {seconds:.1f} s, {device}{slow}")
    world = mx.distributed.init()  # under mlx.launch: each process takes every n-th file
    writers = [Writer(name, args) for name in files[world.rank() :: world.size()]]
    if args.batch > 1 or world.size() > 1:  # processes write in one piece, or their lines would mix
        code |= run_batch([w for w in writers if w.name != "-"], model, tokenizer, args)
        writers = [w for w in writers if w.name == "-"]
    for writer in writers:
        on_interrupt(signal.default_int_handler)  # standard input had its own
        with writer.failures():
            run_one(writer, model, tokenizer, args)
        code |= writer.complain()
    return code


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("voxtral.py", description="Speech to text: Voxtral in MLX.")
    add = parser.add_argument
    add("audio", nargs="*", help="audio files; or - for standard input, transcribed as it arrives:"
        " a WAV stream, raw 16-bit mono samples at 16 kHz, or what ffmpeg makes sound of")
    add("--model", default=DEFAULT_MODEL_ID, help="folder or hub id (default: %(default)s)")
    add("--delay", type=int, metavar="MS", choices=DELAYS_MS, help="how far the text runs behind:"
        " 80 to 1200 in steps of 80, or 2400 (default: 480 for -, else 2400)")
    add("--format", choices=("text", "srt", "vtt", "json"), default="text", help="default: text")
    add("--output-dir", metavar="DIR", help="write a file per recording to DIR: NAME.txt, ...")
    add("--batch", type=int, metavar="N", default=1,
        help="N recordings at a time; those over 80 s are cut at quiet places to fill up")
    add("--temperature", type=float, default=0.0, help="of sampling; 0, the default, is greedy")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="compute in this type")
    add("--quiet", action="store_true", help="no progress, no summary")
    add("--convert", metavar="DIR", help="write a converted checkpoint to DIR, do not transcribe")
    add("--bits", type=int, choices=(4, 6, 8), help="with --convert: quantise to so many bits")
    add("--group-size", type=int, choices=(32, 64, 128), default=64, help="... in such groups")
    args = parser.parse_args(argv)
    if bool(args.audio) == bool(args.convert) or args.audio.count("-") > 1:
        parser.error("name audio files (- once at most), or --convert DIR without any")
    if not 1 <= args.batch <= 1024 or not 0 <= args.temperature < math.inf:
        parser.error("--batch takes 1 to 1024, --temperature 0 or more")
    if args.bits and not args.convert:
        parser.error("--bits goes with --convert")
    if len(args.audio) > 1 and args.format in ("srt", "vtt") and not args.output_dir:
        parser.error(f"several files as {args.format} need --output-dir")
    if args.output_dir and len({Writer(n, args).path for n in args.audio}) < len(args.audio):
        parser.error("two of these would be written to the same file of --output-dir")
    return args


def main(argv: list[str] | None = None) -> int:
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # standard streams that were closed: their numbers must not go to other files
    os.close(number)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    args = parse_args(argv)
    if sys.stdout is None and not args.output_dir:
        return complain("standard output is closed")
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    try:
        on_interrupt(signal.default_int_handler)
        if not args.convert:
            return run_files(args)
        size = convert(args.model, args.convert, bits=args.bits, group_size=args.group_size,
                       dtype=args.dtype)
        note(f"{args.convert}: {size / 1e9:.2f} GB")
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit
        return complain("standard output was closed")
    except (VoxtralError, RuntimeError, OSError) as error:  # RuntimeError: MLX has no memory
        return complain(error, str(getattr(error, "filename", None) or ""))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
