"""An example. pip install fastapi uvicorn python-multipart websockets; python .ci/server.py --help

Files go to POST /v1/audio/transcriptions as OpenAI's clients send them. The web socket /v1/stream
takes raw 16-bit samples, mono, 16 kHz, and answers with text; a text message asks for the rest.
"""
import argparse
import json
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from anyio import from_thread, to_thread
from fastapi import FastAPI, File, Form, HTTPException, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from uvicorn import Config, Server

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import voxtral as V

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=V.DEFAULT_MODEL_ID, help="folder or hub id")
parser.add_argument("--port", default=8000, type=int)
args = parser.parse_args()
model, tokenizer, _ = V.load_voxtral_model(args.model)
app = FastAPI()
server = Server(Config(app, "127.0.0.1", args.port, ws_ping_timeout=None))  # pongs may be late
Format = Literal["json", "text", "srt", "vtt", "verbose_json"]


@app.exception_handler(V.VoxtralError)
async def refuse(request: Any, error: Exception) -> JSONResponse:
    message = str(error).rpartition("upload: ")[2]  # without the path of the temporary file
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, 400)


@app.post("/v1/audio/transcriptions")  # it is not async, so FastAPI calls it in a thread
def post(request: Request, file: bytes = File(), temperature: float = Form(0.0),
         stream: bool = Form(False), form: Format = Form("json", alias="response_format")) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "upload").write_bytes(file)
        samples = V.load_audio(Path(folder, "upload"))

    def check(seconds: float) -> None:  # what it raises ends the work
        if server.should_exit or from_thread.run(request.is_disconnected):
            print(f"client gone after {seconds:.1f} s were decoded", file=sys.stderr)
            raise HTTPException(503)

    def events() -> Any:  # FastAPI asks for the next one until the client hangs up
        for piece in [*np.split(samples, range(16 * V.STEP, len(samples), 16 * V.STEP)), None]:
            if server.should_exit:
                return
            text = live.finish() if piece is None else live.feed(piece)
            yield f"data: {json.dumps({'type': 'transcript.text.delta', 'delta': text})}\n\n"
        yield f"data: {json.dumps({'type': 'transcript.text.done', 'text': live.text})}\n\n"

    if stream:
        live = V.Stream(model, tokenizer, delay_ms=2400, temperature=temperature)
        return StreamingResponse(events(), media_type="text/event-stream")
    done = V.transcribe(model, tokenizer, samples, temperature=temperature, progress=check)
    if form in ("text", "srt", "vtt"):
        return PlainTextResponse(done.text if form == "text" else V.subtitles(done.words, form))
    more = {"task": "transcribe", "language": "unknown", "duration": len(samples) / V.SAMPLE_RATE,
            "words": [{"word": word.text.strip()} | vars(word) for word in done.words]}
    return {"text": done.text} | (more if form == "verbose_json" else {})


@app.websocket("/v1/stream")
async def listen(socket: WebSocket, delay_ms: int = 480) -> None:
    stream = await to_thread.run_sync(lambda: V.Stream(model, tokenizer, delay_ms=delay_ms))
    await socket.accept()
    half = b""  # of a sample: a message may end inside of one
    with suppress(WebSocketDisconnect):
        while (message := await socket.receive()).get("bytes") is not None:
            data = half + message["bytes"]
            samples = np.frombuffer(data, "<i2", len(data) // 2)
            half = data[samples.nbytes :]
            if text := await to_thread.run_sync(stream.feed, samples):
                await socket.send_text(text)
        if message["type"] == "websocket.receive":
            await socket.send_text(await to_thread.run_sync(stream.finish))
            await socket.close()


with suppress(KeyboardInterrupt):
    server.run()
os._exit(0)  # MLX 0.32 may abort a process that ends right after its threads
