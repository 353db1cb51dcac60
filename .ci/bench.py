"""How fast? usage: python .ci/bench.py [full] [table] [turns] [batch] [digits]

    full      the real model's sizes (a GPU is needed), else those of a small one; random weights
    table     a step, the encoder and live feeds beside their floors, and beside those of the
              peers that are installed (voxmlx, mlx-audio)
    turns     steps of all in turn, so that nobody has the better minute of the machine
    batch     an hour of sound, 1, 16, 64 and 128 pieces at a time
    digits    wall times with the small real checkpoint of ../shared/digits

Without a word all of it. All figures are medians. Only MLX and numpy are needed: where there is no
mistral-common, the spectrogram is computed with a bank of random filters.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import voxtral as V

try:
    import mistral_common.audio  # noqa: F401
except ImportError:
    stand_in: Any = types.ModuleType("mistral_common.audio")
    stand_in.mel_filter_bank = cache(lambda bins, bands, *_: np.random.rand(bins, bands) / bins)
    sys.modules |= {"mistral_common": types.ModuleType("mistral_common"),
                    "mistral_common.audio": stand_in}

WIDE = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16  # a CPU is slow at bfloat16
DIGITS = ROOT.parent / "shared" / "digits"
DELAY = 6  # steps
Row = tuple[str, float, float | None]  # what, how much, its floor


def sizes(full: bool) -> dict:
    """params.json of the real model, or of a small one."""
    mel = {"num_mel_bins": 128, "hop_length": 160, "window_size": 400, "global_log_mel_max": 1.5}
    encoder: dict = {"dim": 32, "n_layers": 2, "head_dim": 16, "hidden_dim": 64, "n_heads": 2}
    decoder: dict = {"dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 64, "n_heads": 4,
               "n_kv_heads": 2, "sliding_window": 2048, "vocab_size": 1400}
    if full:
        encoder = {"dim": 1280, "n_layers": 32, "head_dim": 64, "hidden_dim": 5120, "n_heads": 32}
        decoder = {"dim": 3072, "n_layers": 26, "head_dim": 128, "hidden_dim": 9216, "n_heads": 32,
                   "n_kv_heads": 8, "sliding_window": 8192, "vocab_size": 131072}
    common = {"rope_theta": 1e6, "norm_eps": 1e-5}
    encoder |= {**common, "n_kv_heads": encoder["n_heads"], "sliding_window": 750,
                "audio_encoding_args": mel}
    whisper = {"encoder_args": encoder, "downsample_args": {"downsample_factor": 4}}
    return {**decoder, **common, "ada_rms_norm_t_cond": True, "ada_rms_norm_t_cond_dim": 32,
            "multimodal": {"whisper_model_args": whisper}}


def random_weights(model: Any, bits: int | None) -> Any:
    """Weights made in place, quantised as in a converted checkpoint."""
    mx.random.seed(0)

    def weight(w: mx.array) -> mx.array:
        return (mx.ones(w.shape) if w.ndim == 1 else mx.random.normal(w.shape) * 0.02).astype(WIDE)

    model.update(tree_map(weight, model.parameters()))
    if bits:
        nn.quantize(model, 64, bits, class_predicate=lambda _, part: (
            hasattr(part, "to_quantized") and part.weight.shape[-1] % 64 == 0))
    mx.eval(model.parameters())
    return model


def kind(bits: int | None) -> str:
    return f"{bits}-bit" if bits else str(WIDE).rpartition(".")[2]


def noise(*shape: int) -> mx.array:
    x = mx.random.normal(shape).astype(WIDE) * 0.02
    mx.eval(x)
    return x


def timed(work: Callable[[], Any], repeats: int = 5, warm: int = 1) -> float:
    """Seconds that `work` takes: the median of some runs after one that does not count."""
    times = []
    for _ in range(warm + repeats):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(work())
        mx.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[warm:]))


def measured_rates(full: bool) -> tuple[float, float]:
    """What this machine can do: bytes per second in a copy, operations per second in a product."""
    x = mx.random.normal((1 << (29 if full else 24),)).astype(mx.bfloat16)
    y = noise(*(8192, 8192) if full else (512, 512))
    mx.eval(x)
    return 2 * x.nbytes / timed(lambda: x + 1), 2 * y.shape[0] ** 3 / timed(lambda: y @ y)


# ---------------------------------------------------------------------------------- the table


def decoding(model: V.Voxtral, batch: int = 1) -> Callable[[mx.array, mx.array], mx.array]:
    """The decoder of a new stream: the last ids and their sound -> tokens, still being computed."""
    scales = model.scales(DELAY)
    caches = [V.KVCache(model.decoder_args, batch) for _ in scales]
    mx.eval(scales)

    def step(ids: mx.array, sound: mx.array) -> mx.array:
        ids = mx.argmax(model(ids, sound, scales, caches), axis=-1)[:, None]
        mx.async_eval(ids)
        return ids

    return step


def our_steps(model: V.Voxtral, length: int, batch: int = 1) -> Callable[[], None]:
    """A function that decodes 40 steps, after a prompt of so many positions."""
    step = decoding(model, batch)
    dim = model.decoder_args.dim
    prompt = noise(1, length, dim) + mx.zeros((batch, 1, 1), WIDE)
    ids = step(mx.full((batch, length), 32), prompt)
    ids.tolist()
    sound = noise(batch, 40, dim)

    def run() -> None:
        nonlocal ids
        for i in range(40):
            unread = ids
            ids = step(ids, sound[:, i : i + 1])
            unread.tolist()
        ids.tolist()

    return run


def floors(cfg: dict, seconds: float) -> tuple[float, float]:
    """Operations to encode so many seconds; bytes of keys and values of a decoder position."""
    e = cfg["multimodal"]["whisper_model_args"]["encoder_args"]
    inner = e["n_heads"] * e["head_dim"]
    layer = 2 * (4 * e["dim"] * inner + 3 * e["dim"] * e["hidden_dim"])
    layer += 4 * e["sliding_window"] * inner
    convs = 2 * 3 * (2 * 128 * e["dim"] + e["dim"] ** 2)
    adapter = 2 * (4 * e["dim"] * cfg["dim"] + cfg["dim"] ** 2) / 4
    operations = seconds * 50 * (e["n_layers"] * layer + convs + adapter)
    return operations, 4 * cfg["n_layers"] * cfg["n_kv_heads"] * cfg["head_dim"]


def size_of(model: nn.Module) -> int:
    leaves: Any = tree_flatten(model.parameters())
    return sum(w.nbytes for _, w in leaves)


def bench_ours(cfg: dict, bits: int | None, rates: tuple, full: bool) -> Iterator[Row]:
    bandwidth, flops = rates
    model = random_weights(V.Voxtral(cfg), bits)
    yield "weights, GB", size_of(model) / 1e9, None
    mx.clear_cache()
    mx.reset_peak_memory()
    mel = mx.random.normal((30_000, 128))
    sound = np.random.RandomState(0).randn(300 * 16_000).astype(np.float32) * 0.1
    for seconds in (30, 60, 300) if full else (5, 10):
        time_ = timed(lambda n=seconds: encode(model, sound[: n * 16_000]), 3)  # type: ignore[misc]
        yield f"encode {seconds} s, ms", 1e3 * time_, 1e3 * floors(cfg, seconds)[0] / flops
    for length in (40, 1000, 8192) if full else (40, 1000):
        read = size_of(model.language_model)
        read += min(length, cfg["sliding_window"]) * floors(cfg, 1)[1]
        time_ = timed(our_steps(model, length), 12) / 40
        yield f"step after {length}, ms", 1e3 * time_, 1e3 * read / bandwidth
    yield from live_feeds(model, mel)
    yield "peak memory, GB", mx.get_peak_memory() / 1e9, None


def encode(model: V.Voxtral, samples: np.ndarray) -> mx.array:
    """Samples [n] -> audio embeddings: a stream whose recording is over encodes all the same."""
    stream = V.Stream(model, Tokenizer(), lengths=[0])
    stream._run(samples[None])
    return stream._audio_embeds


def live_feeds(model: V.Voxtral, mel: mx.array) -> Iterator[Row]:
    """80 ms of sound at a time, for 26 s: the encoder's window fills, and its buffer is renewed."""
    state = V.EncoderState(model.encoder_args)
    step = decoding(model)
    ids = step(mx.full((1, 39), 32), model.embed_audio(mel[None, :312], state))
    ids.tolist()
    times: dict[str, list] = {"encoder": [], "encoder and step": []}
    for i in range(640):
        start = time.perf_counter()
        sound = model.embed_audio(mel[None, 312 + 8 * i : 320 + 8 * i], state)
        if i % 2:
            ids = step(ids, sound)
            ids.tolist()
        else:
            mx.eval(sound)
        times["encoder and step" if i % 2 else "encoder"].append(time.perf_counter() - start)
    for what, seconds in times.items():
        yield f"80 ms, {what}: median, ms", 1e3 * float(np.median(seconds)), None
        yield f"80 ms, {what}: 95 %, ms", 1e3 * float(np.quantile(seconds, 0.95)), None


def voxmlx_model(cfg: dict, bits: int | None) -> Any:
    from voxmlx.model import VoxtralRealtime  # type: ignore[import-not-found]

    return random_weights(VoxtralRealtime(cfg), bits)


def voxmlx_steps(model: Any, cfg: dict, length: int) -> Callable[[], None]:
    from voxmlx.cache import RotatingKVCache  # type: ignore[import-not-found]

    delay = model.time_embedding(mx.array([float(DELAY)]))
    caches = [RotatingKVCache(cfg["sliding_window"]) for _ in range(cfg["n_layers"])]
    prompt = model.language_model.embed(mx.full((1, length), 32)) + noise(1, length, cfg["dim"])
    logits = model.decode(prompt, delay, "causal", caches)
    token = mx.argmax(logits[0, -1:], axis=-1).squeeze()
    mx.eval(token)
    sound = noise(40, cfg["dim"])

    def run() -> None:
        nonlocal token
        for i in range(40):
            x = sound[i] + model.language_model.embed(token.reshape(1, 1))[0, 0]
            logits = model.decode(x[None, None], delay, mask=None, cache=caches)
            unread = token
            token = mx.argmax(logits[0, -1:], axis=-1).squeeze()
            mx.async_eval(token)
            unread.item()
        token.item()

    return run


def mlx_audio_model(cfg: dict, bits: int | None) -> Any:
    from mlx_audio.stt.models.voxtral_realtime import (  # type: ignore[import-not-found]
        Model,
        ModelConfig,
    )

    encoder = cfg["multimodal"]["whisper_model_args"]["encoder_args"]
    config = ModelConfig.from_dict({"encoder_args": encoder, "decoder": cfg})
    model = random_weights(Model(config), bits)
    model.decoder.precompute_ada_scales(mx.random.normal((cfg["dim"],)).astype(WIDE))
    mx.eval(model.decoder._ada_scales)
    return model


def mlx_audio_steps(model: Any, cfg: dict, length: int) -> Callable[[], None]:
    decoder = model.decoder
    prompt = decoder.embed_tokens(mx.full((length,), 32)) + noise(length, cfg["dim"])
    x, caches = decoder.forward(prompt)
    token = mx.argmax(decoder.logits(x[-1:]), axis=-1)
    mx.eval(token)
    position = length
    sound = noise(40, cfg["dim"])

    def run() -> None:
        nonlocal token, position
        for i in range(40):
            x = decoder.embed_tokens(token) + sound[i : i + 1]
            x, _ = decoder.forward(x, start_pos=position, cache=caches)
            unread = token
            token = mx.argmax(decoder.logits(x), axis=-1)
            mx.async_eval(token)
            unread.item()
            position += 1
        token.item()

    return run


def bench_peer(make: Callable, encode: Callable, steps: Callable, cfg: dict, bits: int | None,
               full: bool) -> Iterator[Row]:
    model = make(cfg, bits)
    mel = mx.random.normal((128, 30_000))
    for seconds in (30, 60, 300) if full else (5, 10):
        time_ = timed(lambda n=seconds: encode(model, mel[:, : n * 100]), 3)  # type: ignore[misc]
        yield f"encode {seconds} s, ms", 1e3 * time_, None
    for length in (40, 1000) if full else (40,):
        yield f"step after {length}, ms", 1e3 * timed(steps(model, cfg, length), 12) / 40, None


PEERS: dict[str, tuple[Callable, Callable, Callable]] = {
    "voxmlx": (voxmlx_model, lambda model, mel: model.encode(mel), voxmlx_steps),  # no window
    "mlx-audio": (mlx_audio_model, lambda model, mel: model.encoder(mel), mlx_audio_steps)}


def table(full: bool) -> None:
    cfg = sizes(full)
    rates = measured_rates(full)
    print(f"measured here: copy {rates[0] / 1e9:,.0f} GB/s, products {rates[1] / 1e12:,.3f} T/s")
    columns = [("", bits) for bits in ((None, 8, 6, 4) if full else (None, 6))]
    columns += [(peer, bits) for peer in PEERS for bits in (None, 6)]
    cells: dict[str, dict[str, str]] = {}
    heads: list[str] = []
    for who, bits in columns:
        name = f"{who} {kind(bits)}".strip()
        try:
            rows = list(bench_peer(*PEERS[who], cfg, bits, full) if who else
                        bench_ours(cfg, bits, rates, full))
        except ImportError:
            continue
        heads.append(name)
        for row, value, floor in rows:
            cells.setdefault(row, {})[name] = f"{value:.2f}" + (f" ({floor:.2f})" if floor else "")
        mx.clear_cache()
    print("| | " + " | ".join(heads) + " |\n|---|" + "---|" * len(heads))
    for row, values in cells.items():
        print(f"| {row} | " + " | ".join(values.get(name, "") for name in heads) + " |")
    print("(in brackets the floor: bytes over bandwidth, or operations over a product's rate)")


def turns(full: bool, rounds: int = 12) -> None:
    cfg = sizes(full)
    for bits in (None, 6):
        works = {"voxtral.py": our_steps(random_weights(V.Voxtral(cfg), bits), 40)}
        for peer, (make, _, steps) in PEERS.items():
            try:
                works[peer] = steps(make(cfg, bits), cfg, 40)
            except ImportError:
                print(f"{peer} is not installed")
        times: dict[str, list] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                times[name].append(1e3 * timed(work, 1, warm=0) / 40)
        print(f"steps in turn, {kind(bits)}, median and range, ms: " + ", ".join(
            f"{name} {np.median(ms):.2f} ({min(ms):.2f}-{max(ms):.2f})"
            for name, ms in times.items()), flush=True)
        mx.clear_cache()


# ------------------------------------------------------------------------------ an hour of sound


class Tokenizer:
    """As much of mistral-common's as a stream needs; no token has text, and none ends a stream."""

    bos_id = 1
    eos_id = -1
    audio = types.SimpleNamespace(
        get_num_delay_tokens=lambda _: DELAY, n_right_pad_tokens=lambda _: DELAY + 11,
        n_left_pad_tokens=32, raw_audio_length_per_tok=1280)

    def get_special_token(self, name: str) -> int:
        return 32 if name == "[STREAMING_PAD]" else 33

    def id_to_byte_piece(self, token: int) -> bytes:
        return b""


def batch(full: bool) -> None:
    """An hour in 64 pieces of 56.25 s, or 128 of 28.1 s: samples to words, so many at a time."""
    hour = 3600 if full else 64
    noise = np.random.RandomState(0).randn(hour * 250).astype(np.float32) * 0.1
    print(f"{hour} s of noise in pieces, spectrogram and text included; a step: 40 decoder steps"
          " alone, after 400 positions\n"
          "| weights | at a time | s | times real time | ms a step | peak, GB | GB a row |\n"
          "|---|---|---|---|---|---|---|")
    for bits, sizes_of_batches in ((None, (1, 16, 64, 128)), (6, (1, 16, 64, 128)), (4, (64, 128))):
        model = random_weights(V.Voxtral(sizes(full)), bits)
        for B in sizes_of_batches:
            pieces = max(64, B)
            sound = noise[: hour * 16_000 // pieces]
            V.transcribe_batch(model, Tokenizer(), [sound[:160_000]] * B, delay_ms=480)  # compiles
            step = 1e3 * timed(our_steps(model, 400, B)) / 40
            mx.clear_cache()
            mx.reset_peak_memory()
            rounds = 3 if B == 1 else pieces // B
            start = time.perf_counter()
            for _ in range(rounds):
                V.transcribe_batch(model, Tokenizer(), [sound] * B, delay_ms=480)
            took = (time.perf_counter() - start) * pieces / (rounds * B)
            peak = mx.get_peak_memory()
            scaled = "" if rounds * B == pieces else f", from {rounds} pieces"
            print(f"| {kind(bits)} | {B} of {len(sound) / 16_000:.2f} s | {took:.1f}{scaled} |"
                  f" {hour / took:.0f} | {step:.1f} | {peak / 1e9:.1f} |"
                  f" {(peak - size_of(model)) / B / 1e9:.2f} |", flush=True)
        del model
        mx.clear_cache()


# -------------------------------------------------------------------------- the digits, wall times


def digits(full: bool) -> None:
    if not DIGITS.is_dir():
        return
    clips = DIGITS / "clips"
    start = time.perf_counter()
    model, tokenizer, _ = V.load_voxtral_model(DIGITS / "original", "float32")
    loading = time.perf_counter() - start
    samples = V.load_audio(clips / "long.wav")
    whole = timed(lambda: V.transcribe(model, tokenizer, samples, delay_ms=480) and [], 3)
    print(f"digits, float32: load {loading:.2f} s, long.wav (60 s) {whole:.2f} s")
    for name, args in (("--help", ["--help"]), ("short.wav", [
            "--quiet", "--delay", "480", "--model", str(DIGITS / "original"),
            str(clips / "short.wav")])):
        command = [sys.executable, str(ROOT / "voxtral.py"), *args]
        took = timed(lambda c=command: subprocess.run(  # type: ignore[misc]
            c, capture_output=True, check=True) and [], 3)
        print(f"{name} from a shell: {took:.2f} s")
    for peer, prepare in (("voxmlx", digits_voxmlx), ("mlx-audio", digits_mlx_audio)):
        try:
            print(f"{peer}, long.wav: {timed(prepare(str(clips / 'long.wav')), 3):.2f} s")
        except ImportError:
            print(f"{peer} is not installed")


def digits_voxmlx(clip: str) -> Callable[[], list]:
    import voxmlx  # type: ignore[import-not-found]
    from voxmlx.generate import generate  # type: ignore[import-not-found]

    model, tokenizer, _ = voxmlx.load_model(str(DIGITS / "voxmlx-bf16-sharded"))
    model.update(tree_map(lambda w: w.astype(mx.float32), model.parameters()))
    prompt, delay = voxmlx._build_prompt_tokens(tokenizer)
    return lambda: generate(model, clip, prompt, n_delay_tokens=delay,
                            eos_token_id=tokenizer.eos_id) and []


def digits_mlx_audio(clip: str) -> Callable[[], list]:
    from mlx_audio.stt.models.voxtral_realtime import (  # type: ignore[import-not-found]
        Model,
        ModelConfig,
    )

    config = json.loads((DIGITS / "mlxaudio-4bit/config.json").read_text())
    model = Model(ModelConfig.from_dict(config))
    weights = model.sanitize(mx.load(str(DIGITS / "original/consolidated.safetensors")))
    wide = [(name, w.astype(mx.float32)) for name, w in weights.items()]
    model.load_weights(wide, strict=False)
    Model.post_load_hook(model, DIGITS / "mlxaudio-4bit")
    return lambda: model.generate(clip) and []


PARTS = {"table": table, "turns": turns, "batch": batch, "digits": digits}

if __name__ == "__main__":
    words = sys.argv[1:]
    if not set(words) <= {"full", *PARTS}:
        sys.exit(__doc__)
    print(f"MLX {version('mlx')} on {mx.device_info().get('device_name', mx.default_device())}")
    for name, part in PARTS.items():
        if name in words or not set(words) - {"full"}:
            part("full" in words)
