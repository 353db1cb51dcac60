"""What takes too long, or other programs, for a test. usage: python .ci/jobs.py JOB [argument]

    digits              every clip, delay and layout of ../shared/digits against expected.json, or
                        where that is not there the clips of .ci/digits
    live [clip]         a clip through a pipe as fast as it was spoken: how late is each word?
    hours [n]           memory and speed of a stream of n hours
    golden              write .ci/golden.json: what transformers says to seeded inputs
    learn               a small model learns to transcribe before your eyes
    picture             draw .ci/picture.png, how tokens follow sound (needs matplotlib)
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import test_voxtral as T
import voxtral as V

SHARED = ROOT.parent / "shared" / "digits"
CLIPS = SHARED / "clips" if SHARED.is_dir() else T.DIGITS
LAYOUTS = {  # how many more word errors than the first each may have; None: the same tokens
    SHARED / "original": None, SHARED / "voxmlx-bf16-sharded": None, SHARED / "transformers": None,
    SHARED / "voxmlx-6bit": 2, SHARED / "mlxaudio-4bit": 4}
if not SHARED.is_dir():
    LAYOUTS = {T.DIGITS: None}


def digits() -> int:
    expected = json.loads((CLIPS / "expected.json").read_text())
    os.environ["PATH"] = ""  # ffmpeg, if it is there, resamples in its own way
    samples = {clip: V.load_audio(CLIPS / clip) for clip in expected}
    errors: dict[str, int] = {}
    failures = 0
    for folder, allowed in LAYOUTS.items():
        layout = folder.name
        model, tokenizer, _ = V.load_voxtral_model(folder, "float32")
        errors[layout] = 0
        for clip, delay in [(clip, delay) for clip, by in expected.items() for delay in by]:
            truth = json.loads((CLIPS / clip).with_suffix(".json").read_text())
            got = V.transcribe(model, tokenizer, samples[clip], delay_ms=int(delay))
            errors[layout] += T.distance(got.text.split(), truth["text"].split())
            tokens = expected[clip][delay]["tokens"]
            if allowed is None and got.tokens != tokens[: tokens.index(2)]:
                failures += 1
                print(f"{layout}, {clip} at {delay} ms: differs")
            if folder == next(iter(LAYOUTS)) and delay != "2400":
                failures += late(f"{clip} at {delay} ms", got.words, truth["words"])
        print(f"{layout}: {errors[layout]} word errors", flush=True)
        failures += errors[layout] > next(iter(errors.values())) + (allowed or 0)
    return failures


def late(what: str, words: list[V.Word], truth: list[dict]) -> bool:
    """Print the median errors of a clip's times, where all words are right; say if one is large."""
    if [word.text.strip() for word in words] != [true["word"] for true in truth]:
        return False
    ends, starts = (np.median([abs(getattr(word, side) - true[side])
                               for word, true in zip(words, truth)]) for side in ("end", "start"))
    print(f"{what}: median error of ends {ends * 1e3:.0f} ms, of starts {starts * 1e3:.0f} ms")
    return bool(ends > 0.08 or starts > 0.15)


def live(clip: str = "pause") -> None:
    (path,) = [path for path in CLIPS.glob(f"{clip}.*") if path.suffix != ".json"]
    truth = json.loads(path.with_suffix(".json").read_text())["words"]
    pcm = (V.load_audio(path) * 32767).astype("<i2").tobytes()
    program = subprocess.Popen(
        [sys.executable, ROOT / "voxtral.py", "--quiet", "--model", T.DIGITS, "--dtype", "float32",
         "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdin and program.stdout
    time.sleep(5)  # until the model is there
    sink = program.stdin
    start = time.monotonic()

    def speak() -> None:
        for i in range(0, len(pcm), 2560):
            time.sleep(max(0, start + (i + 2560) / 32_000 - time.monotonic()))
            sink.write(pcm[i : i + 2560])
            sink.flush()
        sink.close()

    threading.Thread(target=speak).start()
    text = b""
    seen = []
    while piece := program.stdout.read1():  # type: ignore[attr-defined]
        text += piece
        seen.append((time.monotonic() - start, text.decode(errors="ignore").split()))
    delays = [next(at for at, words in seen if words[i : i + 1] == [true["word"]]) - true["end"]
              for i, true in enumerate(truth)]
    print(f"{len(delays)} words, each there {min(delays):.2f} to {max(delays):.2f} s after its"
          f" end, median {np.median(delays):.2f} s")


def hours(n: str = "3") -> None:
    with tempfile.TemporaryDirectory() as folder:
        T.write_original(Path(folder), T.make_model())
        model, tokenizer, _ = V.load_voxtral_model(folder)
    stream = V.Stream(model, tokenizer)
    sound = np.random.RandomState(0).randn(60 * 16_000).astype(np.float32) * 0.1
    for minute in range(1, round(float(n) * 60) + 1):
        start = time.perf_counter()
        stream.feed(sound)
        seconds = time.perf_counter() - start
        if minute in (1, 2, 5, 10) or minute % 30 == 0:
            unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes on Linux
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
            print(f"{minute} minutes: {peak:.1f} MB resident at most,"
                  f" {mx.get_active_memory() / 1e6:.2f} MB of MLX's, a minute takes"
                  f" {seconds:.1f} s, {len(stream.tokens)} tokens", flush=True)


def transformers_says(folder: Path, mel: mx.array, ids: np.ndarray) -> dict[str, np.ndarray]:
    """test_voxtral.cross_check, by VoxtralRealtimeForConditionalGeneration; writes to `folder`."""
    import torch  # type: ignore[import-not-found]
    from transformers import (  # type: ignore[import-not-found]
        VoxtralRealtimeForConditionalGeneration,
    )

    def part(sizes: dict, kind: str) -> dict:
        rope = {"rope_theta": sizes["rope_theta"], "rope_type": "default"}
        names = {theirs: sizes[our] for our, theirs in T.FIELDS.items() if our in sizes}
        return {**names, "rope_parameters": rope, "model_type": f"voxtral_realtime_{kind}"}

    config = T.config()
    encoder = config["multimodal"]["whisper_model_args"]["encoder_args"]
    settings = {
        "architectures": ["VoxtralRealtimeForConditionalGeneration"],
        "model_type": "voxtral_realtime", "downsample_factor": 4, "hidden_size": config["dim"],
        "audio_config": {**part(encoder, "encoder"), "num_mel_bins": 128},
        "text_config": part(config, "text"), "dtype": "float32", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(settings))
    weights = T.their_names(T.make_model(), "transformers")
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    model = VoxtralRealtimeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    features = torch.tensor(np.array(mel).T[None].copy())
    with torch.no_grad():
        sound = model.eval().get_audio_features(features)
        out = {"encoder": sound.last_hidden_state[0], "adapter": sound.pooler_output[0]}
        for delay in (1, 6, 30):
            result = model(input_ids=torch.tensor(ids[None]), input_features=features,
                           num_delay_tokens=delay)
            out[f"logits {delay}"] = result.logits[0]
    return {name: x.numpy() for name, x in out.items()}


def digest(arrays: dict[str, np.ndarray]) -> dict[str, list]:
    """A few numbers of each array, and the likeliest tokens."""
    out: dict[str, list] = {}
    for name, x in arrays.items():
        few = x[:: len(x) // 6, :: x.shape[1] // 4].ravel()[:24]
        out[name] = [round(float(value), 6) for value in few]
        if name.startswith("logits"):
            out[name.replace("logits", "tokens")] = x.argmax(-1).tolist()
    return out


def golden() -> None:
    import torch
    import transformers

    mel, ids, _ = T.cross_check()
    with tempfile.TemporaryDirectory() as folder:
        numbers = digest(transformers_says(Path(folder), mel, ids))
    by = f"transformers {transformers.__version__}, torch {torch.__version__}"
    rows = [f'"by": "{by}"', *(f'"{name}": {values}' for name, values in numbers.items())]
    (ROOT / ".ci/golden.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")


def learn() -> None:
    T.show_learning()


def picture() -> None:
    from matplotlib.figure import Figure  # type: ignore[import-not-found]

    # A live stream, stopped after 35 steps: what is drawn is all that it has written by then.
    delay, n, step = 6, 35 * V.STEP, V.STEP / V.SAMPLE_RATE  # in steps, samples and seconds
    folder = ROOT / ".ci/digits"
    model, tokenizer, _ = V.load_voxtral_model(folder, "float32")
    samples = V.load_audio(folder / "short.flac")
    stream = V.Stream(model, tokenizer, delay_ms=delay * 80)
    stream.feed(samples[:n])
    # Mel frame i is centred at 10 i ms: its window reaches 200 samples to both sides.
    mel = model.spectrogram.mel_frames(mx.array(np.pad(samples, (200, 0))[None, : n + 400]))[0]

    # All of it has one pair of axes: x is in seconds, y goes down.
    figure = Figure(figsize=(9, 3.9), dpi=200, facecolor="white")
    ax = figure.add_axes((0.11, 0.11, 0.88, 0.885))
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.set(xticks=np.arange(0, 2.8, 0.5), yticks=[])
    blue, orange, pale, grey = "#0b5cad", "#d9480f", "#d6e6f7", "#666666"

    def write(x: float, y: float, text: str, color: str = "black", **how: Any) -> None:
        ax.text(x, y, text, color=color, va="center", **{"ha": "center", "fontsize": 9, **how})

    for y, text in ((80, "sound in\n(log-mel)"), (208, "tokens out,\none a step\nof 80 ms"),
                    (280, "words,\nwith times")):
        write(-0.04, y, text, ha="right", fontsize=9.5)
    shades = np.array(mel).T.round(1)  # few, which makes the file small
    ax.imshow(shades, "Greys", vmin=-0.2, vmax=1.3, aspect="auto", interpolation="nearest",
              origin="lower", extent=(-0.005, len(mel) / 100 - 0.005, 150, 0))
    ax.vlines(np.arange(0, 2.8, step), 150, 156, grey, lw=0.6)  # where steps end
    ax.hlines(150, 0, 2.8, grey, lw=0.6)
    truth = json.loads((folder / "short.json").read_text())["words"]
    for true in truth[: len(stream.words)]:
        ax.plot([true["start"], true["end"]], [25, 25], color=grey)
        write((true["start"] + true["end"]) / 2, 14, f"“{true['word']}”", grey)
    for k, token in enumerate(stream.tokens):
        x = (k + 1 + delay) * step  # seconds, when it is written
        piece = tokenizer.id_to_byte_piece(token).decode(errors="backslashreplace")
        fill, color, text = pale, blue, piece.strip()
        if token == tokenizer.get_special_token("[STREAMING_WORD]"):
            fill, color, text = orange, "white", "[W]"
        elif not piece:
            fill, color, text = "white", grey, "•"
        ax.broken_barh([(x, step)], (196, 24), facecolor=fill, edgecolor=grey, lw=0.6)
        write(x + step / 2, 208, text, color, fontsize=8)
    for word in stream.words:
        middle = (word.start + word.end) / 2
        written = word.end + delay * step  # when its [W] is
        ax.plot([word.end, word.end], [0, 290], color=orange, lw=0.8, ls=":")
        ax.plot([written, written], [168, 196], color=orange, lw=0.8)
        ax.annotate("", (written, 176), (word.end, 176), arrowprops={
            "arrowstyle": "-|>", "color": orange, "shrinkA": 0, "shrinkB": 0})
        write((word.end + written) / 2, 176, f"delay {delay * 80} ms", orange,
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        ax.broken_barh([(word.start, word.end - word.start)], (264, 26), facecolor=pale,
                       edgecolor=blue)
        write(middle, 277, word.text.strip(), blue, fontweight="bold")
        write(middle, 300, f"{word.start:.2f} to {word.end:.2f} s", grey)
        write(middle, 314, f"probability {word.probability:.4f}", grey)
    for x, text, color in ((0.74, "nothing yet", grey), (1.06, "a word ended", orange),
                           (1.33, "its text", blue)):
        write(x, 231, text, color)
    write(0.28, 208, "listens first", grey)
    write(2.44, 277, "the next word\nis not over yet", grey)
    ax.set(xlim=(0, n / V.SAMPLE_RATE), ylim=(326, 0), xlabel="seconds")
    figure.savefig(ROOT / ".ci/picture.png", metadata={"Software": None})


JOBS = {"digits": digits, "live": live, "hours": hours, "golden": golden, "learn": learn,
        "picture": picture}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in JOBS:
        sys.exit(bool(JOBS[sys.argv[1]](*sys.argv[2:])))  # type: ignore[operator]
    sys.exit(__doc__)
