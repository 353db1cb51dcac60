"""Files, standard input, output and batches: whatever people have and do."""

import fcntl
import html
import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import voxtral as V
from test_voxtral import DIGITS, HERE, Output, call, distance, encoded

CASES = HERE.parent / "shared" / "cases"
GOOD = DIGITS / "short.flac"  # of 5 s; it says:
SHORT = "seven nine one one two 八"
INFO = b"LIST\x1a\0\0\0INFOISFT\x0e\0\0\0Lavf60.16.100\0"  # that ffmpeg puts into a WAV
JSON = ("--quiet", "--format", "json")
SPEECH = ("--quiet", "--dtype", "float32", "--delay", "480", "--model", DIGITS)
FFMPEG = shutil.which("ffmpeg")
places = pytest.mark.parametrize("path", ["/nowhere", os.environ["PATH"]][: 2 if FFMPEG else 1])
os.environ.pop("PYTHONUNBUFFERED", None)  # or pipes would not be what users have


def sized(wav, size, chunk=b"data"):  # a WAV with a chunk that states this size
    at = wav.index(chunk) + 4
    return wav[:at] + size.to_bytes(4, "little") + wav[at + 4 :]


@places
def test_files_are_read_to_their_end(tmp_path, monkeypatch, noise, path, recwarn):
    monkeypatch.setenv("PATH", path)
    x, wav = noise[:32000], encoded(noise[:32000])
    files = {"riff8.wav": sized(wav, len(wav), b"RIFF"), "pipe.wav": sized(wav, 0xFFFFFFFF),
             "promises.wav": sized(wav, len(wav) - 28), "ima.wav": encoded(x, subtype="IMA_ADPCM"),
             "flac.mp3": encoded(x, format="FLAC"), "x.aiff": encoded(x, format="AIFF"),
             "x.mp3": encoded(x, format="MP3") + b"TAG%125d" % 0, "x.ogg": encoded(x, format="OGG")}
    files |= {"twice.ogg": files["x.ogg"] * 2} if path != "/nowhere" else {}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        samples = V.load_audio(tmp_path / name)
        samples *= 1  # the caller may change it
        assert abs(len(samples) - 32000 * (1 + ("twice" in name))) <= 640 and not recwarn.list, name
    sine = np.sin(2000 * np.arange(96000) / 48000) / 2
    for channels in ([1, 0], [1] * 6):
        (tmp_path / "x.wav").write_bytes(encoded(np.outer(sine, channels), 48000))
        difference = V.load_audio(tmp_path / "x.wav") - sine[::3] * np.mean(channels)
        assert np.abs(difference[800:-800]).max() < 0.01
    before = os.fstat(2)  # who silences it for a while loses it for good in threads
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(V.load_audio, [tmp_path / "x.mp3"] * 32))
    assert os.path.samestat(before, os.fstat(2))


@pytest.mark.skipif(not FFMPEG, reason="needs ffmpeg")
def test_the_default_track_is_heard_and_times_count_from_the_picture(tmp_path):
    film = tmp_path / "film.mkv"
    inputs = "-f lavfi -i color=s=16x16:r=5:d=9 -f lavfi -i sine=d=9 -itsoffset 3 -i"
    tracks = "-map 0 -map 1 -map 2 -disposition:a:0 0 -disposition:a:1 default"
    subprocess.run([FFMPEG, *inputs.split(), GOOD, *tracks.split(), film], check=True)
    out = call(*SPEECH, *JSON, film, GOOD)[1]
    late, true = [json.loads(line)["words"] for line in out.splitlines()]
    assert "".join(word["text"] for word in late) == SHORT and "八" in out
    assert all(abs(a["end"] - b["end"] - 3) <= 0.16 for a, b in zip(late, true))


@pytest.mark.filterwarnings("always")
def test_names_of_any_form_and_what_ffmpeg_says(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: "yes")
    monkeypatch.setattr(V, "FFMPEG", [sys.executable, "-c", """if True:
        import os, sys
        os.write(2, os.fsencode(sys.argv[2]) + b": no head\\nmore")
        os.write(1, bytes(64000 if sys.argv[2].startswith("file:") else 0))"""])
    for name in ("-x:y.m4a", "a b\n\N{STUDIO MICROPHONE}é", "http:x", os.fsdecode(b"caf\xe9.wav")):
        Path(name).touch()
        for more in ([], ["--batch", "2"], ["--output-dir", "out"]):
            code, out, err = call("--model", checkpoint, *JSON, *more, "--", name)
            text = out or Path("out", Path(name).stem + ".json").read_text()
            assert code == 0 and json.loads(text)["file"] == name and len(err) == 1
            assert err[0] == f"voxtral.py: {' '.join(name.split())}: no head" or "caf" in name


@places
def test_what_is_no_sound_stops_nothing(checkpoint, tmp_path, monkeypatch, noise, path):
    monkeypatch.setenv("PATH", path)
    monkeypatch.chdir(tmp_path)
    wav = encoded(noise[:4000])
    files = {"text.wav": b"hello, this is text", "film.m4a": b"\0\0\0\x20ftypM4A ",
             "none.wav": encoded(noise[:0]), "head.wav": wav[:30], "empty.wav": b"",
             "nan.wav": encoded(np.array([0, np.nan]), subtype="FLOAT"),
             "int.wav": encoded(noise[:4000] * 32767, subtype="FLOAT"), "good.wav": wav}
    for name, data in files.items():
        Path(name).write_bytes(data)
    os.mkfifo("fifo")
    says = dict.fromkeys([*files, "fifo", os.devnull, "..", "", "x" * 5000], "")
    says |= {"nan.wav": "NaN", "int.wav": "int16", "fifo": "python voxtral.py -"}
    read = Path.read_bytes  # but not of a film: it may have gigabytes
    monkeypatch.setattr(Path, "read_bytes",
                        lambda path: pytest.fail() if path.name == "film.m4a" else read(path))
    for batch in "14":
        code, out, err = call("--model", checkpoint, *JSON, "--batch", batch, *says)
        assert code == 1 and json.loads(out)["duration"] == 0.25 and len(err) == len(says) - 1
        for name in says.keys() - {"good.wav"}:
            line = next(line for line in err if line.startswith(f"voxtral.py: {name}: "))
            assert says[name] in line
    code, out, err = call("--model", "/nowhere", "", "x" * 5000)  # said before the model is loaded
    assert (code, out, len(err)) == (1, "", 1) and "no such file" in err[0]


@pytest.mark.skipif(not CASES.is_dir(), reason="the odd files are not here")
@places
def test_files_that_people_have(monkeypatch, path):
    """All that they say with ffmpeg; without it, that or its beginning, or one line."""
    monkeypatch.setenv("PATH", path)
    end = "nine nine nine five seven four two one six zéro six six six"
    says = dict.fromkeys(("nx8.mp3", "pipedv.mp3"), f"one one four nine 八 three three seven {end}")
    says["chain.ogg"] = f"{SHORT} {says['nx8.mp3']}"
    says["cat.mp3"] = f"six nine five two six five one four nine six 八 八 seven six {end}"
    short = "riff8.wav ima.wav sz0.wav noeos.opus s.m4a s.webm late.mkv"
    says |= dict.fromkeys(short.split(), SHORT)
    out, err = call(*SPEECH, *JSON, "--batch", "16", *(CASES / name for name in says))[1:]
    told = {Path(record["file"]).name: record for record in map(json.loads, out.splitlines())}
    assert path == "/nowhere" or told["late.mkv"]["words"][0]["start"] > 2.9
    for name, whole in says.items():
        assert name in told or path == "/nowhere" and sum(name in line for line in err) == 1
        streamed = call(*SPEECH, "-", stdin=(CASES / name).read_bytes())[1]
        for text in (told[name]["text"] if name in told else "", streamed):
            n = len(text.split()) if path == "/nowhere" else None
            assert distance(text.split(), whole.split()[:n]) <= 1, name


@pytest.mark.parametrize("number,kind,case", [
    ("INT", "text", ""), ("INT", "srt", ""), ("INT", "text", "nothing"), ("TERM", "json", ""),
    ("TERM", "srt", "folder"), ("HUP", "text", ""), ("HUP", "json", "folder"),
    ("HUP", "text", "nohup"), *[("INT", "text", "wav"), ("INT", "text", "head")] * bool(FFMPEG)])
def test_a_signal_finishes_what_was_heard(checkpoint, tmp_path, noise, number, kind, case):
    """With its end written, also of what a thread or ffmpeg had in its hands, or half a sample."""
    data = {"nothing": b"x", "head": encoded(noise[:0], 48000).replace(b"data", INFO * 3 + b"data"),
            "wav": encoded(noise, 48000)}.get(case, encoded(noise)[44:] + b"x")
    args = ["--model", checkpoint, "--quiet", "--format", kind, "-"]
    whole = call(*args, stdin=data)[1]
    args += ["--output-dir", tmp_path] if case == "folder" else []
    signal.signal(signal.SIGHUP, signal.SIG_IGN if case == "nohup" else signal.SIG_DFL)  # inherited
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    child = subprocess.Popen([sys.executable, HERE / "voxtral.py", *args], bufsize=0,
                             start_new_session=True, **pipes)
    for start, end in itertools.pairwise((0, 9999, 20000, 31001, len(data))):  # odd pieces
        child.stdin.write(data[start:end])
        while child.poll() is None and any(fcntl.ioctl(child.stdin, termios.FIONREAD, bytes(4))):
            time.sleep(0.05)
    assert kind != "text" or not whole or select.select([child.stdout], [], [], 60)[0], "not live"
    os.killpg(child.pid, signal.Signals[f"SIG{number}"])  # as a terminal does
    if case == "nohup":
        child.stdin.close()
    assert child.wait(60) == (0 if case == "nohup" else 130)  # before reading, which has no limit
    out, err = child.stdout.read().decode(), child.stderr.read()
    assert err == b""
    out = (tmp_path / f"stdin.{kind}").read_text() if case == "folder" else out
    if kind == "srt":  # where its cues are cut depends on what arrived together
        assert out.endswith("\n\n") and out.split()[-1] == whole.split()[-1]
    else:
        assert out == whole


def test_the_next_signal_leaves_at_once(checkpoint, monkeypatch, tmp_path, noise):
    args = ("--model", checkpoint, "--output-dir", tmp_path / "out", "-", GOOD)
    monkeypatch.setattr(V.Stream, "finish", lambda _: [
        signal.raise_signal(number) for number in (signal.SIGINT, signal.SIGTERM)])
    assert call(*args, stdin=encoded(noise)[44:]) == (130, "", [])
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.setattr(V.Stream, "finish", lambda _: "the end")
    monkeypatch.setattr(V, "load_audio", lambda _: signal.raise_signal(signal.SIGTERM))
    assert call(*args, stdin=encoded(noise)[44:]) == (130, "", [])


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@places
def test_streams_of_any_form(checkpoint, monkeypatch, noise, path):
    monkeypatch.setenv("PATH", path)
    x, wav = noise[:16000], encoded(noise[:16000])
    results = [call("--model", checkpoint, *JSON, "--batch", 2, GOOD, "-", stdin=data) for data in (
        wav[44:], wav[44:] + b"x", wav, sized(wav, 2**32 - 1).replace(b"data", INFO + b"data"))]
    assert results == results[:1] * 4 and results[0][::2] == (0, [])
    assert '"delay_ms": 480, "duration": 1.0,' in results[0][1]
    for data, seconds in (
            (b"fLaC" + bytes(1 << 20), 0), (encoded(x, 48000, subtype="PCM_24"), 1 / 3),
            (wav[:36] + b"LIST\x70\x11\1\0" + bytes(70000) + wav[36:], 1), (b"", 0), (b"x", 0),
            (encoded(x, format="OGG"), 1), (encoded(x, format="MP3"), 1)):
        code, out, err = call("--model", checkpoint, *JSON, "-", stdin=data)
        if seconds and path != "/nowhere":
            assert code == 0 and abs(json.loads(out)["duration"] - seconds) < 0.06
        else:
            assert (code, out, len(err)) == (1, "", 1) and ("ffmpeg" in err[0] or not seconds)
            assert err[0].startswith("voxtral.py: standard input: n")


def test_closed_and_full_streams(checkpoint):
    program = f"{sys.executable} {HERE / 'voxtral.py'} --quiet --model {checkpoint} --format json"
    for args, says in (
            ("- <&-", "1 voxtral.py: standard input: closed.*\n"),
            (f"{GOOD} >&-", "1 voxtral.py: standard output is closed\n"),
            (f"{GOOD} 2>&-", "0 {.*}\n"), (f"{GOOD} <&-", "0 {.*}\n"),
            (f"{GOOD} {GOOD} | :", "0 voxtral.py: standard output was closed\n"),
            (f"{GOOD} > /dev/full", "1.* standard output: No space left(?s:.*)")):
        done = subprocess.run(f"{program} {args}", shell=True, capture_output=True, check=False)
        told = f"{done.returncode} {done.stdout.decode()}{done.stderr.decode()}"
        assert re.fullmatch(says, told) or "full" in args and not os.path.exists("/dev/full"), told


def test_output_dir_has_complete_files(checkpoint, tmp_path, noise, monkeypatch):
    names = [tmp_path / name for name in ("a.wav", "b.c.wav", "bad.wav")]
    for name in names[:2]:
        name.write_bytes(encoded(noise[:30000]))
    base = ["--model", checkpoint, "--quiet", "--format"]
    for kind, batch in itertools.product(("text", "srt", "vtt", "json"), "12"):
        folder = tmp_path / "new" / kind  # of which the second replaces the files
        code, out, err = call(*base, kind, "--output-dir", folder, "--batch", batch, *names)
        texts = {path.name: path.read_text() for path in folder.iterdir()}
        end = kind.replace("text", "txt")
        assert (code, out, len(err), {*texts}) == (1, "", 1, {f"a.{end}", f"b.c.{end}"})
        if kind in ("text", "json"):  # cues depend on what was fed together
            assert texts[f"a.{end}"] == call(*base, kind, names[0])[1]
    monkeypatch.setattr(Path, "replace", lambda *_: os.stat("/nowhere"))  # which fails
    code, out, err = call(*base, "text", "--output-dir", tmp_path, *names[:2])
    assert (code, len(err)) == (1, 2) and err[0].startswith(f"voxtral.py: {tmp_path}/a.txt: ")
    assert not list(tmp_path.glob("[!.]*.txt"))
    code, _, err = call(*base, "text", "--output-dir", tmp_path / "q", *names, "z/a.flac")
    assert code == 2 and f"{names[0]} and z/a.flac would both" in err[-1]
    assert not (tmp_path / "q").exists()


def test_options_and_progress(checkpoint, tmp_path, monkeypatch):
    for args in ("--delay 9", "--batch 0", "--temp nan", "--form srt x"):
        code, out, err = call("--model", "/nowhere", *args.split(), GOOD)
        assert code == 2 and out == "" and "usage" in err[0] and len(err[-1]) < 160, args
    told = [json.loads(call("--model", checkpoint, *JSON, GOOD, "--batch", n, *args.split())[1])
            for args in ("", "--delay 80", "--temperature 9") for n in (1, 2)]
    assert [record["delay_ms"] for record in told] == [2400, 2400, 80, 80, 2400, 2400]
    tokens = [record["tokens"] for record in told]
    assert tokens[0] == tokens[1] and tokens[2] == tokens[3] and tokens[0] not in tokens[4:]
    monkeypatch.setattr(Output, "isatty", lambda _: True)
    folder = ["--output-dir", tmp_path / "out"]
    for args, bar in ((folder, True), ([*folder, "--batch", "2"], True), ([], False),
                      ([*folder, "--quiet"], False)):
        assert bool(call("--model", checkpoint, GOOD, *args)[2]) == bar


def test_a_batch_is_ordered_and_written_when_done(checkpoint, tmp_path, noise, monkeypatch):
    asked = []  # similar lengths together, the longest first
    transcribe = V.transcribe_batch

    def spy(model, tokenizer, audio, **settings):
        asked.append([len(x) for x in audio])
        if wrong and len(asked[-1]) < 2:
            raise wrong
        return transcribe(model, tokenizer, audio, **settings)

    lengths = [8000, 30000, 400, 60000, 16000]
    names = [tmp_path / f"{n}.wav" for n in lengths]
    for name, n in zip(names, lengths):
        name.write_bytes(encoded(noise[:n], subtype="FLOAT"))
    base = ["--model", checkpoint, *JSON]
    one_by_one = call(*base, *names)[1]
    base += ["--batch", "2"]
    monkeypatch.setattr(V, "transcribe_batch", spy)
    wrong = None
    code, out, err = call(*base, *names[:4], tmp_path / "no.wav", names[4])
    assert (code, out, len(err)) == (1, one_by_one, 1)
    assert asked == [[60000, 30000], [16000, 8000], [400]]
    wrong = RuntimeError("[malloc] Unable to allocate 9 bytes.")
    code, out, err = call(*base, *names)
    assert code == len(err) == 1 and "/400.wav" in err[0] and "smaller --batch" in err[0]
    lines = {n: line for n, line in zip(lengths, one_by_one.splitlines(True)) if n != 400}
    assert out == "".join(lines.values())
    wrong = KeyboardInterrupt
    assert call(*base, "--output-dir", tmp_path / "out", *names) == (130, "", [])
    assert {int(p.stem): p.read_text() for p in (tmp_path / "out").iterdir()} == lines


def test_long_recordings_are_cut_where_it_is_quiet(tmp_path):
    speech = np.random.RandomState(0).randn(190 * 16000).astype(np.float32) / 10
    for at in (43.2, 96.6, 139.0, 152.3):
        speech[int((at - 0.2) * 16000) : int((at + 0.2) * 16000)] /= 30
    for n in (1, 2, 4, 64):
        pieces = V.cut_at_pauses(speech, n)
        assert len(pieces) == min(n, 4) and np.array_equal(np.concatenate(pieces), speech)
    cuts = np.cumsum([len(piece) for piece in pieces[:-1]])
    assert np.abs(cuts / 16000 - [43.2, 96.6, 139.0]).max() < 0.2 and not any(cuts % 1280)
    (tmp_path / "long.wav").write_bytes(encoded(np.tile(V.load_audio(GOOD), 17)))
    record = json.loads(call(*SPEECH, *JSON, "--batch", "2", tmp_path / "long.wav")[1])
    assert record["text"] == " ".join([SHORT] * 17) and record["duration"] == 85
    ends = np.reshape([word["end"] for word in record["words"]], (17, -1))
    assert np.abs(np.diff(ends, axis=0) - 5).max() < 0.2


def test_cues_are_whole_escaped_and_long_enough():
    m, wide = "m" * 20, "八" * 21
    words = [("<b>\n\nTom", 0, 0.1), (' &\x85 "Anne."', 0.1, 0.2), (" No -->", 0.4, 0.5)]
    words += [(" far", 9, 9.4), (" away", 10.2, 10.6)]
    words += [(f" w{i}", i + 0.5, i + 1) for i in range(20, 28)]  # 7 s are full
    words += [(f" {m}", 40 + i / 2, 40.5 + i / 2) for i in range(5)]  # two lines are full
    words = [V.Word(*word) for word in [*words, (f" {wide}、{wide}八、", 3723.4, 3726.4)]]
    whole = SimpleNamespace(words=words, until=np.inf)
    live = [SimpleNamespace(words=words[:i], until=words[i].end - 0.08) for i in range(1, 19)]
    cues = [("00:00:00.000 --> 00:00:00.400", '<b> Tom & "Anne."'),
            ("00:00:00.400 --> 00:00:01.233", "No -->"),
            ("00:00:09.000 --> 00:00:10.600", "far away"),
            ("00:00:20.500 --> 00:00:27.000", "w20 w21 w22 w23 w24 w25 w26"),
            ("00:00:27.500 --> 00:00:28.333", "w27"),
            ("00:00:40.000 --> 00:00:42.000", f"{m} {m}\n{m} {m}"),
            ("00:00:42.000 --> 00:00:42.833", m),
            ("01:02:03.400 --> 01:02:05.400", f"{wide}、\n{wide}"),
            ("01:02:05.400 --> 01:02:06.400", "八、")]
    vtt = [f"{times}\n{html.escape(text, quote=False)}\n\n" for times, text in cues]
    srt = [f"{i}\n{times.replace('.', ',')}\n{text}\n\n" for i, (times, text) in enumerate(cues, 1)]
    assert "".join(V.subtitles([whole], "vtt")) == "WEBVTT\n\n" + "".join(vtt)
    assert "".join(V.subtitles([*live, whole], "srt")) == "".join(srt)
