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
from pathlib import Path

import numpy as np
import pytest

import voxtral as V
from test_voxtral import HERE, call, distance, run

CASES = HERE.parent / "shared" / "cases"
DIGITS = HERE / ".ci" / "digits"
SHORT = "seven nine one one two 八"  # what .ci/digits/short.flac says
JSON = ("--quiet", "--format", "json")
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the odd files are not here")
needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")
places = pytest.mark.parametrize("path", [
    "/nowhere", pytest.param(os.environ["PATH"], marks=needs_ffmpeg)], ids=["alone", "ffmpeg"])


def encoded(samples, rate=16000, **kind):
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, **({"format": "WAV"} | kind))
    return file.getvalue()


def sized(wav, size):
    """A WAV whose data chunk states this size."""
    at = wav.index(b"data") + 4
    return wav[:at] + struct.pack("<I", size) + wav[at + 4 :]


def fake_ffmpeg(folder, seconds, error=""):
    """A program named ffmpeg that decodes anything to a constant, after a complaint."""
    folder.mkdir()
    script = folder / "ffmpeg"
    script.write_text(f"""#!{sys.executable}
import struct, sys
assert sys.argv[sys.argv.index("-i") + 1].startswith(("file:", "pipe:"))
sys.stderr.write({error!r})
sys.stdout.buffer.write(struct.pack("<f", 0.25) * {int(seconds * 16000)})
""")
    script.chmod(0o755)
    return str(folder)


def ffmpeg(*args):
    subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, args)], check=True)


# ------------------------------------------------------------------------------------------- files


@places
def test_files_are_read_to_their_end(tmp_path, monkeypatch, noise, path, recwarn):
    monkeypatch.setenv("PATH", path)
    x = noise[:32000]
    wav, mp3 = encoded(x), encoded(x, format="MP3")
    for name, data in {
            "riff8.wav": wav[:4] + struct.pack("<I", len(wav)) + wav[8:],
            "pipe.wav": sized(wav, 0xFFFFFFFF), "promises.wav": sized(wav, len(wav) - 44 + 16),
            "ima.wav": encoded(x, subtype="IMA_ADPCM"), "name.mp3": encoded(x, format="FLAC"),
            "plain.ogg": encoded(x, format="OGG"), "tag.mp3": mp3 + b"TAG" + b"x" * 125,
            "plain.aiff": encoded(x, format="AIFF")}.items():
        (tmp_path / name).write_bytes(data)
        samples = V.load_audio(tmp_path / name)
        assert abs(len(samples) - 32000) <= 640 and not recwarn.list, name
        samples *= 1  # the caller may change it
    (tmp_path / "left.wav").write_bytes(encoded(np.stack([x, 0 * x], 1), subtype="FLOAT"))
    assert np.abs(V.load_audio(tmp_path / "left.wav") - x / 2).max() < 1e-6  # the average
    sine = np.sin(2000 * np.arange(96000) / 48000) / 2
    (tmp_path / "sine.wav").write_bytes(encoded(np.repeat(sine[:, None], 6, 1), 48000))
    assert np.abs(V.load_audio(tmp_path / "sine.wav") - sine[::3])[800:-800].max() < 0.01


@needs_ffmpeg
def test_the_default_track_is_heard_and_time_counts_from_the_picture(tmp_path, monkeypatch):
    speech, film = DIGITS / "short.flac", tmp_path / "film.mkv"
    picture = ("-f", "lavfi", "-i", "color=s=16x16:r=5:d=9")
    ffmpeg(*picture, "-f", "lavfi", "-i", "sine=d=9", "-i", speech, "-map", 0, "-map", 1,
           "-map", 2, "-disposition:a:0", 0, "-disposition:a:1", "default", film)
    model = ("--quiet", "--dtype", "float32", "--model", DIGITS)
    assert run(*model, film)[:2] == (0, SHORT + "\n")
    ffmpeg(*picture, "-itsoffset", 3, "-i", speech, film)
    words = [json.loads(run(*model, "--format", "json", name)[1])["words"] for name in (film, speech)]
    assert [word["text"] for word in words[0]] == [word["text"] for word in words[1]]
    late = [word["end"] - true["end"] for word, true in zip(*words)]
    assert np.abs(np.array(late) - 3).max() <= 0.16
    # No film is read into memory, neither where ffmpeg decodes it nor where it is refused.
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read whole"))
    assert len(V.load_audio(film)) > 7 * 16000
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(V.VoxtralError, match=r"film\.mkv: .*ffmpeg, not installed"):
        V.load_audio(film)


@places
def test_reading_in_threads_keeps_standard_error(tmp_path, path):
    """A reader that silences descriptor 2 for a while loses it for good in two threads."""
    (tmp_path / "x.mp3").write_bytes(encoded(np.zeros(80_000), format="MP3")[:-300])
    code = """if True:
        import os, sys, threading, voxtral as V
        threads = [threading.Thread(target=V.load_audio, args=sys.argv[1:]) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        os.write(2, b"still here")"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.mp3"], capture_output=True,
                          check=True, env={**os.environ, "PATH": path, "PYTHONPATH": str(HERE)})
    assert done.stderr.endswith(b"still here")


def test_other_names_and_places(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", fake_ffmpeg(tmp_path / "bin", 2.0))
    for name in ("-x:y.m4a", "a b\n\N{STUDIO MICROPHONE}é.webm", "http:x"):
        (tmp_path / name).write_bytes(bytes(100))
        assert len(V.load_audio(name)) == 32000
    os.mkfifo("fifo")
    socket.socket(socket.AF_UNIX).bind("socket")
    for name in ("fifo", "socket", os.devnull):
        code, out, err = call("--model", checkpoint, "--quiet", name)
        assert (code, out, len(err)) == (1, "", 1) and "python voxtral.py -" in err[0]
    odd = os.fsdecode(b"caf\xe9.wav")  # not UTF-8
    (tmp_path / odd).write_bytes(bytes(100))
    for place in ([], ["--output-dir", "out"]):
        code, out, err = call("--model", checkpoint, *JSON, *place, odd)
        text = out or (tmp_path / "out" / (odd[:-3] + "json")).read_text()
        assert (code, err) == (0, []) and json.loads(text)["file"] == odd


def test_what_ffmpeg_says_is_passed_on(checkpoint, tmp_path, monkeypatch):
    x = tmp_path / "x.mp3"
    x.touch()
    monkeypatch.setenv("PATH", fake_ffmpeg(tmp_path / "a", 2, "Header missing\nmore\n"))
    for batch in ("1", "2"):  # it complains about whole files, too: this is no failure
        code, out, err = call("--model", checkpoint, *JSON, "--batch", batch, x)
        assert code == 0 and json.loads(out)["duration"] == 2
        assert err == [f"voxtral.py: {x}: Header missing"]
    monkeypatch.setenv("PATH", fake_ffmpeg(tmp_path / "b", 0, f"file:{x}: No\n"))
    with pytest.raises(V.VoxtralError, match=r"^/[^:]*x\.mp3: No$"):
        V.load_audio(x)


@places
def test_what_is_no_sound_is_one_line_and_stops_nothing(checkpoint, tmp_path, monkeypatch, path,
                                                        noise):
    monkeypatch.setenv("PATH", path)
    wav = encoded(noise[:4000])
    files = {  # name: content, what the line must say besides the name
        "text.wav": (b"hello, this is text", ""), "m4a.m4a": (b"\0\0\0\x20ftypM4A ", ""),
        "empty.wav": (b"", ""), "none.wav": (encoded(noise[:0]), ""), "head.wav": (wav[:30], ""),
        "nan.wav": (encoded(np.array([0, np.nan]), subtype="FLOAT"), "NaN"),
        "int.wav": (encoded(noise[:4000] * 32767, subtype="FLOAT"), "int16")}
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.wav").write_bytes(wav)
    (tmp_path / "folder").mkdir()
    names = [*(tmp_path / name for name in files), tmp_path / "folder", "", "x" * 5000]
    for batch in ("1", "4"):
        code, out, err = call("--model", checkpoint, *JSON, "--batch", batch, *names,
                              tmp_path / "good.wav")
        assert code == 1 and json.loads(out)["duration"] == 0.25 and len(err) == len(names)
        for name, (_, says) in files.items():
            assert any(f"{name}: " in line and says in line for line in err), (name, err)
    code, out, err = call("--model", "/nowhere", *names[-2:])  # said before the model is loaded
    assert (code, out, len(err)) == (1, "", 1) and "no such file" in err[0]


@needs_cases
@places
def test_files_that_people_have(path):
    M = ("one one four nine 八 three three seven nine nine nine five seven four two one six zéro six"
         " six six")
    says = dict.fromkeys(["riff8.wav", "ima.wav", "sz0.wav", "noeos.opus", "s.m4a", "s.webm"], SHORT)
    says |= {"nx8.mp3": M, "pipedv.mp3": M, "chain.ogg": f"{SHORT} {M}"}
    command = ["--quiet", "--dtype", "float32", "--delay", "480", "--model", DIGITS]
    for name, by_pipe in [(name, by_pipe) for name in says for by_pipe in (False, True)]:
        args = {"stdin": (CASES / name).read_bytes()} if by_pipe else {}
        code, out, err = run(*command, "-" if by_pipe else CASES / name,
                             env={**os.environ, "PATH": path}, **args)
        words = says[name].split()
        if path != "/nowhere":
            assert code == 0 and distance(out.split(), words) <= 1, (name, out)
        elif code:
            assert (code, out, len(err.splitlines())) == (1, "", 1), (name, err)
        else:  # the first of joined files, or the whole
            assert distance(out.split(), words[: len(out.split())]) <= 1, (name, out)


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


@pytest.mark.parametrize("kind,place", [("text", False), ("srt", False), ("json", False),
                                        ("text", True)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_what_was_heard(checkpoint, tmp_path, noise, kind, place, number):
    """With its end written, also where a thread, or ffmpeg, had the last piece in its hands."""
    args = ("--format", kind, *(("--output-dir", tmp_path) if place else ()))
    whole = run("--quiet", "--model", checkpoint, "--format", kind, "-", stdin=pcm_of(noise))[1]
    program = start(checkpoint, *args)
    program.stdin.write(pcm_of(noise))
    program.stdin.flush()
    wait_until_read(program)
    program.send_signal(number)
    out, err = program.stdout.read().decode(), program.stderr.read()  # the pipe is still open
    assert (program.wait(60), err) == (130, b"")
    out = (tmp_path / "stdin.txt").read_text() if place else out
    if kind == "srt":  # where its cues are cut depends on what arrived together
        assert out.endswith("\n\n") and out.split()[-1] == whole.split()[-1]
    else:
        assert out == whole


def test_nohup_and_a_signal_before_any_sound(checkpoint, noise):
    program = start(checkpoint, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    program.stdin.write(pcm_of(noise))
    program.stdin.flush()
    wait_until_read(program)
    program.send_signal(signal.SIGHUP)
    assert program.communicate(timeout=60)[1] == b"" and program.returncode == 0
    program = start(checkpoint)
    time.sleep(4)
    program.send_signal(signal.SIGINT)
    assert (program.communicate(timeout=60), program.returncode) == ((b"", b""), 130)


def test_a_second_signal_leaves_at_once(checkpoint, monkeypatch, tmp_path, noise):
    def finish(stream):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    read, write = os.pipe()
    os.write(write, pcm_of(noise[:16000]))
    os.close(write)
    saved = os.dup(0)
    monkeypatch.setattr(V.Stream, "finish", finish)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    try:
        os.dup2(read, 0)
        assert call("--model", checkpoint, "--output-dir", tmp_path / "out", "-") == (130, "", [])
    finally:
        os.dup2(saved, 0)
    assert list((tmp_path / "out").iterdir()) == []


@places
def test_streams_of_any_form(checkpoint, noise, path):
    env = {**os.environ, "PATH": path}
    pcm, x = pcm_of(noise[:16000]), noise[:16000]
    wav = encoded(np.frombuffer(pcm, "<i2"))
    at = wav.index(b"data")
    info = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.16.100\0"
    same = [pcm, pcm + b"x", wav, sized(wav, 0), wav[:at] + info + sized(wav[at:], 0xFFFFFFFF)]
    results = [run("--model", checkpoint, *JSON, "-", stdin=data, env=env) for data in same]
    assert all((code, err) == (0, "") for code, _, err in results), results
    records = [json.loads(out) for _, out, _ in results]
    assert records == records[:1] * len(same) and records[0]["delay_ms"] == 480
    other = [encoded(x, 48000, subtype="PCM_24"), encoded(x, format="OGG"), encoded(x, format="MP3")]
    for data, seconds in zip(other, (1 / 3, 1, 1)):
        code, out, err = run("--model", checkpoint, *JSON, "-", stdin=data, env=env)
        if path == "/nowhere":
            assert (code, out, len(err.splitlines())) == (1, "", 1) and "ffmpeg" in err
        else:
            assert code == 0 and abs(json.loads(out)["duration"] - seconds) < 0.06
    for data in (b"", b"x", b"hello, hello, hello"):
        code, out, err = run("--model", checkpoint, "--quiet", "-", stdin=data, env=env)
        assert (code, out) == (1, "") and "standard input: n" in err.splitlines()[-1]


def test_closed_and_full_streams(checkpoint, tmp_path, noise):
    x = tmp_path / "x.wav"
    x.write_bytes(encoded(noise))
    base = f"{sys.executable} {HERE / 'voxtral.py'} --quiet --model {checkpoint} --format json"
    full = "voxtral.py: standard output: No space left.*\n"
    for command, code, out, err in (
            (f"{base} - <&-", 1, "", "voxtral.py: standard input: closed.*\n"),
            (f"{base} {x} >&-", 1, "", "voxtral.py: standard output is closed\n"),
            (f"{base} {x} 2>&-", 0, "{.*}\n", ""), (f"{base} {x} <&-", 0, "{.*}\n", ""),
            (f"{base} {x} {x} {x} | head -c 1", 0, "{", "voxtral.py: standard output was closed\n"),
            (f"{base} {x} {x} > /dev/full", 1, "", f"({full})+")):
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
    (tmp_path / "kept" / "a.txt").mkdir(parents=True)  # in the way of a file
    code, out, err = call(*base, "text", "--output-dir", tmp_path / "kept", *names)
    assert code == 1 and len(err) == 1 and str(tmp_path / "kept" / "a.txt") in err[0]
    assert (tmp_path / "kept" / "b.c.txt").read_text()
    (tmp_path / "z").mkdir()
    twice = [names[0], names[1], tmp_path / "z" / "a.flac"]
    code, _, err = call(*base, "text", "--output-dir", tmp_path / "q", *twice)
    assert code == 2 and f"{names[0]} and {twice[2]} would both" in err[-1]
    assert not (tmp_path / "q").exists()


def test_usage(checkpoint, tmp_path, noise):
    good = tmp_path / "x.wav"
    good.write_bytes(encoded(noise[:8000]))
    for args in (["--delay", "100"], ["--batch", "0"], ["--format", "srt", good], ["--bits", "4"],
                 ["--temperature", "nan"], ["--convert", "x"]):
        code, out, err = call("--model", "/nowhere", *args, good)
        assert code == 2 and out == "" and "usage" in err[0] and len(err[-1]) < 160, args
    for delay, expected in (([], 2400), (["--delay", "80"], 80)):
        for batch in ("1", "2"):
            out = call("--model", checkpoint, *JSON, *delay, "--batch", batch, good)[1]
            assert json.loads(out)["delay_ms"] == expected


def test_a_batch_is_ordered_longest_together_and_written_when_done(checkpoint, tmp_path, noise,
                                                                   monkeypatch):
    asked = []
    transcribe = V.transcribe

    def spy(model, tokenizer, audio, **settings):
        asked.append([len(x) for x in audio])
        if wrong and len(asked[-1]) < 2:
            raise wrong
        return transcribe(model, tokenizer, audio, **settings)

    lengths = [8000, 30000, 4000, 60000, 16000]
    names = [tmp_path / f"{n}.wav" for n in lengths]
    for name, n in zip(names, lengths):
        name.write_bytes(encoded(noise[:n], subtype="FLOAT"))
    base = ["--model", checkpoint, *JSON]
    one_by_one = call(*base, *names)[1]
    monkeypatch.setattr(V, "transcribe", spy)
    wrong = None
    code, out, err = call(*base, "--batch", "2", *names[:4], tmp_path / "no.wav", *names[4:] * 2)
    assert code == 1 and out == one_by_one and len(err) == 1
    assert asked == [[60000, 30000], [16000, 8000], [4000]]
    wrong = RuntimeError("[malloc] Unable to allocate 9 bytes.")
    code, out, err = call(*base, "--batch", "2", *names)
    assert code == 1 and len(err) == 1 and "4000.wav" in err[0] and "smaller --batch" in err[0]
    assert [json.loads(line)["duration"] for line in out.splitlines()] == [0.5, 1.875, 3.75, 1.0]
    wrong = KeyboardInterrupt
    code, out, err = call(*base, "--batch", "2", "--output-dir", tmp_path / "out", *names)
    assert (code, out, err) == (130, "", [])
    done = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert sorted(done) == ["16000.json", "30000.json", "60000.json", "8000.json"]
    assert [done["8000.json"]] == [json.loads(line) for line in one_by_one.splitlines()][:1]


def test_long_recordings_are_cut_where_it_is_quiet():
    speech = np.random.RandomState(0).randn(190 * 16000).astype(np.float32) / 10
    for at in (43.2, 51.5, 96.6, 139.0, 152.3):
        speech[int((at - 0.2) * 16000) : int((at + 0.2) * 16000)] /= 30
    for n in (1, 2, 4, 64):
        pieces = V.cut_at_pauses(speech, n)
        assert len(pieces) == min(n, 4) and np.array_equal(np.concatenate(pieces), speech)
        assert min(map(len, pieces)) >= 30 * 16000 and all(len(x) % 1280 == 0 for x in pieces[:-1])
    cuts = np.cumsum([len(piece) for piece in V.cut_at_pauses(speech, 4)])[:-1] / 16000
    assert min(abs(cuts[0] - 43.2), abs(cuts[0] - 51.5)) < 0.2  # the even cut is at 47.5
    assert np.abs(cuts[1:] - [96.6, 139.0]).max() < 0.2


class Grown:
    """A transcript that has these words, all of them up to `until` seconds."""

    def __init__(self, words, until=np.inf):
        self.words, self.until = words, until


def cues(text, kind):
    for cue in text.removeprefix("WEBVTT\n\n").strip().split("\n\n"):
        times, *lines = cue.split("\n")[kind == "srt" :]
        start, end = [[float(x) for x in time.replace(",", ".").split(":")]
                      for time in times.split(" --> ")]
        yield np.dot(start, [3600, 60, 1]), np.dot(end, [3600, 60, 1]), " ".join(lines)


@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_cues_are_whole_escaped_and_long_enough(kind):
    words = [V.Word(*word) for word in (
        ("<b>\n\nTom", 0, 0.1), (" &\x85 Anne.", 0.1, 0.2), (" No.", 0.4, 0.5),
        (" Yes -->", 6, 6.08), (" far", 9, 9.4), (" away.", 9.4, 9.8))]
    live = [Grown(words[: i + 1], words[i + 1].end - 0.08) for i in range(5)]
    out = "".join(V.subtitles([*live, Grown(words)], kind))
    assert out == "".join(V.subtitles([Grown(words)], kind))
    got = list(cues(out, kind))
    expected = ["<b> Tom & Anne.", "No.", "Yes -->", "far away."]
    escaped = [text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
               for text in expected]
    assert [text for _, _, text in got] == (escaped if kind == "vtt" else expected)
    assert [round(end, 2) for _, end, _ in got] == [0.4, 1.23, 6.83, 9.83]
    assert out.startswith("WEBVTT\n\n") == (kind == "vtt")
    word = V.Word("eins", 0, 0.4)  # it goes on: the model has begun to write it
    live = [Grown([word], 1.0), Grown([V.Word("einszwei", 0, 0.4)], 2.1)]
    assert "einszwei" in "".join(V.subtitles(live, kind))
    assert "".join(V.subtitles([Grown([])], kind)) == ("WEBVTT\n\n" if kind == "vtt" else "")
