"""Sound in, text out: files and standard input, subtitles, the command line, as people use them."""

import html
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import voxtral as V
from test_voxtral import DIGITS, HERE, call, close, distance, encoded, run

CASES = HERE / ".ci" / "cases"
GOOD = DIGITS / "short.flac"  # of 5 s; it says:
SHORT = "seven nine one one two 八"
JSON = ("--quiet", "--format", "json")
SPEECH = ("--quiet", "--dtype", "float32", "--delay", "480", "--model", DIGITS)
FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(not FFMPEG, reason="needs ffmpeg")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
places = pytest.mark.parametrize("path", ["/nowhere", os.environ["PATH"]][: 2 if FFMPEG else 1])


# ------------------------------------------------------------------------------------------- files


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
    before = os.fstat(2)  # who silences it for a while loses it for good in threads
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(V.load_audio, [tmp_path / "x.mp3"] * 32))
    assert os.path.samestat(before, os.fstat(2))


@places
@pytest.mark.parametrize("voices", ["1", "01", "001", "000001", "000000001", "0" * 63 + "1", "11"])
def test_every_channel_counts(tmp_path, monkeypatch, path, voices):
    """ffmpeg's own mixing takes the third of three for a subwoofer, and refuses nine."""
    monkeypatch.setenv("PATH", path)
    sine = np.sin(2000 * np.arange(96000) / 48000) / 2
    gains = [int(voice) for voice in voices]
    (tmp_path / "x.wav").write_bytes(encoded(np.outer(sine, gains), 48000, subtype="FLOAT"))
    difference = V.load_audio(tmp_path / "x.wav") - sine[::3] * np.mean(gains)
    assert np.abs(difference[800:-800]).max() < 1e-3 * np.mean(gains)


@needs_ffmpeg
def test_the_default_track_is_heard_and_times_count_from_the_picture(tmp_path):
    film = tmp_path / "film.mkv"
    inputs = "-f lavfi -i color=s=16x16:r=5:d=9 -f lavfi -i sine=d=9 -itsoffset 3 -i"
    tracks = "-map 0 -map 1 -map 2 -disposition:a:0 0 -disposition:a:1 default"
    subprocess.run([FFMPEG, *inputs.split(), GOOD, *tracks.split(), film], check=True)
    out = call(*SPEECH, *JSON, film, GOOD)[1]
    late, true = [json.loads(line)["words"] for line in out.splitlines()]
    assert "".join(word["text"] for word in late) == SHORT and "八" in out
    assert all(abs(a["end"] - b["end"] - 3) <= 0.16 for a, b in zip(late, true))


@places
def test_files_that_people_have(tmp_path, monkeypatch, path):
    """All that they say with ffmpeg; without it, that or its beginning, or one line."""
    x, wav = V.load_audio(GOOD), encoded(V.load_audio(GOOD))
    monkeypatch.setenv("PATH", path)
    made = {"riff8.wav": sized(wav, len(wav), b"RIFF"), "sz0.wav": sized(wav, 0),
            "tail.wav": wav + b"junk\x10\x27\0\0" + wav[44:10044],
            "cat.mp3": encoded(x, format="MP3") * 2, "chain.ogg": encoded(x, format="OGG") * 2,
            "cat.webm": (CASES / "s.webm").read_bytes() * 2}  # whose time stamps begin anew
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    names = [tmp_path / name for name in made] + sorted(CASES.glob("*.*[!d]"))
    out, err = call(*SPEECH, *JSON, "--batch", "16", *names)[1:]
    told = {Path(record["file"]).name: record for record in map(json.loads, out.splitlines())}
    assert len(names) == 11 and (path == "/nowhere" or len(told) == 11)
    for name in (path.name for path in names):
        if name not in told:
            assert sum(name in line for line in err) == 1
            continue
        text = told[name]["text"].split()
        whole = SHORT.split() * (2 if name in ("cat.mp3", "chain.ogg", "cat.webm") else 1)
        assert distance(text, whole[: len(text) if path == "/nowhere" else None]) <= 1, name
    assert path == "/nowhere" or told["late.mkv"]["words"][0]["start"] > 2.9


def fake_ffmpeg(folder, script):
    """A folder for PATH in which ffmpeg is this shell script."""
    folder.mkdir(exist_ok=True)
    (folder / "ffmpeg").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "ffmpeg").chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_names_of_any_form_and_what_ffmpeg_says(checkpoint, tmp_path, monkeypatch):
    """Its complaints are passed on, whatever -W says; `-i` is its fifth argument."""
    monkeypatch.chdir(tmp_path)
    script = 'head -c 64000 /dev/zero; printf "%s: no head\\nmore" "$5" >&2'
    env = {**os.environ, "PATH": fake_ffmpeg(tmp_path / "bin", script), "PYTHONWARNINGS": "ignore"}
    names = ("-x:y.m4a", "a b\n\N{STUDIO MICROPHONE}é", "http:x", os.fsdecode(b"caf\xe9.wav"))
    for name in names:
        Path(name).touch()
    for more in ([], ["--batch", "2"], ["--output-dir", "out"]):
        code, out, err = run("--model", checkpoint, *JSON, *more, "--", *names, env=env)
        assert code == 0 and len(err.splitlines()) == 4
        for name, line in zip(names, err.splitlines()):
            assert line == f"voxtral.py: {' '.join(name.split())}: no head" or "caf" in name
        files = [Path("out", Path(name).stem + ".json") for name in names] if "out" in more else []
        texts = [file.read_text() for file in files] or out.splitlines()
        assert [json.loads(text)["file"] for text in texts] == list(names)


def test_an_ffmpeg_that_was_killed_is_told(tmp_path, monkeypatch, noise):
    (tmp_path / "x.wav").write_bytes(encoded(noise))
    monkeypatch.setenv("PATH", fake_ffmpeg(tmp_path / "bin", "head -c 64000 /dev/zero; kill -9 $$"))
    warnings = []
    assert len(V.load_audio(tmp_path / "x.wav", warnings.append)) == 16000
    assert len(warnings) == 1 and "exit code -9" in warnings[0]
    monkeypatch.setenv("PATH", fake_ffmpeg(tmp_path / "bin", "exit 137"))
    with pytest.raises(V.VoxtralError, match="exit code 137"):
        V.load_audio(tmp_path / "x.wav")
    says = "echo 'Invalid data' >&2; exit 183"  # as ffmpeg 9 ends
    monkeypatch.setenv("PATH", fake_ffmpeg(tmp_path / "bin", says))
    with pytest.raises(V.VoxtralError, match=r"x.wav: no sound \(Invalid data\)$"):
        V.load_audio(tmp_path / "x.wav")


@pytest.mark.parametrize("path", [b"RIFF" * 300_000, io.BytesIO(b"RIFF"), None, 7])
def test_what_is_no_path_is_a_short_type_error(path):
    with pytest.raises(TypeError) as error:
        V.load_audio(path)
    assert len(str(error.value)) < 200


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
    says |= {"nan.wav": "NaN", "int.wav": "int16", "fifo": "no such file", "..": "a folder"}
    for batch in "14":
        code, out, err = call("--model", checkpoint, *JSON, "--batch", batch, *says)
        assert code == 1 and json.loads(out)["duration"] == 0.25 and len(err) == len(says) - 1
        for name in says.keys() - {"good.wav"}:
            line = next(line for line in err if line.startswith(f"voxtral.py: {name}: "))
            assert says[name] in line
    code, out, err = call("--model", "/nowhere", "", "x" * 5000)  # said before the model is loaded
    assert (code, out, len(err)) == (1, "", 1) and "no such file" in err[0]


# ---------------------------------------------------------------------------------- standard input


def pcm(samples):
    return (samples * 32767).clip(-32768, 32767).astype("<i2").tobytes()


def test_no_speech_is_taken_for_a_file():
    """Full scale, clipped threefold, quiet, with hiss, and from any first sample."""
    rng = np.random.RandomState(0)
    for name in ("short.flac", "pause.flac", "stereo44k.ogg"):
        x = V.load_audio(DIGITS / name)
        x = x / np.abs(x).max()
        for y in (x, 3 * x, x / 300, x / 30 + 0.01 * rng.randn(len(x)), np.zeros(9999)):
            data = pcm(y)
            for start in range(0, len(data) - 4096, 998):
                assert V.could_be_samples(data[start : start + 4096]), (name, start)


def kinds():
    """Files and texts, and pieces from the middle of streams."""
    x = V.load_audio(GOOD)
    for name, options in {
            "x.wav": {}, "x.flac": {"format": "FLAC"}, "x.ogg": {"format": "OGG"},
            "x.mp3": {"format": "MP3"}, "x.aiff": {"format": "AIFF", "endian": "BIG"},
            "x.w64": {"format": "W64"}}.items():
        yield name, encoded(x, **options)
    for name in ("x.ogg", "x.mp3"):
        yield f"inside of {name}", encoded(x, format=name[2:].upper())[4001:]
    yield "a WAV with a long title", encoded(x).replace(b"data", b"LIST\x60\x10\0\0" + bytes(4192))
    yield "an index", b"[playlist]\r\nFile1=http://radio\r\n"
    yield "a readme", (HERE / "README.md").read_bytes()
    yield "ID3", b"ID3\4" + bytes(5000)
    for path in sorted(CASES.glob("*.*[!d]")):
        yield path.name, path.read_bytes()


@pytest.mark.parametrize("name,data", [pytest.param(*kind, id=kind[0]) for kind in kinds()])
def test_files_and_texts_are_refused(name, data):
    assert not V.could_be_samples(data[:4096])


def test_a_refused_file_is_one_line_with_the_way_out(checkpoint):
    for data in (GOOD.read_bytes(), b"hello\n", (CASES / "radio.ts").read_bytes()):
        code, out, err = run("--model", checkpoint, "-", stdin=data)
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert err.startswith("voxtral.py: standard input: not raw 16-bit mono 16 kHz samples")
        assert "ffmpeg -i INPUT -f s16le -ac 1 -ar 16000 - | python voxtral.py -" in err


@pytest.fixture
def arriving(monkeypatch):
    """Let standard input be these pieces, each as it is or what a function returns."""
    def arriving(*pieces):
        rest = iter([*pieces, b""])

        def read(*_):
            piece = next(rest)
            if isinstance(piece, OSError):
                raise piece
            return piece() if callable(piece) else piece

        monkeypatch.setattr(os, "read", read)
        return V.standard_input(SimpleNamespace())

    monkeypatch.setattr(os, "isatty", lambda _: False)
    return arriving


@pytest.mark.parametrize("largest", [1, 3, 700, 5000, 32_000])
def test_pieces_of_any_size_are_the_same_samples(arriving, noise, largest):
    """Half a sample waits for the other half, and one at the end is dropped."""
    data = pcm(noise[:9000] / 9) + b"x"
    rng = random.Random(0)
    pieces = []
    while rest := data[sum(map(len, pieces)) :]:
        pieces.append(rest[: rng.randint(1, largest)])
    assert b"".join(samples.tobytes() for samples in arriving(*pieces)) == data[:-1]


def test_what_waits_is_fed_together_up_to_64_steps(arriving):
    """So a machine that fell behind gains: the encoder takes many steps at a better price."""
    late = threading.Event()  # the model is: meanwhile 300 steps come
    caught_up = threading.Event()
    pieces = [bytes(1 << 15), lambda: late.wait(9) and bytes(2560), *[bytes(2560)] * 299,
              lambda: caught_up.wait(9) and bytes(2560)]
    source = arriving(*pieces)
    assert len(next(source)) == 1 << 14  # what has come
    late.set()
    time.sleep(0.5)
    sizes = [len(samples) / V.STEP for samples in itertools.islice(source, 7)]
    assert max(sizes) <= 64 and sum(sizes) == 300 and sorted(sizes)[2] > 32
    caught_up.set()
    assert [len(samples) for samples in source if len(samples)] == [V.STEP]


def test_what_came_is_fed_at_once_and_not_judged_again(arriving):
    fed, again = threading.Event(), threading.Event()
    source = arriving(bytes(4096), lambda: fed.wait(9) and bytes(10),
                      lambda: again.wait(9) and np.random.RandomState(0).bytes(4096))
    assert len(next(source)) == 2048
    fed.set()
    assert len(next(source)) == 5
    again.set()
    assert sum(map(len, source)) == 2048


def test_what_ended_it_is_told_after_what_was_heard(checkpoint, arriving, noise, monkeypatch):
    """As a connection that is reset: the text of what came, then the reason."""
    data = pcm(noise[:16_000] / 9)
    whole = run("--model", checkpoint, *JSON, "-", stdin=data)[1]
    assert json.loads(whole)["duration"] == 1 and json.loads(whole)["delay_ms"] == 480
    monkeypatch.setenv("PATH", "/nowhere")  # `arriving` replaces what reads from ffmpeg, too
    arriving(data, ConnectionResetError(104, "Connection reset by peer"))
    code, out, err = call("--model", checkpoint, *JSON, "-", GOOD)
    assert code == 1 and out.startswith(whole) and len(out.splitlines()) == 2
    assert err == ["voxtral.py: standard input: Connection reset by peer"]  # not of the file


def test_a_pipe_that_does_not_block_is_told(checkpoint):
    """A real one: reading it fails where nothing waits."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    done = subprocess.run([sys.executable, HERE / "voxtral.py", "--model", checkpoint, "-"],
                          stdin=reading, capture_output=True, check=False, timeout=120)
    os.close(reading)
    os.close(writing)
    assert done.returncode == 1 and done.stdout == b""
    assert re.fullmatch(rb"voxtral.py: standard input: Resource.* unavailable\n", done.stderr)


def test_a_model_that_stalls_loses_nothing(checkpoint, noise, tmp_path):
    """The sender is not held up: all is taken from the pipe while the model does nothing."""
    (tmp_path / "slow.py").write_text(f"""if True:
        import sys, time
        sys.path.insert(0, {str(HERE)!r})
        import voxtral as V
        feed = V.Stream.feed
        def stalls(self, samples):
            while not __import__("os").path.exists({str(tmp_path / "go")!r}): time.sleep(0.02)
            return feed(self, samples)
        V.Stream.feed = stalls
        sys.exit(V.main())""")
    data = pcm(np.tile(noise, 4) / 9)  # 768 kB, more than a pipe holds
    args = ["--model", checkpoint, "--quiet", "-"]
    whole = run(*args, stdin=data)[1]
    child = subprocess.Popen([sys.executable, tmp_path / "slow.py", *args], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    writer = threading.Thread(target=lambda: (child.stdin.write(data), child.stdin.close()))
    writer.start()
    writer.join(60)
    taken = not writer.is_alive()
    (tmp_path / "go").touch()
    assert taken and child.stdout.read().decode() == whole and child.wait(60) == 0


@pytest.mark.parametrize("data", [b"", b"\0"])
def test_no_sound_came(checkpoint, data):
    code, out, err = run("--model", checkpoint, "-", stdin=data)
    assert (code, out, err) == (1, "", "voxtral.py: standard input: no sound came\n")


# ----------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number,kind,case", [
    ("INT", "text", ""), ("INT", "srt", ""), ("INT", "text", "nothing"), ("TERM", "json", ""),
    ("TERM", "srt", "folder"), ("HUP", "text", ""), ("HUP", "json", "folder"),
    ("HUP", "text", "nohup")])
def test_a_signal_finishes_what_was_heard(checkpoint, tmp_path, noise, number, kind, case):
    """With its end written, also after half a sample."""
    data = b"\0" if case == "nothing" else pcm(noise / 9) + b"x"
    args = ["--model", checkpoint, "--quiet", "--format", kind, "-"]
    whole = run(*args, stdin=data)[1]
    args += ["--output-dir", tmp_path] if case == "folder" else []
    signal.signal(signal.SIGHUP, signal.SIG_IGN if case == "nohup" else signal.SIG_DFL)  # inherited
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    program = [sys.executable, "-c", f"""if True:
        import os, sys
        sys.path.insert(0, {str(HERE)!r})
        import voxtral as V
        left = {len(data)}
        read = os.read
        def reads(*args):  # says when all has arrived: when more is asked for
            global left
            if not left: open({str(tmp_path / "arrived")!r}, "w").close()
            piece = read(*args)
            left -= len(piece)
            return piece
        V.os.read = reads
        sys.exit(V.main())""", *args]
    child = subprocess.Popen(program, bufsize=0, start_new_session=True, **pipes)
    for start in range(0, len(data), 9999):  # odd pieces
        child.stdin.write(data[start : start + 9999])
    limit = time.monotonic() + 60
    while not (tmp_path / "arrived").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    os.killpg(child.pid, signal.Signals[f"SIG{number}"])  # as a terminal does
    if case == "nohup":
        time.sleep(0.1)
        child.stdin.close()
    assert child.wait(60) == (0 if case == "nohup" else 130)  # before reading, which has no limit
    out, err = child.stdout.read().decode(), child.stderr.read()
    assert err == b""
    out = (tmp_path / f"stdin.{kind}").read_text() if case == "folder" else out
    assert out == whole or case == "nothing" and out == "\n"


def test_the_next_signal_leaves_at_once(checkpoint, tmp_path, noise):
    """While what was heard is finished; and while a file is read."""
    code = f"""if True:
        import signal, sys
        sys.path.insert(0, {str(HERE)!r})
        import voxtral as V
        def feed(self, samples):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # as `timeout` does
            signal.raise_signal(signal.SIGINT)
        V.Stream.feed = feed
        sys.exit(V.main())"""
    for name in ("-", GOOD):
        args = ["--model", checkpoint, "--quiet", "--output-dir", tmp_path / "out", name, GOOD]
        done = subprocess.run([sys.executable, "-c", code, *args], input=pcm(noise / 9),
                              capture_output=True, check=False, timeout=120)
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
        assert list((tmp_path / "out").iterdir()) == []


def test_a_signal_in_the_file_after_standard_input(checkpoint, tmp_path, noise):
    code = f"""if True:
        import signal, sys
        sys.path.insert(0, {str(HERE)!r})
        import voxtral as V
        V.load_audio = lambda *_: signal.raise_signal(signal.SIGINT) or V.np.ones(9999)
        sys.exit(V.main())"""
    args = ["--model", checkpoint, "--quiet", "--output-dir", tmp_path / "out", "-", GOOD]
    done = subprocess.run([sys.executable, "-c", code, *args], input=pcm(noise / 9),
                          capture_output=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (130, b"")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["stdin.txt"]


def test_an_interrupted_folder_has_whole_files_only(checkpoint, tmp_path, noise):
    names = [tmp_path / f"{i}.wav" for i in range(40)]
    for name in names:
        name.write_bytes(encoded(noise[:30_000]))
    whole = call("--model", checkpoint, "--quiet", names[0])[1]
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, HERE / "voxtral.py", "--model", checkpoint,
                              "--output-dir", out, *names], stderr=subprocess.PIPE)
    limit = time.monotonic() + 60
    while not (out.is_dir() and len(list(out.iterdir())) > 2) and time.monotonic() < limit:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130 and child.stderr.read() == b""
    texts = [path.read_text() for path in out.iterdir()]
    assert 2 < len(texts) < 40 and set(texts) == {whole}


def test_ctrl_c_ends_the_line_of_a_file(checkpoint, tmp_path, monkeypatch, noise):
    """What was written stays, and the prompt has a line of its own."""
    (tmp_path / "x.wav").write_bytes(encoded(noise))

    def feed(self, samples):
        self.transcripts[0].text += "heard"
        if len(self.text) > 5:
            raise KeyboardInterrupt
        return "heard"

    monkeypatch.setattr(V.Stream, "feed", feed)
    assert call("--model", checkpoint, "--quiet", tmp_path / "x.wav") == (130, "heard\n", [])


# ---------------------------------------------------------------------------------------- programs


def test_main_in_a_notebook_and_a_thread(checkpoint, noise):
    """It changes no signal, and writes to where standard output is redirected."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    code = f"""if True:
        import contextlib, io, signal, sys, threading
        sys.path.insert(0, {str(HERE)!r})
        import voxtral as V
        before = signal.getsignal(signal.SIGTERM)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = V.main(sys.argv[1:])
        codes = []
        with contextlib.redirect_stdout(again := io.StringIO()):
            work = lambda: (codes.append(V.main(sys.argv[1:])), V.mx.clear_streams())
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        print(code, codes, out.getvalue() == again.getvalue(), len(out.getvalue()) > 20,
              signal.getsignal(signal.SIGTERM) == before)"""
    args = ["--model", checkpoint, "--quiet", "--format", "json", GOOD]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, check=False,
                          env={**os.environ, "MLX_DISABLE_COMPILE": "1"}, timeout=120)
    assert done.stdout == b"0 [0] True True True\n", done.stderr.decode()
    call("--model", checkpoint, "--quiet", GOOD)
    assert before == [
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_several_processes_share_the_files(checkpoint, tmp_path, noise):
    names = [tmp_path / f"{i}.wav" for i in range(5)]
    for i, name in enumerate(names):
        name.write_bytes(encoded(noise[i * 9000 :][:20_000]))
    launch = [Path(sys.executable).parent / "mlx.launch", "-n", "2", "--", sys.executable]
    program = [*launch, HERE / "voxtral.py", "--model", checkpoint, "--format", "json"]
    out = tmp_path / "out"
    done = subprocess.run([*program, "--output-dir", out, *names], capture_output=True,
                          check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert sorted(path.name for path in out.iterdir()) == [f"{i}.json" for i in range(5)]
    assert (out / "3.json").read_text() == call("--model", checkpoint, *JSON, names[3])[1]
    done = subprocess.run([*program, *names], capture_output=True, check=False, timeout=120)
    told = (done.stdout + done.stderr).decode()
    assert told.count("several processes need --output-dir") == 2 and '"file"' not in told


def test_closed_and_full_streams(checkpoint, tmp_path):
    out = tmp_path / "out"
    program = f"{sys.executable} {HERE / 'voxtral.py'} --quiet --model {checkpoint} --format json"
    for args, says in (
            ("- <&-", "1 voxtral.py: standard input: closed.*\n"),
            (f"{GOOD} >&-", "1 voxtral.py: standard output is closed\n"),
            (f"--output-dir {out} {GOOD} >&-", "0 "),
            (f"{GOOD} 2>&-", "0 {.*}\n"), (f"{GOOD} <&-", "0 {.*}\n"),
            (f"{GOOD} <&- >&- 2>&- --output-dir {out}", "0 "),
            (f"{GOOD} {DIGITS / 'pause.flac'} | :", "0 voxtral.py: standard output was closed\n"),
            (f"{GOOD} > /dev/full", "1 voxtral.py: standard output: No space left.*\n")):
        done = subprocess.run(f"{program} {args}", shell=True, capture_output=True, check=False)
        told = f"{done.returncode} {done.stdout.decode()}{done.stderr.decode()}"
        assert re.fullmatch(says, told) or "full" in args and not os.path.exists("/dev/full"), told
    assert json.loads((out / "short.json").read_text())["duration"] == 5


def test_output_is_utf8_whatever_the_locale():
    code, out, err = run(*SPEECH, GOOD, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (code, err) == (0, "") and "八" in out


def test_output_dir_has_complete_files(checkpoint, tmp_path, noise, monkeypatch):
    names = [tmp_path / name for name in ("a.wav", "b.c.wav", "bad.wav")]
    for name in names[:2]:
        name.write_bytes(encoded(noise[:30000]))
    base = ["--model", checkpoint, "--quiet", "--format"]
    for kind in ("text", "srt", "vtt", "json"):
        folder = tmp_path / "new" / kind
        for _ in range(2):  # the second time they are replaced
            code, out, err = call(*base, kind, "--output-dir", folder, *names)
            texts = {path.name: path.read_text() for path in folder.iterdir()}
            end = kind.replace("text", "txt")
            assert (code, out, len(err), {*texts}) == (1, "", 1, {f"a.{end}", f"b.c.{end}"})
            assert texts[f"a.{end}"] == call(*base, kind, names[0])[1]
    long = tmp_path / ("n" * 251 + ".wav")  # as long as a name can be; NAME.json is too long
    long.write_bytes(encoded(noise[:9000]))
    code, out, err = call(*base, "json", "--output-dir", tmp_path / "long", long, names[0])
    assert (code, len(err)) == (1, 1) and "File name too long" in err[0]
    assert [path.name for path in (tmp_path / "long").iterdir()] == ["a.json"]
    monkeypatch.setattr(Path, "replace", lambda *_: os.stat("/nowhere"))  # which fails
    code, out, err = call(*base, "text", "--output-dir", tmp_path, *names[:2])
    assert (code, len(err)) == (1, 2) and f": {tmp_path}/a.txt: No such file" in err[0]
    assert not list(tmp_path.glob("*.txt")) and not list(tmp_path.glob("*.part"))
    code, _, err = call(*base, "text", "--output-dir", tmp_path / "q", *names, "z/a.flac")
    assert code == 2 and "files of one name" in err[-1]
    assert not (tmp_path / "q").exists()
    code, _, err = call(*base, "text", "--output-dir", names[0], *names)
    assert code == 1 and len(err) == 1 and f"{names[0]}: File exists" in err[0]


def test_wrong_options(checkpoint, tmp_path):
    for args in ("--delay 9", "--batch 0", "--temp nan", "--temp -1", "--dtype int8", "--form x",
                 "--form srt x", "--convert x"):
        code, out, err = call("--model", "/nowhere", *args.split(), GOOD)
        assert code == 2 and out == "" and "usage" in err[0] and len(err[-1]) < 160, args
    for model in ("/nowhere", "no/such/folder", tmp_path, GOOD, "x" * 5000):
        code, out, err = call("--model", model, GOOD)
        assert (code, out, len(err)) == (1, "", 1) and err[0].startswith(f"voxtral.py: {model}")
    told = [json.loads(call("--model", checkpoint, *JSON, GOOD, *args.split())[1])
            for args in ("", "--delay 80", "--temperature 9")]
    assert [record["delay_ms"] for record in told] == [2400, 80, 2400]
    assert len({str(record["tokens"]) for record in told}) == 3
    assert told[0]["words"][0].keys() == {"text", "start", "end", "probability"}


def test_progress_is_shown_where_nothing_else_is(checkpoint, tmp_path):
    """On a terminal, under the file's name; not where its text grows there, and not in a log."""
    folder = ["--output-dir", tmp_path / "out"]
    for args, bar in (([], False), (folder, True), (["--format", "json"], True),
                      ([*folder, "--quiet"], False)):
        err = call("--model", checkpoint, GOOD, *args, terminal=True)[2]
        assert any(line.startswith("short.flac: 100%") for line in err) == bar, (args, err)
        assert not call("--model", checkpoint, GOOD, *args)[2]
    (tmp_path / "long.wav").write_bytes(encoded(np.tile(V.load_audio(GOOD), 17)))
    err = call("--model", checkpoint, tmp_path / "long.wav", "--batch", "2", terminal=True)[2]
    percent = [int(number) for number in re.findall(r"long.wav: +(\d+)%", " ".join(err))]
    assert percent == sorted(percent) and percent[-1] == 100 and len(set(percent)) > 3


# ----------------------------------------------------------------------------------------- batches


def test_long_recordings_are_cut_where_it_is_quiet(tmp_path):
    speech = np.random.RandomState(0).randn(190 * 16000).astype(np.float32) / 10
    for at in (43.2, 96.6, 139.0, 152.3):
        speech[int((at - 0.2) * 16000) : int((at + 0.2) * 16000)] /= 30
    for n in (1, 2, 4, 64):
        pieces = V.cut_at_pauses(speech, n)
        assert len(pieces) == min(n, 4) and np.array_equal(np.concatenate(pieces), speech)
        assert min(map(len, pieces)) >= 30 * 16000
    cuts = np.cumsum([len(piece) for piece in pieces[:-1]])
    assert np.abs(cuts / 16000 - [43.2, 96.6, 139.0]).max() < 0.2 and not any(cuts % 1280)
    (tmp_path / "long.wav").write_bytes(encoded(np.tile(V.load_audio(GOOD), 17)))
    record = json.loads(call(*SPEECH, *JSON, "--batch", "2", tmp_path / "long.wav")[1])
    assert record["text"] == " ".join([SHORT] * 17) and record["duration"] == 85
    ends = np.reshape([word["end"] for word in record["words"]], (17, -1))
    assert np.abs(np.diff(ends, axis=0) - 5).max() < 0.2


def test_a_batch_is_one_recording_after_the_other(checkpoint, tmp_path, noise, monkeypatch):
    """A file that is named twice is one recording; too little memory says what to do."""
    names = [tmp_path / name for name in ("a.wav", "b.wav", "c.wav")]
    for name, n in zip(names, (8000, 90 * 16_000, 30_000)):
        name.write_bytes(encoded(np.resize(noise, n) / 9))
    base = ["--model", checkpoint, *JSON]
    for batch in "19":
        out = call(*base, "--batch", batch, *names, names[0])[1]
        assert [json.loads(line)["file"] for line in out.splitlines()] == list(map(str, names))
    asked = []

    def transcribe_batch(model, tokenizer, recordings, *, progress, **settings):
        asked.append((len(recordings), settings))
        raise RuntimeError("[malloc] Unable to allocate 9 bytes.")

    monkeypatch.setattr(V, "transcribe_batch", transcribe_batch)
    code, out, err = call(*base, "--batch", "9", "--delay", "160", *names)
    assert (code, len(out.splitlines()), len(err)) == (1, 2, 1)
    assert asked == [(2, {"delay_ms": 160, "temperature": 0.0})]
    assert err[0].startswith(f"voxtral.py: {names[1]}: [malloc]") and "smaller --batch" in err[0]


# --------------------------------------------------------------------------------------- subtitles


def cues(text, kind):
    """(start, end in ms, text) of each cue of a file of subtitles."""
    blocks = text.split("\n\n")
    assert blocks.pop() == "" and (kind == "srt" or blocks.pop(0) == "WEBVTT")
    out = []
    for i, block in enumerate(blocks, 1):
        lines = block.split("\n")
        assert kind == "vtt" or lines.pop(0) == str(i)
        times = [re.fullmatch(r"(\d\d+):([0-5]\d):([0-5]\d)[.,](\d{3})", time).groups()
                 for time in lines[0].split(" --> ")]
        start, end = (((int(h) * 60 + int(m)) * 60 + int(s)) * 1000 + int(ms)
                      for h, m, s, ms in times)
        out.append((start, end, "\n".join(lines[1:])))
    return out


def test_cues_are_whole_escaped_and_long_enough():
    m = "m" * 20
    words = [("<b>\n\nTom", 0, 0.1), (' &\x85 "Anne."', 0.1, 0.2), (" No -->", 0.4, 0.5)]
    words += [(" far", 9, 9.4), (" away", 10.2, 10.6)]
    words += [(f" w{i}", i + 0.5, i + 1) for i in range(20, 28)]  # 7 s are full
    words += [(f" {m}", 40 + i / 2, 40.5 + i / 2) for i in range(5)]  # two lines are full
    words += [(" 八" * 20, 3723.4, 3726.4), (" day", 90_000, 90_000.4)]
    expected = [("00:00:00.000 --> 00:00:00.400", '<b> Tom & "Anne."'),
                ("00:00:00.400 --> 00:00:01.233", "No -->"),
                ("00:00:09.000 --> 00:00:10.600", "far away"),
                ("00:00:20.500 --> 00:00:27.000", "w20 w21 w22 w23 w24 w25 w26"),
                ("00:00:27.500 --> 00:00:28.333", "w27"),
                ("00:00:40.000 --> 00:00:42.000", f"{m} {m}\n{m} {m}"),
                ("00:00:42.000 --> 00:00:42.833", m),
                ("01:02:03.400 --> 01:02:06.400", "八 " * 10 + "八\n" + "八 " * 8 + "八"),
                ("25:00:00.000 --> 25:00:00.833", "day")]
    words = [V.Word(*word) for word in words]
    srt = [f"{i}\n{times.replace('.', ',')}\n{text}\n\n"
           for i, (times, text) in enumerate(expected, 1)]
    assert V.subtitles(words, "srt") == "".join(srt)
    vtt = V.subtitles(words, "vtt")
    first = "00:00:00.000 --> 00:00:00.400\n&lt;b&gt; Tom &amp; \"Anne.\"\n\n"
    assert vtt.startswith("WEBVTT\n\n" + first)
    assert V.subtitles([], "srt") == "" and V.subtitles([], "vtt") == "WEBVTT\n\n"
    with pytest.raises(V.VoxtralError, match="srt or vtt, not txt"):
        V.subtitles(words, "txt")


def test_a_sentence_ends_a_cue_in_any_script():
    words = [V.Word("好。", 1.0, 1.2), V.Word("八", 1.3, 1.6)]
    assert [text for *_, text in cues(V.subtitles(words, "srt"), "srt")] == ["好。", "八"]


@pytest.mark.parametrize("seed", range(30))
def test_no_text_is_lost_and_cues_do_not_overlap(seed):
    """Words as transcripts have them: long groups, no duration, several with one end, days."""
    rng = random.Random(seed)
    words = []
    end = rng.choice([0.0, 86_390.0])
    for _ in range(rng.randint(1, 60)):
        start = max(end, (end := round(end + rng.choice([0, 0, 0.08, 0.3, 5]), 3)) - 0.4)
        text = "".join(rng.choice(["a", "b ", "八", "m" * 50, ".", "?\n", "\t", " - ", "&"])
                       for _ in range(rng.choice([1, 1, 3, 60])))
        words.append(V.Word(text, start, end))
    for kind in ("srt", "vtt"):
        told = cues(V.subtitles(words, kind), kind)
        text = "".join(text for _, _, text in told).replace("&amp;", "&")
        assert "".join(text.split()) == "".join("".join(word.text for word in words).split())
        assert all(text.strip() and start < end for start, end, text in told)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(told))
        lines = [line for *_, text in told for line in text.split("\n")]
        assert all(len(html.unescape(line)) <= 42 for line in lines)


def test_load_audio_is_exact_in_its_own_rate(tmp_path, noise):
    """ffmpeg and libsndfile give the same samples where nothing has to be resampled."""
    (tmp_path / "x.wav").write_bytes(encoded(noise))
    expected = np.round(noise * 32768).clip(-32768, 32767) / 32768
    assert close(V.load_audio(tmp_path / "x.wav"), expected)
