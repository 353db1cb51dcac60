"""Quantised and converted checkpoints, a small hub to download from, and damaged folders."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_flatten

import voxtral as V
from test_voxtral import (
    HERE,
    LAYOUTS,
    call,
    config,
    equal,
    make_model,
    their_names,
    write,
    write_tekken,
)

MODES = {  # name: for nn.quantize; a decoder of dim 64 has groups of 16, 32 and 64
    "2 bits": {"bits": 2}, "3 bits": {"bits": 3}, "4 bits": {"bits": 4}, "5 bits": {"bits": 5},
    "6 bits": {"bits": 6}, "8 bits": {"bits": 8}, "groups of 32": {"group_size": 32},
    "mxfp4": {"mode": "mxfp4"}, "mxfp8": {"mode": "mxfp8"}, "nvfp4": {"mode": "nvfp4"},
}


def quantised(mode):
    """The seeded model, quantised where a group fits; "mixed": each layer in its own way."""
    model = make_model()
    ways = list(MODES.values())
    count = iter(range(10**6))

    def way(_, part):
        kwargs = dict(ways[next(count) % len(ways)] if mode == "mixed" else MODES[mode])
        fits = hasattr(part, "to_quantized") and part.weight.shape[-1] % 64 == 0
        return kwargs if fits else False

    nn.quantize(model, class_predicate=way)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [*MODES, "mixed"])
def test_any_quantisation_loads_in_any_layout(tmp_path, layout, mode):
    expected = quantised(mode)
    wrong = {"group_size": 128, "bits": 7}  # what is said is not asked
    said = {"4 bits": {"quantization": wrong}, "mixed": {"quantization_config": wrong}}
    folder = write(tmp_path / "model", layout, expected, **said.get(mode, {}))
    assert equal(V.load_voxtral_model(folder)[0], expected)
    half = dict(tree_flatten(V.load_voxtral_model(folder, "bfloat16")[0].parameters()))
    assert {w.dtype for w in half.values()} <= {mx.bfloat16, mx.uint32, mx.uint8}


@pytest.mark.parametrize("mode", ["6 bits", "mxfp4", "nvfp4"])
def test_a_quantised_checkpoint_transcribes_as_in_memory(tmp_path, noise, mode):
    model, tokenizer, _ = V.load_voxtral_model(write(tmp_path, "transformers", quantised(mode)))
    got, expected = (V.transcribe(m, tokenizer, noise[:16000]) for m in (model, quantised(mode)))
    assert got.tokens == expected.tokens and len(got.tokens) > 10


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub of one repository: `folder`; it logs what it is asked, and cuts the first weights."""

    folder = log = None

    def do_HEAD(self):
        name = self.path.split("?")[0].removeprefix(f"/{V.DEFAULT_MODEL_ID}/resolve/{'0' * 40}/")
        api = f"/api/models/{V.DEFAULT_MODEL_ID}"
        if self.path.startswith(api):
            files = sorted(path for path in self.folder.iterdir())
            info = {"id": V.DEFAULT_MODEL_ID, "sha": "0" * 40,
                    "siblings": [{"rfilename": path.name} for path in files]}
            tree = [{"type": "file", "path": path.name, "size": path.stat().st_size,
                     "oid": hashlib.sha1(path.read_bytes()).hexdigest()} for path in files]
            data = json.dumps(tree if "/tree/" in self.path else info).encode()
        elif (self.folder / name).is_file() and "/" not in name:
            data = (self.folder / name).read_bytes()
        elif status := re.match(r"/api/models/status/(\d+)", self.path):
            return self.answer(int(status[1]), b"", {})
        else:
            gated = "gated" in self.path
            why = {"X-Error-Code": "GatedRepo" if gated else "RepoNotFound"}
            return self.answer(403 if gated else 404, b"", why)
        first = int((self.headers["Range"] or "bytes=0-")[6:].split("-")[0])
        self.log.append((self.command, self.path.split("/")[-1], first))
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self.answer(206 if first else 200, data[first:], headers)

    do_GET = do_HEAD

    def answer(self, code, data, headers):
        self.send_response(code)
        for key, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        cut = code == 200 and self.path.endswith("model.safetensors")  # in the middle, once
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "hub").mkdir()
    handler = type("ThisHub", (Hub,), {"folder": tmp_path / "hub", "log": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    with contextlib.suppress(OSError):
        server.shutdown()
        server.server_close()


def download(hub, name=V.DEFAULT_MODEL_ID):
    """What a process of its own prints that loads a model: the folder, or one line of error."""
    code = ("import sys, voxtral as V, huggingface_hub.constants as C\n"
            "C.DOWNLOAD_CHUNK_SIZE = 1000  # 10 MB: what is lost where a download is cut\n"
            "try: V.load_voxtral_model(sys.argv[1]); "
            "print(V.download_weights(sys.argv[1]))\nexcept V.VoxtralError as e: print(e)")
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
           "HF_HOME": str(hub.RequestHandlerClass.folder.parent / "cache"), "HF_HUB_OFFLINE": "0",
           "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", code, name], env=env, capture_output=True,
                          text=True, timeout=120, check=True)
    return done.stdout.strip()


def fetched(hub):
    """The weights that were sent since the last question, and from which byte on."""
    log = hub.RequestHandlerClass.log
    sent = [(name, first) for how, name, first in log if how == "GET" and "safetensors" in name
            and not name.endswith(".json")]
    log.clear()
    return sorted(sent)


def test_the_default_model_is_downloaded_once_and_resumed(hub, tmp_path):
    write(tmp_path / "hub", "converted", quantised("6 bits"))
    (tmp_path / "hub" / "README.md").write_text("not needed")
    folder = Path(download(hub))
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "tekken.json"}
    half = (tmp_path / "hub" / "model.safetensors").stat().st_size // 2
    assert fetched(hub) == [("model.safetensors", 0), ("model.safetensors", half // 1000 * 1000)]
    assert download(hub) == str(folder) and fetched(hub) == []
    hub.shutdown()
    hub.server_close()
    assert download(hub) == str(folder)  # the hub is gone
    missing = download(hub, "nobody/nothing")
    assert missing.startswith("nobody/nothing: no such folder") and "Connection refused" in missing
    assert len(missing) <= 300 and "\n" not in missing


def test_one_set_of_weights_and_all_shards_are_downloaded(hub, tmp_path):
    write(tmp_path / "hub", "transformers", make_model())
    write(tmp_path / "hub", "original", make_model())
    assert Path(download(hub)).is_dir()
    assert fetched(hub) == [("consolidated.safetensors", 0)]
    for path in (tmp_path / "hub").iterdir():
        path.unlink()
    shutil.rmtree(tmp_path / "cache")
    sharded(tmp_path / "hub")
    assert Path(download(hub)).is_dir()
    assert fetched(hub) == [(f"model-{i}.safetensors", 0) for i in range(3)]


def test_what_cannot_be_downloaded_is_one_line(hub, tmp_path):
    """Another model is refused before its weights are fetched."""
    (tmp_path / "hub" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "hub" / "model.safetensors").write_bytes(bytes(100))
    reasons = {V.DEFAULT_MODEL_ID: "a llama model", "no/such/folder": "Repo id must be",
               "some/gated": "403 Client Error. Cannot access gated repo",
               "nobody/nothing": "404 Client Error. Repository Not Found"}
    for status in (401, 403, 429, 500):  # not to be told as if there were no network
        reasons[f"status/{status}"] = f"{status} "
    for name, why in reasons.items():
        line = download(hub, name)
        assert line.startswith(f"{name}: no such folder, and no Voxtral") and why in line, line
        assert "\n" not in line and len(line) <= 300
    assert fetched(hub) == []


def sharded(folder):
    weights, index = sorted(tree_flatten(make_model().parameters())), {}
    for i in range(3):
        mx.save_safetensors(str(folder / f"model-{i}.safetensors"), dict(weights[i::3]))
        index |= {name: f"model-{i}.safetensors" for name, _ in weights[i::3]}
    (folder / "config.json").write_text(json.dumps(config()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    write_tekken(folder)


def test_a_lost_shard_is_named(tmp_path):
    """In a folder with a name as long as those of the hub's cache."""
    folder = tmp_path / "models--mlx-community--Voxtral-Mini-4B-Realtime-6bit" / ("0" * 40)
    folder.mkdir(parents=True)
    sharded(folder)
    assert equal(V.load_voxtral_model(folder)[0], make_model())
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(V.VoxtralError, match="model-1.safetensors"):
        V.load_voxtral_model(folder)


def test_one_set_of_weights_is_read(tmp_path):
    """Not a copy beside it; and where it is not clear which one, it is said."""
    sharded(tmp_path)
    other = make_model(seed=1)
    other.save_weights(str(tmp_path / "model.old.safetensors"))
    assert equal(V.load_voxtral_model(tmp_path)[0], make_model())
    (tmp_path / "model.safetensors.index.json").unlink()
    for i in range(3):
        (tmp_path / f"model-{i}.safetensors").rename(tmp_path / f"model-{i}-of-3.safetensors")
    assert equal(V.load_voxtral_model(tmp_path)[0], make_model())
    other.save_weights(str(tmp_path / "model-1-of-1.safetensors"))
    with pytest.raises(V.VoxtralError, match="comes twice"):
        V.load_voxtral_model(tmp_path)
    other.save_weights(str(tmp_path / "model.safetensors"))
    assert equal(V.load_voxtral_model(tmp_path)[0], other)


def test_a_folder_with_both_sets_is_read_from_mistrals(tmp_path):
    write(tmp_path, "original", make_model())
    write(tmp_path, "transformers", make_model(seed=1))
    assert equal(V.load_voxtral_model(tmp_path)[0], make_model())


@pytest.mark.parametrize("what", ["8 kHz", "vocabulary", "hop"])
def test_optimised_python_checks_files_too(tmp_path, what):
    folder = write(tmp_path / "model", "original", make_model())
    if what == "hop":
        params = (folder / "params.json").read_text()
        (folder / "params.json").write_text(params.replace('"hop_length": 160', '"hop_length": 80'))
    else:
        damage(folder, what)
    code = "import sys, voxtral as V\ntry: V.load_voxtral_model(sys.argv[1])\n"
    code += "except V.VoxtralError as e: print(e)"
    done = subprocess.run([sys.executable, "-O", "-c", code, folder], capture_output=True,
                          text=True, check=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert "missing, damaged or not those of Voxtral" in done.stdout


def damage(folder, what):
    """One thing wrong with a folder of the original layout."""
    path, params = folder / "consolidated.safetensors", folder / "params.json"
    weights, sizes = dict(mx.load(str(path))), json.loads(params.read_text())
    mx.eval(weights)
    changes = {"missing": {"norm.weight": None}, "unexpected": {"extra.weight": mx.zeros(3)},
               "shape": {"norm.weight": mx.zeros(3)}, "type": {"norm.weight": None},
               "scales of a norm": {"norm.scales": mx.zeros((1, 1))},
               "no columns": {"layers.0.attention.wq.scales": mx.zeros((64, 0))},
               "a number": {"layers.0.attention.wq.scales": mx.array(1.0)},
               "int8": {"layers.0.attention.wq.weight": mx.zeros((64, 64), mx.int8)},
               "float8": {"layers.1.feed_forward.w2.weight": mx.zeros((64, 64), mx.uint8)},
               "9 bits": {"layers.0.attention.wq.scales": mx.zeros((64, 1))}}
    weights = {k: w for k, w in (weights | changes.get(what, {})).items() if w is not None}
    if what == "packed as floats":
        weights = {name: w.view(mx.float32) if w.dtype == mx.uint32 else w
                   for name, w in their_names(quantised("8 bits"), "original").items()}
    mx.save_safetensors(str(path), weights)
    fields = {"field": {"dim": None}, "word": {"n_heads": "many"}, "no heads": {"n_heads": 0}}
    sizes = {k: v for k, v in (sizes | fields.get(what, {})).items() if v is not None}
    params.write_text("{" if what == "json" else json.dumps(sizes))
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-1000], "garbage": b"\xff" * 1000, "empty": b""}.get(what, data))
    if what == "tokenizer":
        (folder / "tekken.json").unlink()
    elif what in TOKENIZERS:
        write_tekken(folder, **TOKENIZERS[what])
    elif what in STRANGERS:
        params.unlink()
        (folder / "config.json").write_text(json.dumps(STRANGERS[what]))
    elif what == "no weights":
        path.unlink()


TOKENIZERS = {"vocabulary": {"vocab_size": 1300}, "old": {"version": "v99"},
              "no audio": {"audio_is_there": False}, "8 kHz": {"sampling_rate": 8000},
              "25 Hz": {"frame_rate": 25.0}}
STRANGERS = {"whisper": {"model_type": "whisper"}, "list": [1], "number": 3}
DAMAGE = {  # what is wrong: what the one line must say
    "missing": "weights|language_model.norm.weight", "unexpected": "weights|extra.weight",
    "shape": "weights|language_model.norm.weight", "scales of a norm": "weights|",
    "no columns": "weights|", "a number": "weights|", "9 bits": "weights|",
    "packed as floats": "weights|",
    "int8": "weights|language_model.layers.0.attention.q_proj.weight is mlx.core.int8",
    "float8": "weights|language_model.layers.1.mlp.down_proj.weight is mlx.core.uint8",
    "cut": "weights|", "garbage": "weights|", "empty": "weights|", "no weights": "weights|",
    "field": "configuration|'dim'", "word": "configuration|", "no heads": "configuration|",
    "json": "configuration|JSON", "whisper": "configuration|a whisper model",
    "list": "configuration|", "number": "configuration|",
    "tokenizer": "tekken.json|", "vocabulary": "tekken.json|1300", "old": "tekken.json|v99",
    "no audio": "tekken.json|", "8 kHz": "tekken.json|8000", "25 Hz": "tekken.json|640",
}


def test_voxmlx_loads_the_names_that_we_save(tmp_path):
    weights = pytest.importorskip("voxmlx.weights")
    for bits in (None, 6, 4):
        folder = tmp_path / str(bits)
        folder.mkdir()
        model, _, params = V.load_voxtral_model(HERE / ".ci/digits")
        if bits:
            nn.quantize(model, 64, bits, class_predicate=lambda _, part: (
                hasattr(part, "to_quantized") and part.weight.shape[-1] % 64 == 0))
            params["quantization"] = {"group_size": 64, "bits": bits}
        model.save_weights(str(folder / "model.safetensors"))
        (folder / "config.json").write_text(json.dumps(params))
        shutil.copy(HERE / ".ci/digits/tekken.json", folder)
        theirs = dict(tree_flatten(weights.load_model(str(folder))[0].parameters()))
        ours = dict(tree_flatten(V.load_voxtral_model(folder)[0].parameters()))
        assert ours.keys() == theirs.keys()
        assert all(mx.array_equal(w, theirs[name]) for name, w in ours.items())


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_or_strange_folder_is_one_clear_line(tmp_path, what):
    folder = write(tmp_path / "model", "original", make_model())
    damage(folder, what)
    code, out, err = call("--model", folder, "--quiet", HERE / ".ci/digits/short.flac")
    assert (code, out, len(err)) == (1, "", 1)
    part, why = DAMAGE[what].split("|")
    assert f"{folder}: its {part}: missing, damaged or not those of Voxtral" in err[0], err
    assert why in err[0] and len(err[0]) <= len(str(folder)) + 320, err


def test_the_script_header_is_requirements_txt():
    """PEP 723: what `uv run voxtral.py` installs."""
    text = (HERE / "voxtral.py").read_text()
    block = re.search(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", text)[1]
    assert '# requires-python = ">=3.10"\n' in block
    listed = re.findall(r"(?m)^#   '(.*)',$", block)
    assert listed == (HERE / "requirements.txt").read_text().splitlines()
