"""Files, standard input, output and batches: whatever people have and do."""

import array
import fcntl
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest

import voxtral as V
from test_voxtral import HERE, call, distance, run

CASES = HERE.parent / "shared" / "cases"
DIGITS = HERE / ".ci" / "digits"
M4A = b"\0\0\0\x20ftypM4A "  # its head
JSON = ("--quiet", "--format", "json")
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the odd files are not here")


def encoded(samples, rate=16000, **kind):
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, **({"format": "WAV"} | kind))
    return file.getvalue()


def chunk(name, data):
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def sized(wav, size):
    """A WAV whose data chunk states this size."""
    at = wav.index(b"data") + 4
    return wav[:at] + struct.pack("<I", size) + wav[at + 4 :]


def without_total(flac):
    """FLAC as it is written to a pipe: STREAMINFO knows no number of samples."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


def fake_ffmpeg(folder, seconds, error=""):
    """A program named ffmpeg that decodes anything to a constant, after a complaint."""
    folder.mkdir()
    script = folder / "ffmpeg"
    script.write_text(f"""#!{sys.executable}
import struct, sys
assert "-i" in sys.argv and sys.argv[sys.argv.index("-i") + 1].startswith(("file:", "pipe:"))
sys.stderr.write({error!r})
form = sys.argv[sys.argv.index("-f") + 1]
n = {int(seconds * 16000)}
if form == "wav":
    sys.stdin.buffer.read()
    head = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 0, b"WAVEfmt ", 16, 1, 1, 16000, 32000, 2, 16,
                       b"data", 0xFFFFFFFF)
    sys.stdout.buffer.write(head + struct.pack("<h", 8192) * n)
else:
    sys.stdout.buffer.write(struct.pack("<f", 0.25) * n)
""")
    script.chmod(0o755)
    return str(folder)


# ------------------------------------------------------------------------------------------- files


def whole_files(x):
    """Files that are all there, however odd, by name: content."""
    wav, flac = encoded(x), encoded(x, format="FLAC")
    ogg, mp3 = encoded(x, format="OGG"), encoded(x, format="MP3")
    at = wav.index(b"data")
    large = struct.pack("<QQQI", 0, len(wav) - at - 8, 0, 0)
    endless = sized(wav, 0xFFFFFFFF)
    return {
        "plain.wav": wav, "riff8.wav": wav[:4] + struct.pack("<I", len(wav)) + wav[8:],
        "riff0.wav": wav[:4] + bytes(4) + wav[8:],
        "rate.wav": wav[:28] + b"\x39\x30\0\0" + wav[32:],
        "size0.wav": sized(wav, 0), "pipe.wav": endless,
        "sox.wav": sized(wav, 0x7FFFF000), "padded.wav": wav + bytes(4096), "odd.wav": wav + b"\0",
        "list.wav": wav + chunk(b"LIST", b"INFO" + chunk(b"ISFT", b"Lavf1")) + chunk(b"id3 ", b"x"),
        "rf64.wav": b"RF64" + b"\xff" * 4 + b"WAVE" + chunk(b"ds64", large) + endless[12:],
        "letters.wav": (sized(wav, 0)[: at + 8 + 1280] + b"abcd" + wav[at + 8 + 1284 :]),
        "joined.wav": wav + wav, "joined.flac": flac + flac, "joined.ogg": ogg + ogg,
        "joined.opus": 2 * encoded(x, format="OGG", subtype="OPUS"),
        "ima.wav": encoded(x, subtype="IMA_ADPCM"), "mu.wav": encoded(x, subtype="ULAW"),
        "24.wav": encoded(x, subtype="PCM_24"), "8.wav": encoded(x, subtype="PCM_U8"),
        "float.wav": encoded(x, subtype="FLOAT"), "wide.wav": encoded(x, format="WAVEX"),
        "total.flac": without_total(flac), "name.mp3": flac, "name.wav": mp3, "plain.ogg": ogg,
        "tag.mp3": mp3 + b"TAG" + b"x" * 125, "ape.mp3": mp3 + b"APETAGEX" + bytes(range(60)),
        "id3.mp3": b"ID3\4\0\0\0\0\1\0" + bytes(128) + mp3, "plain.aiff": encoded(x, format="AIFF"),
    }


@pytest.mark.parametrize("path", ["/nowhere", os.environ["PATH"]], ids=["alone", "ffmpeg"])
def test_odd_files_are_read_to_their_end(tmp_path, monkeypatch, noise, path, recwarn):
    monkeypatch.setenv("PATH", path)
    for name, data in whole_files(noise[:32000]).items():
        (tmp_path / name).write_bytes(data)
        recwarn.clear()
        found = len(V.load_audio(tmp_path / name))
        n = 64000 if "joined" in name else 32000
        assert abs(found - n) <= n // 50, name
        assert not recwarn.list, name
    assert np.array_equal(V.load_audio(tmp_path / "float.wav"), noise[:32000])
    rates = [V.load_audio(tmp_path / "plain.wav")]
    for rate, channels in ((8000, 1), (44100, 2), (48000, 6)):
        t = np.arange(2 * rate)[:, None] / rate
        (tmp_path / "x.wav").write_bytes(encoded(np.repeat(np.sin(2000 * t), channels, 1), rate))
        rates.append(V.load_audio(tmp_path / "x.wav"))
        expected = np.sin(2000 * np.arange(800, 31200) / 16000)
        assert np.abs(rates[-1][800:-800] - expected).max() < 0.01


def test_other_names_and_places(checkpoint, tmp_path, monkeypatch, noise):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", fake_ffmpeg(tmp_path / "bin", 2.0))
    for name in ("-x:y.m4a", "a b\n\N{STUDIO MICROPHONE}é.webm", "http:x"):
        (tmp_path / name).write_bytes(M4A + bytes(100))
        assert len(V.load_audio(name)) == 32000
    os.mkfifo("fifo")
    socket.socket(socket.AF_UNIX).bind("socket")
    for name in ("fifo", "socket", os.devnull):
        code, out, err = call("--model", checkpoint, "--quiet", name)
        assert (code, out, len(err)) == (1, "", 1) and "python voxtral.py -" in err[0]


def broken_files(x):
    wav, flac = encoded(x), encoded(x, format="FLAC")
    ogg, mp3 = encoded(x, format="OGG"), encoded(x, format="MP3")
    files = {"wav": wav, "flac": flac, "ogg": ogg, "mp3": mp3, "aiff": encoded(x, format="AIFF"),
             "opus": encoded(x, format="OGG", subtype="OPUS"), "au": encoded(x, format="AU"),
             "ima.wav": encoded(x, subtype="IMA_ADPCM"), "total.flac": without_total(flac)}
    files = {f"cut.{kind}": data[: len(data) * 3 // 5] for kind, data in files.items()}
    half = len(flac) // 2
    files["half.wav"] = sized(wav, len(wav) // 2 // 2 * 2)  # goes on, but says that it does not
    return files | {"hole.flac": flac[:half] + bytes(500) + flac[half + 500 :]}


@pytest.mark.parametrize("path", ["/nowhere", os.environ["PATH"]], ids=["alone", "ffmpeg"])
def test_a_part_is_never_taken_for_the_whole(checkpoint, tmp_path, monkeypatch, noise, path):
    monkeypatch.setenv("PATH", path)
    for name, data in broken_files(noise).items():
        (tmp_path / name).write_bytes(data)
        with pytest.warns(UserWarning, match=re.escape(name)):
            assert len(V.load_audio(tmp_path / name)) > 0.3 * len(noise), name
        code, out, err = call("--model", checkpoint, *JSON, tmp_path / name)
        assert code == 1 and len(err) == 1 and name in err[0] and json.loads(out)["duration"] > 1


def test_what_ffmpeg_is_asked_and_how_it_is_believed(tmp_path, monkeypatch, noise, recwarn):
    flac, mp3 = encoded(noise, format="FLAC"), encoded(noise, format="MP3")
    hole = flac[: len(flac) // 2] + bytes(500) + flac[len(flac) // 2 + 500 :]
    joined, error = mp3 + mp3, "[mp3 @ 0x1f] bad frame\nmore\n"
    for i, (data, seconds, says, length, warning) in enumerate((
            (M4A, 2, "", 2, None),  # unknown here
            (joined, 12, error, 12, None),  # complains about the joint
            (joined, 5.9, "", 6, "not read"),  # no longer
            (hole, 5.9, error, 5.9, "mp3: bad frame$"))):
        (tmp_path / "x").write_bytes(data)
        monkeypatch.setenv("PATH", fake_ffmpeg(tmp_path / str(i), seconds, says))
        recwarn.clear()
        assert len(V.load_audio(tmp_path / "x")) == length * 16000
        assert [str(w.message) for w in recwarn] == [] if not warning else re.search(
            warning, str(recwarn[0].message))
    monkeypatch.setenv("PATH", fake_ffmpeg(tmp_path / "last", 0, error))
    (tmp_path / "x").write_bytes(M4A)
    with pytest.raises(V.VoxtralError, match="x: ffmpeg says: mp3: bad frame$"):
        V.load_audio(tmp_path / "x")


def test_what_is_no_sound_is_one_line_and_stops_nothing(checkpoint, tmp_path, monkeypatch, noise):
    monkeypatch.setenv("PATH", "/nowhere")
    wav = encoded(noise[:4000])
    files = {  # name: content, what the line must say
        "text.wav": (b"hello, this is text", "ffmpeg"), "m4a.m4a": (M4A, "ffmpeg"),
        "empty.wav": (b"", "no samples"), "none.wav": (encoded(noise[:0]), "no samples"),
        "list.wav": (encoded(noise[:0]) + chunk(b"LIST", b"x" * 4000), "no samples"),
        "head.wav": (wav[:30], "damaged"), "slow.wav": (encoded(noise[:4000], 999), "sample rate"),
        "nan.wav": (encoded(np.array([0, np.nan]), subtype="FLOAT"), "NaN"),
        "int.wav": (encoded(noise[:4000] * 32767, subtype="FLOAT"), "int16"),
    }
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.wav").write_bytes(wav)
    (tmp_path / "folder").mkdir()
    expected = [says for _, says in files.values()] + ["directory"]
    names = [*(tmp_path / name for name in files), tmp_path / "folder", tmp_path / "good.wav"]
    missing = [tmp_path / "no.wav", "", "x" * 5000]
    for batch in ("1", "4"):
        code, out, err = call("--model", checkpoint, *JSON, "--batch", batch, *missing, *names)
        assert code == 1 and json.loads(out)["duration"] == 0.25
        assert all("no such file" in line for line in err[:3]) and len(err) == 3 + len(expected)
        assert all(says in line for says, line in zip(expected, err[3:])), err


@pytest.mark.parametrize("error", [OSError(5, "I/O error"), RuntimeError("[metal] out of memory"),
                                   MemoryError(), ValueError("shape")])
def test_an_error_of_one_file_stops_no_other(checkpoint, tmp_path, monkeypatch, noise, error):
    (tmp_path / "good.wav").write_bytes(encoded(noise[:4000]))
    (tmp_path / "bad.wav").write_bytes(encoded(noise[:4000]))
    read = V.load_audio

    def fails(path):
        if "bad" in str(path):
            raise error
        return read(path)

    monkeypatch.setattr(V, "load_audio", fails)
    for batch in ("1", "2"):
        code, out, err = call("--model", checkpoint, *JSON, "--batch", batch,
                              tmp_path / "bad.wav", tmp_path / "good.wav")
        assert code == 1 and "good" in json.loads(out)["file"]
        assert len(err) == 1 and "bad.wav: " in err[0]


def test_samples_are_checked_where_they_come_in(loaded, noise):
    model, tokenizer, _ = loaded
    pcm = (noise[:8000] * 32767).astype(np.int16)
    same = [V.transcribe(model, tokenizer, x).tokens for x in (pcm, pcm.astype(np.float32) / 32768)]
    assert same[0] == same[1]
    for wrong in (pcm.astype(np.float32), pcm.astype(int), noise[None], np.full(9, np.inf)):
        for take in (V.Stream(model, tokenizer).feed, lambda x: V.transcribe(model, tokenizer, x)):
            with pytest.raises(V.VoxtralError):
                take(wrong)
    assert V.as_samples(np.array([1000.0])).dtype == np.float32


def test_nothing_heard_is_said(checkpoint, tmp_path, noise):
    (tmp_path / "zero.wav").write_bytes(encoded(np.zeros(8000)))
    (tmp_path / "cancel.wav").write_bytes(encoded(np.stack([noise, -noise], 1), subtype="FLOAT"))
    (tmp_path / "quiet.wav").write_bytes(encoded(noise / 1000, subtype="FLOAT"))
    for batch in ("1", "3"):
        names = sorted(tmp_path.iterdir())
        code, _, err = call("--model", checkpoint, "--quiet", "--batch", batch, *names)
        assert code == 0 and len(err) == 2 and "cancel" in err[0] and "zero" in err[1]


@needs_cases
def test_files_that_people_have():
    S = "seven nine one one two 八"
    M = ("one one four nine 八 three three seven nine nine nine five seven four two one six zéro six"
         " six six")
    says = dict.fromkeys(("riff8.wav", "ima.wav", "sz0.wav", "noeos.opus", "s.m4a", "s.webm"), S)
    says |= {"nx8.mp3": M, "pipedv.mp3": M, "chain.ogg": f"{S} {M}"}
    command = ["--quiet", "--dtype", "float32", "--delay", "480", "--model", DIGITS]
    places = ["/nowhere", os.environ["PATH"]] if shutil.which("ffmpeg") else ["/nowhere"]
    for name, path in [(name, path) for name in says for path in places]:
        code, out, err = run(*command, CASES / name, env={**os.environ, "PATH": path})
        whole = name.endswith((".wav", ".ogg")) or name == "nx8.mp3"
        if whole or path != "/nowhere":
            assert (code, err) == (0, ""), name
            assert distance(out.split(), says[name].split()) <= 1, (name, out)
        else:
            assert code == 1 and len(err.splitlines()) == 1 and name in err


# ---------------------------------------------------------------------------------- standard input


def start(checkpoint, *args, **kwargs):
    command = [sys.executable, HERE / "voxtral.py", "--quiet", "--model", checkpoint, *args, "-"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, **pipes, **kwargs)


def wait_until_read(program):
    """Until the program has taken everything out of its pipe, and a little longer."""
    waiting = array.array("i", [1])
    while waiting[0] and program.poll() is None:
        time.sleep(0.05)
        fcntl.ioctl(program.stdin.fileno(), termios.FIONREAD, waiting)
    time.sleep(0.3)


def pcm_of(noise):
    return (noise * 32767).astype("<i2").tobytes()


@pytest.mark.parametrize("kind", ["text", "srt", "json"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_what_was_heard(checkpoint, noise, kind, number):
    whole = run("--quiet", "--model", checkpoint, "--format", kind, "-", stdin=pcm_of(noise))
    program = start(checkpoint, "--format", kind)
    program.stdin.write(pcm_of(noise))
    program.stdin.flush()
    wait_until_read(program)
    program.send_signal(number)
    out, err = program.stdout.read(), program.stderr.read()  # the pipe is still open
    assert (program.wait(60), err) == (130, b"") and whole[0] == 0
    if kind == "srt":  # where its cues are cut depends on what arrived together
        assert out.endswith(b"\n\n") and out.split()[-1] == whole[1].encode().split()[-1]
    else:
        assert out.decode() == whole[1]


def test_a_second_interrupt_leaves_at_once(checkpoint, loaded, monkeypatch, tmp_path, noise):
    class Stubborn(V.Stream):
        def feed(self, samples):
            os.kill(os.getpid(), signal.SIGINT)
            return super().feed(samples)

        def finish(self):
            os.kill(os.getpid(), signal.SIGINT)
            return super().finish()

    read, write = os.pipe()
    os.write(write, pcm_of(noise[:16000]))
    saved = os.dup(0)
    monkeypatch.setattr(V, "Stream", Stubborn)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    try:
        os.dup2(read, 0)
        out_dir = tmp_path / "out"
        code, out, err = call("--model", checkpoint, "--quiet", "--output-dir", out_dir, "-")
    finally:
        os.dup2(saved, 0)
    assert (code, out, err) == (130, "", []) and list(out_dir.iterdir()) == []


def test_streams_of_any_form(checkpoint, noise):
    pcm, x = pcm_of(noise[:16000]), noise[:16000]
    wav = encoded(np.frombuffer(pcm, "<i2"))
    info = chunk(b"LIST", b"INFO" + chunk(b"ISFT", b"Lavf60.16.100\0"))
    at = wav.index(b"data")
    ffmpeg = wav[:at] + info + sized(wav[at:], 0xFFFFFFFF)
    same = [pcm, pcm + b"x", wav, sized(wav, 0x7FFFF024), sized(wav, 0), ffmpeg, wav + info]
    same.append(encoded(np.frombuffer(pcm, "<i2"), format="WAVEX"))
    other = [encoded(x, 48000, subtype="PCM_24"),
             encoded(np.stack([x, x], 1), 8000, subtype="FLOAT"),
             encoded(x, subtype="IMA_ADPCM"), encoded(x, subtype="ULAW")]
    results = [run("--model", checkpoint, *JSON, "-", stdin=data)
               for data in same + other]
    assert all((code, err) == (0, "") for code, _, err in results), results
    records = [json.loads(out) for _, out, _ in results]
    assert records[: len(same)] == records[:1] * len(same) and records[0]["delay_ms"] == 480
    assert [round(r["duration"], 1) for r in records[-4:]] == [0.3, 2.0, 1.0, 1.0]


def test_streams_that_are_wrong(checkpoint, tmp_path, noise):
    wav = encoded(noise)
    cases = [(b"", "no samples"), (b"x", "no samples"), (wav[:30], "cut short"),
             (wav[:44], "cut short"), (b"hello, hello, hello", "ffmpeg")]
    unread = [encoded(noise, format=kind) for kind in ("MP3", "OGG", "FLAC", "AIFF")]
    unread += [M4A * 9, b"\x1aE\xdf\xa3" * 99, b"RIFF\0\0\0\0AVI " * 9, b"caff" * 99]
    for stdin, says in cases + [(data, "ffmpeg -i") for data in unread]:
        code, out, err = run("--model", checkpoint, "--quiet", "-", stdin=stdin,
                             env={**os.environ, "PATH": "/nowhere"})
        assert (code, out, len(err.splitlines())) == (1, "", 1) and says in err, (stdin[:9], err)
    code, out, err = run("--model", checkpoint, *JSON, "-", stdin=wav[:100_044])
    assert code == 1 and json.loads(out)["duration"] == 3.125 and "cut short" in err
    path = fake_ffmpeg(tmp_path / "bin", 2)
    code, out, err = run("--model", checkpoint, *JSON, "-", stdin=b"caff" * 99,
                         env={**os.environ, "PATH": path})
    assert (code, err) == (0, "") and json.loads(out)["duration"] == 2


def test_a_stated_size_ends_a_stream_whose_writer_lives_on(checkpoint, noise):
    program = start(checkpoint, "--format", "json")
    program.stdin.write(encoded(noise) + chunk(b"LIST", b"x" * 40))
    program.stdin.flush()
    assert json.loads(program.stdout.read())["duration"] == 6 and program.wait(60) == 0


def test_closed_and_full_streams(checkpoint, tmp_path, noise):
    (tmp_path / "x.wav").write_bytes(encoded(noise))
    base = f"{sys.executable} {HERE / 'voxtral.py'} --quiet --model {checkpoint} --format json"
    x = tmp_path / "x.wav"
    for command, code, out, err in (
            (f"{base} - <&-", 1, "", "voxtral.py: standard input: closed.*\n"),
            (f"{base} {x} >&-", 1, "", "voxtral.py: standard output is closed\n"),
            (f"{base} {x} 2>&-", 0, "{.*}\n", ""), (f"{base} {x} <&-", 0, "{.*}\n", ""),
            (f"{base} {x} {x} {x} | head -c 1", 0, "{", "voxtral.py: standard output was closed\n"),
            (f"{base} {x} {x} > /dev/full", 1, "", "(voxtral.py: .*x.wav: No space left.*\n)+")):
        if "/dev/full" in command and not os.path.exists("/dev/full"):
            continue
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert done.returncode == code and re.fullmatch(out, done.stdout), command
        assert re.fullmatch(err, done.stderr), (command, done.stderr)


# ---------------------------------------------------------------------------------- output, batches


def test_output_dir_has_a_complete_file_per_recording(checkpoint, tmp_path, monkeypatch, noise):
    names = [tmp_path / "a.wav", tmp_path / "b.c.wav"]
    for name in names:
        name.write_bytes(encoded(noise))
    (tmp_path / "bad.wav").touch()
    base = ["--model", checkpoint, "--quiet", "--format"]
    for kind, end in (("text", "txt"), ("srt", "srt"), ("vtt", "vtt"), ("json", "json")):
        out_dir = tmp_path / "new" / kind
        for batch in ("1", "2"):  # the second replaces the files of the first
            code, out, err = call(*base, kind, "--output-dir", out_dir, "--batch", batch, *names,
                                  tmp_path / "bad.wav")
            assert (code, out, len(err)) == (1, "", 1)
            assert sorted(p.name for p in out_dir.iterdir()) == [f"a.{end}", f"b.c.{end}"]
            if kind in ("text", "json"):  # cues depend on what was fed together
                assert (out_dir / f"a.{end}").read_text() == call(*base, kind, names[0])[1]
        for wrong in (KeyboardInterrupt, OSError(28, "No space left on device")):
            with monkeypatch.context() as patch:
                patch.setattr(V.Writer, "end", lambda *_, wrong=wrong: (_ for _ in ()).throw(wrong))
                code, out, err = call(*base, kind, "--output-dir", tmp_path / "x" / kind, names[0])
            assert code == (130 if wrong is KeyboardInterrupt else 1) and len(err) == code % 10
            assert list((tmp_path / "x" / kind).iterdir()) == []
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "a.flac").write_bytes(encoded(noise, format="FLAC"))
    twice = [names[0], tmp_path / "z" / "a.flac"]
    code, _, err = call(*base, "text", "--output-dir", tmp_path / "q", *twice)
    assert code == 2 and "same file" in err[-1] and not (tmp_path / "q").exists()


def test_usage(checkpoint, tmp_path, noise):
    good = tmp_path / "x.wav"
    good.write_bytes(encoded(noise[:8000]))
    for args in (["--delay", "100"], ["--delay", "1280"], ["--batch", "0"], ["--batch", "1025"],
                 ["--format", "srt", good], ["--format", "vtt", "-"]):
        code, out, err = call("--model", "/nowhere", *args, good)
        assert code == 2 and out == "" and "usage" in err[0], args
    for delay, expected in (([], 2400), (["--delay", "80"], 80), (["--delay", "1200"], 1200)):
        for batch in ("1", "2"):
            out = call("--model", checkpoint, "--format", "json", *delay, "--batch", batch, good)[1]
            assert json.loads(out)["delay_ms"] == expected


def test_a_batch_is_ordered_longest_together_and_whole(checkpoint, tmp_path, monkeypatch, noise):
    asked = []
    transcribe = V.transcribe

    def spy(model, tokenizer, audio, **settings):
        if not isinstance(audio, list):
            return transcribe(model, tokenizer, audio, **settings)
        asked.append([len(x) for x in audio])
        if len(asked[-1]) == 3:
            raise RuntimeError("[malloc] Unable to allocate 9 bytes.")
        return transcribe(model, tokenizer, audio, **settings)

    lengths = [8000, 30000, 4000, 60000, 16000]
    names = [tmp_path / f"{n}.wav" for n in lengths]
    for name, n in zip(names, lengths):
        name.write_bytes(encoded(noise[:n], subtype="FLOAT"))
    base = ["--model", checkpoint, *JSON]
    one_by_one = call(*base, *names)[1]
    monkeypatch.setattr(V, "transcribe", spy)
    code, out, err = call(*base, "--batch", "2", *names[:4], tmp_path / "no.wav", names[4])
    assert code == 1 and out == one_by_one and len(err) == 1
    assert asked == [[60000, 30000], [16000, 8000], [4000]]
    code, out, err = call(*base, "--batch", "3", *names[1:])
    assert code == 1 and len(err) == 3 and all("smaller --batch" in line for line in err)
    assert [json.loads(line)["duration"] for line in out.splitlines()] == [0.25]


def test_long_recordings_are_cut_where_it_is_quiet():
    rng, pauses = np.random.RandomState(0), [43.2, 51.5, 96.6, 139.0, 152.3]
    speech = rng.randn(190 * 16000).astype(np.float32) / 10
    for at in pauses:
        speech[int((at - 0.2) * 16000) : int((at + 0.2) * 16000)] /= 30
    for n in (1, 2, 3, 4, 5, 64):
        pieces = V.cut_at_pauses(speech, n)
        assert len(pieces) == min(n, 4) and np.array_equal(np.concatenate(pieces), speech)
        assert min(map(len, pieces)) >= 30 * 16000
    cuts = np.cumsum([len(piece) for piece in V.cut_at_pauses(speech, 4)])[:-1] / 16000
    # The even cuts are at 47.5, 95 and 142.5 s.
    assert np.abs(cuts - [cuts[0], 96.6, 139.0]).max() < 0.2
    assert min(abs(cuts[0] - 43.2), abs(cuts[0] - 51.5)) < 0.2
    assert [len(V.cut_at_pauses(speech[: n * 16000], 9)) for n in (1, 79, 80, 121)] == [1, 1, 2, 3]


def test_pieces_are_joined_to_one_transcript(loaded):
    tokenizer = loaded[1]
    ids = {text: next(i for i in range(1000, 1400) if tokenizer.id_to_byte_piece(i) == text)
           for text in (b"a", b" word0")}
    whole = V.Transcript(tokenizer)
    for seconds, tokens in ((0, [33, ids[b"a"]]), (30, [33, ids[b" word0"]]), (61, []),
                            (66, [33, ids[b"a"]])):
        part = V.Transcript(tokenizer)
        for k, token in enumerate(tokens):
            part.append(token, 0.08 * (k + 1))
        whole.extend(part, seconds)
    assert whole.text == "a word0a" == "".join(word.text for word in whole.words)
    assert whole.tokens == [33, ids[b"a"], 33, ids[b" word0"], 33, ids[b"a"]]
    assert [(w.start, w.end) for w in whole.words] == [
        (0, 0.08), (29.68, 30.08), (65.68, 66.08)]


def cues(text, kind):
    for cue in text.removeprefix("WEBVTT\n\n").strip().split("\n\n"):
        times, *lines = cue.split("\n")[kind == "srt" :]
        start, end = [[float(x) for x in time.replace(",", ".").split(":")]
                      for time in times.split(" --> ")]
        yield np.dot(start, [3600, 60, 1]), np.dot(end, [3600, 60, 1]), lines


@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_cues_are_whole_escaped_and_long_enough(kind):
    words = [V.Word(*word) for word in (
        ("<b>\n\nTom", 0, 0.1), (" &\x85 Anne.", 0.1, 0.2), (" No.", 0.4, 0.5),
        ("\n \u2028", 3, 3.1), (" Yes -->", 6, 6.08), (" far", 9, 9.4), (" away.", 9.4, 9.8))]
    out, subtitles = "", V.Subtitles(kind)
    for i, following in enumerate(words[1:]):
        for _ in range(2):  # a cue is complete when nothing was added to it meanwhile
            out += subtitles.update(words[: i + 1], following.end - 0.08)
    out += subtitles.update(words)
    assert out == V.Subtitles(kind).update(words)
    got = list(cues(out, kind))
    expected = ["<b> Tom & Anne.", "No.", "Yes -->", "far away."]
    if kind == "vtt":
        expected = [V.html.escape(text, quote=False) for text in expected]
    assert [" ".join(lines) for _, _, lines in got] == expected
    assert [round(end, 2) for _, end, _ in got] == [0.4, 1.23, 6.83, 9.83]
    assert "WEBVTT" not in V.Subtitles("srt").update(words)


def test_a_word_that_goes_on_is_not_cut_off():
    subtitles, word = V.Subtitles("srt"), V.Word("eins", 0, 0.4)
    out = subtitles.update([word], 1.0)
    out += subtitles.update([V.Word("einszwei", 0, 0.4)], 2.0)
    out += subtitles.update([V.Word("einszwei", 0, 0.4)], 2.1)
    assert "einszwei" in out


@pytest.mark.parametrize("option", [["--batch", "0"], ["--temperature", "-1"],
                                    ["--temperature", "nan"]])
def test_numbers_out_of_range_are_refused_in_short(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        V.parse_args([*option, "x.wav"])
    assert len(capsys.readouterr().err.splitlines()[-1]) < 120


def test_a_warning_of_a_library_is_no_fault_of_the_recording(monkeypatch):
    def load_audio(path):
        V.warnings.warn("old", DeprecationWarning, stacklevel=1)
        V.warnings.warn("cut short", stacklevel=1)

    monkeypatch.setattr(V, "load_audio", load_audio)
    writer = V.Writer("x.wav", V.parse_args(["x.wav"]))
    writer.load()
    assert list(map(str, writer.problems)) == ["cut short"]
