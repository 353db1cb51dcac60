"""Try server.py with OpenAI's client and with web sockets: python .ci/try_server.py

    pip install fastapi uvicorn python-multipart websockets openai

It starts the server with the checkpoint of .ci/digits on a free port of this machine, prints a line
for each thing that it tries, and exits with 1 if something is wrong. It takes half a minute.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import wave
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import SHUT_RDWR, socket
from typing import Any

import numpy as np
import openai
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK, InvalidStatus
from websockets.sync.client import connect

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / ".ci" / "digits"
LIMIT = 30  # seconds that anything may take
sys.path.insert(0, str(ROOT))
import voxtral as V

os.environ["NO_PROXY"] = "127.0.0.1"


class Server:
    """server.py in a process of its own."""

    def __init__(self) -> None:
        with socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, str(ROOT / ".ci/server.py"), "--model", str(DIGITS), "--port",
                   str(port)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.output,
                                        stderr=subprocess.STDOUT)
        self.client = openai.OpenAI(base_url=f"http://{self.address}/v1", api_key="none",
                                    timeout=LIMIT, max_retries=0)
        wait_until(lambda: "running on" in self.log() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log()

    def log(self) -> str:
        return os.pread(self.output.fileno(), 1 << 20, 0).decode()

    def post(self, file: Any, **options: Any) -> Any:
        """Transcribe a file, by its path or as (name, bytes)."""
        return self.client.audio.transcriptions.create(file=file, model="any", **options)

    def connect(self, delay_ms: int) -> Any:
        return connect(f"ws://{self.address}/v1/stream?delay_ms={delay_ms}",
                       open_timeout=LIMIT, close_timeout=LIMIT)

    def works(self, seconds: float = 0.5) -> bool:
        """Whether it takes processor time. Only Linux tells; elsewhere the log must do."""
        def taken() -> int:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
            return sum(map(int, stat.rpartition(")")[2].split()[11:13]))  # hundredths of a second

        if sys.platform != "linux":
            return False
        before = taken()
        time.sleep(seconds)
        return taken() - before > 20 * seconds

    def interrupt(self) -> str:
        """Ctrl-C; returns how it ended."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(LIMIT)
        seconds = time.monotonic() - start
        assert code in (0, 130) and "Traceback" not in self.log(), f"{code}: {self.log()}"
        left = list(Path(tempfile.gettempdir()).glob("*/upload"))
        assert not left, left
        return f"exit code {code} in {seconds:.1f} s, no traceback, no upload is left"


def wait_until(condition: Callable[[], bool]) -> float:
    """Wait for something; returns the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + LIMIT, "waited in vain"
        time.sleep(0.02)
    return time.monotonic() - start


def raw(name: str) -> np.ndarray:
    """The 16-bit samples of a clip."""
    return np.round(V.load_audio(DIGITS / name) * 32768).astype("<i2")


def wav(samples: np.ndarray) -> tuple[str, bytes]:
    """16-bit samples as a file to upload."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, V.SAMPLE_RATE, 0, "NONE", ""))
        out.writeframes(samples.tobytes())
    return "long.wav", file.getvalue()


SHORT, PAUSE, STEREO = (DIGITS / x for x in ("short.flac", "pause.flac", "stereo44k.ogg"))
model, tokenizer, _ = V.load_voxtral_model(DIGITS)
truth = {path: V.transcribe(model, tokenizer, V.load_audio(path)) for path in (SHORT, STEREO)}
expected = json.loads((DIGITS / "expected.json").read_text())
long = wav(np.tile(raw("pause.flac"), 30))  # 10 minutes


def formats(server: Server) -> str:
    done = truth[SHORT]
    assert server.post(SHORT).text == done.text == expected[SHORT.name]["2400"]["text"]
    assert server.post(SHORT, response_format="text", temperature=0) == done.text
    for kind in ("srt", "vtt"):
        says = server.post(SHORT, response_format=kind)
        assert says == V.subtitles(done.words, kind) and "-->" in says, says
    says = server.post(SHORT, response_format="verbose_json", timestamp_granularities=["word"])
    assert (says.text, says.duration, says.task) == (done.text, 5.0, "transcribe"), says
    assert says.language == "unknown", says
    theirs = [(word.word, word.start, word.end, word.probability) for word in says.words]
    ours = [(word.text.strip(), word.start, word.end, word.probability) for word in done.words]
    assert theirs == ours, theirs
    return f"json, text, srt, vtt and verbose_json say: {done.text}"


def deltas(server: Server) -> str:
    *events, done = server.post(STEREO, stream=True)
    assert {event.type for event in events} == {"transcript.text.delta"}, events
    assert done.type == "transcript.text.done", done
    pieces = [event.delta for event in events if event.delta]
    assert "".join(pieces) == done.text == truth[STEREO].text and len(pieces) > 3, pieces
    return f"{len(pieces)} pieces; joined they are the text, {done.text}"


def several_files(server: Server) -> str:
    paths = [SHORT, STEREO, SHORT]
    with ThreadPoolExecutor(len(paths)) as pool:
        texts = [answer.text for answer in pool.map(server.post, paths)]
    assert texts == [truth[path].text for path in paths], texts
    return f"{len(paths)} at once, each has its own text"


def sockets(server: Server) -> str:
    def talk(path: Path, delay_ms: int, size: int, end: str) -> tuple[int, str]:
        """Send a clip in messages of `size` bytes: the text, and how much came before the end."""
        data = raw(path.name).tobytes()
        with server.connect(delay_ms) as client:
            for i in range(0, len(data), size):
                client.send(data[i : i + size])
            text = client.recv(LIMIT)
            early = len(text)
            client.send(end)
            try:
                while True:
                    text += client.recv(LIMIT)
            except ConnectionClosedOK:
                return early, text

    stream = V.Stream(model, tokenizer, delay_ms=480)
    ours = stream.feed(raw(SHORT.name)) + stream.finish()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(talk, SHORT, 480, 4001, "end")
        two = pool.submit(talk, PAUSE, 160, 12_345, "")
        early, text = one.result()
        assert early > 0 and text == ours == expected[SHORT.name]["480"]["text"], text
        early, text = two.result()
        assert early > 0 and text == expected[PAUSE.name]["160"]["text"], text
    return "2 at once, in messages of 4001 and 12345 bytes: the texts of Stream"


def bad_requests(server: Server) -> str:
    for name, data in (("talk.mp3", b"this is no sound\n" * 99), ("empty.wav", b"")):
        try:
            server.post((name, data))
        except openai.BadRequestError as error:
            body: Any = error.body
            message = body["message"]
            assert body["type"] == "invalid_request_error" and "\n" not in message, message
            assert not message.startswith(tempfile.gettempdir()), message
        else:
            raise AssertionError(f"{name} is no bad file")
    try:
        server.connect(delay_ms=90)
    except InvalidStatus as error:
        assert error.response.status_code == 400 and b"delay_ms is 90" in error.response.body
    else:
        raise AssertionError("delay_ms=90 is taken")
    return f"400 for files without sound ({message}), and for delay_ms=90"


def hang_up_on_file(server: Server) -> str:
    try:
        server.post(long, timeout=2)
    except openai.APITimeoutError:
        seconds = wait_until(lambda: "client gone" in server.log())
    else:
        raise AssertionError("10 minutes were done in 2 s")
    said = next(line for line in server.log().splitlines() if "client gone" in line)
    assert wait_until(lambda: not server.works()) < 5
    return f"the log says {said!r} {seconds:.1f} s later, and the server is idle"


def hang_up_on_deltas(server: Server) -> str:
    events = server.post(long, stream=True)
    next(event for event in events if event.delta)
    busy = server.works() or sys.platform != "linux"
    events.close()
    seconds = wait_until(lambda: not server.works())
    assert busy and seconds < 5, (busy, seconds)
    return f"at the first word; the server is idle within {seconds:.1f} s"


def hang_up_on_socket(server: Server) -> str:
    with server.connect(delay_ms=480) as client:
        for i in range(0, 1 << 18, 1 << 14):  # 8 s
            client.send(long[1][i : i + (1 << 14)])
        client.recv(LIMIT)
        client.socket.shutdown(SHUT_RDWR)
    seconds = wait_until(lambda: not server.works())
    assert server.post(SHORT).text == truth[SHORT].text
    assert "Traceback" not in server.log(), server.log()
    return f"at the first word; the server is idle within {seconds:.1f} s, and serves the next"


def ctrl_c_at_work(server: Server) -> str:
    begun = threading.Event()

    def file() -> int:
        try:
            return len(server.post(long).text)
        except openai.InternalServerError as error:
            return error.status_code

    def deltas() -> str:
        kinds = []
        for event in server.post(long, stream=True):
            begun.set()
            kinds.append(event.type)
        return kinds[-1]

    with ThreadPoolExecutor(2) as pool, server.connect(delay_ms=480) as client:
        client.send(raw(SHORT.name).tobytes())
        client.recv(LIMIT)
        answers: Any = [pool.submit(file), pool.submit(deltas)]
        assert begun.wait(LIMIT)
        time.sleep(1)
        ended = server.interrupt()
        says = [answer.result(LIMIT) for answer in answers]
        assert says == [503, "transcript.text.delta"], says  # and not transcript.text.done
        try:
            while True:
                client.recv(LIMIT)
        except ConnectionClosed as error:
            assert error.rcvd and error.rcvd.code == 1012, error
    return f"{ended}; nobody takes half a text for a whole one"


def ctrl_c_at_rest(server: Server) -> str:
    assert server.post(SHORT).text == truth[SHORT].text
    return server.interrupt()


def main() -> int:
    start = time.monotonic()
    failed = 0
    first, second = Server(), Server()
    checks = [(check, first) for check in (
        formats, deltas, several_files, sockets, bad_requests, hang_up_on_file, hang_up_on_deltas,
        hang_up_on_socket, ctrl_c_at_work)] + [(ctrl_c_at_rest, second)]
    try:
        for check, server in checks:
            name = check.__name__.replace("_", " ")
            began = time.monotonic()
            try:
                says = check(server)
                print(f"ok {time.monotonic() - began:4.1f} s  {name}: {says}", flush=True)
            except Exception as error:
                failed += 1
                where = traceback.extract_tb(error.__traceback__)
                print(f"FAILED     {name}: {type(error).__name__} {error}",
                      *(f"line {frame.lineno}" for frame in where if frame.filename == __file__))
    finally:
        for server in (first, second):
            server.process.kill()
    print(f"{len(checks) - failed} passed, {failed} failed in {time.monotonic() - start:.0f} s")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
