"""Folders and hub ids to files: what is fetched, what never is, and errors that help.  The hub is a local stand-in over HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from fakes import write_model_folder
from gguf_files import random_blocks, write_split

from flexgen.errors import CheckpointError, ModelError, UnsupportedModelError
from flexgen.hub.model_files import weight_files
from flexgen.hub.resolve import resolve_model, resolve_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# -- folders ------------------------------------------------------------------------------------------------------------------------


def test_a_folder(model_folder: Path, bare_model_folder: Path) -> None:
    files = resolve_model(model_folder)
    assert (files.name, files.folder, files.commit) == (str(model_folder), model_folder, None)
    assert files.config["model_type"] == "opt"
    assert files.generation_config == {}
    assert files.has_tokenizer
    assert not resolve_model(bare_model_folder).has_tokenizer


def test_a_folder_has_no_revision(model_folder: Path) -> None:
    with pytest.raises(ModelError, match="revision"):
        resolve_model(model_folder, revision="main")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"]
)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("../blobs/0123"), r"a link to \.\./blobs/0123, which is not there"),
        (lambda path: path.symlink_to(path.name), "which is not there"),
        (lambda path: path.symlink_to("/dev/zero"), "not a file"),
        (os.mkdir, "a folder"),
        (os.mkfifo, "not a file"),
    ],
)
def test_what_only_has_the_name_of_a_file_does_not_pass_for_a_missing_one(
    model_folder: Path, tmp_path: Path, name: str, make: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} is .*{message}"):
        resolve_model(folder)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "~/nothing-here", "", "a--b", "has space", "-x", "../up"])
def test_neither_folder_nor_repository(name: str) -> None:
    with pytest.raises(ModelError, match="hub id"):
        resolve_model(name)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    for name in ("./nothere.gguf", "nothere.gguf", "Models/nothere.GGUF", f"{tmp_path}/nothere"):
        with pytest.raises(ModelError, match=rf"^{name} does not exist: there is no (nothere|folder Models)"):
            resolve_model(name)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"notes\.txt is not a folder"):
        resolve_model(tmp_path / "notes.txt")


@pytest.mark.parametrize("given", [None, 5, b"folder"])
def test_neither_a_name_nor_a_path(given: Any) -> None:
    for resolve in (resolve_model, resolve_tokenizer):
        with pytest.raises(ModelError, match="a folder or a hub id"):
            resolve(given)


def test_a_file_is_no_model(model_folder: Path) -> None:
    with pytest.raises(ModelError, match="not a folder"):
        resolve_model(model_folder / "config.json")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, "\x00", '{"a": ' + "9" * 5000 + "}"])
def test_a_config_that_is_no_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        resolve_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "frobnicator"}, "'frobnicator' is unknown to transformers .* a newer"),
        ({"model_type": "frobnicator", "auto_map": {"AutoConfig": "evil.Config"}}, "auto_map.*does not run"),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": ["opt"]}, "unknown"),
    ],
)
def test_an_unknown_model_type_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    folder = write_model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_model(folder)


def test_code_of_a_known_type_is_ignored(tmp_path: Path) -> None:
    from flexgen import LLM

    folder = write_model_folder(tmp_path / "model")
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Config: ...\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}}))
    assert LLM(folder).vocab_size == config["vocab_size"]
    assert not canary.exists()


def test_pickles_are_no_weights(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        resolve_model(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"pickled weights \(pytorch_model\.bin\)"):
        resolve_model(folder)
    assert resolve_model(folder, with_weights=False).config["model_type"] == "opt"


def index_of(*names: object) -> str:
    return json.dumps({"weight_map": {f"tensor{i}": name for i, name in enumerate(names)}})


def test_an_index_names_the_weights(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(index_of("b.safetensors", "a.safetensors", "b.safetensors"))
    assert weight_files(folder) == ["model.safetensors"]  # where there is one, transformers reads that
    (folder / "model.safetensors").unlink()
    assert weight_files(folder) == ["b.safetensors", "a.safetensors"]
    with pytest.raises(CheckpointError, match="2 files named by"):
        resolve_model(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "model.bin", ".safetensors", 3, ""])
def test_an_index_cannot_point_elsewhere(tmp_path: Path, name: object) -> None:
    folder = write_model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index_of(name))
    with pytest.raises(CheckpointError, match=r"plain \*\.safetensors"):
        resolve_model(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_without_a_map(tmp_path: Path, index: str) -> None:
    folder = write_model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="no weight_map"):
        resolve_model(folder)


def test_a_tokenizer_folder(model_folder: Path, bare_model_folder: Path) -> None:
    assert resolve_tokenizer(model_folder) == model_folder
    with pytest.raises(ModelError, match="no tokenizer files"):
        resolve_tokenizer(bare_model_folder)


# -- the hub ------------------------------------------------------------------------------------------------------------------------


class StandIn:
    """The few endpoints of the hub that are used, over folders: repository id -> file name -> content."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.pretended_sizes: dict[str, int] = {}
        self.failing: dict[str, tuple[int, dict[str, str]]] = {}  # repository id -> (status, headers) of every answer
        self.fetched: list[str] = []
        self.ranges: list[tuple[str, int]] = []  # file, bytes asked for
        self.knows_ranges = True
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                stand_in.answer(self, with_body=False)

            def do_GET(self) -> None:
                stand_in.answer(self, with_body=True)

            def log_message(self, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, name="hub-stand-in", kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        if path.startswith("api/models/"):
            owner, name, kind, revision = path.removeprefix("api/models/").split("/")[:4]
            files = self.repositories.get(f"{owner}/{name}")
            if (failure := self.failing.get(f"{owner}/{name}")) is not None:
                self._send(request, failure[0], b"", failure[1])
            elif files is None:
                self._send(request, 401, b"", {"X-Error-Code": "RepoNotFound"})
            elif name == "gated":
                self._send(request, 403, b"", {"X-Error-Code": "GatedRepo"})
            elif revision not in ("main", COMMIT):
                self._send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif kind == "revision":
                siblings = [{"rfilename": n, "size": self._size(n, c), "blobId": _etag(c)} for n, c in files.items()]
                self._json(request, {"id": f"{owner}/{name}", "modelId": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings})
            else:
                self._json(request, [{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files.items()])
        else:
            owner, name, _, _, file = path.split("/", 4)
            content = self.repositories[f"{owner}/{name}"][file]
            asked = re.fullmatch(r"bytes=0-(\d+)", request.headers.get("Range", ""))
            if asked and with_body and self.knows_ranges:
                start = content[: int(asked[1]) + 1]
                self.ranges.append((file, int(asked[1]) + 1))
                self._send(request, 206, start, {"Content-Range": f"bytes 0-{len(start) - 1}/{len(content)}"})
                return
            if with_body:
                self.fetched.append(file)
            headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT}
            self._send(request, 200, content, headers, with_body=with_body)

    def _size(self, name: str, content: bytes) -> int:
        return self.pretended_sizes.get(name, len(content))

    def _json(self, request: BaseHTTPRequestHandler, value: Any) -> None:
        self._send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: Mapping[str, str], *, with_body: bool = True) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if with_body:
            with contextlib.suppress(ConnectionError):  # who asked may have seen enough
                request.wfile.write(body)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub() -> Iterator[StandIn]:
    stand_in = StandIn()
    yield stand_in
    stand_in.close()


@pytest.fixture
def resolve(tmp_path: Path, hub: StandIn) -> Callable[..., list[Any]]:
    """Resolve models in one fresh process (the hub library reads its environment when it is imported); folder or error of each."""
    script = """
import json, sys, types
sys.modules["transformers"] = types.SimpleNamespace(CONFIG_MAPPING={"opt"}, __version__="stub")  # a second less to import
from pathlib import Path
from flexgen.hub import download, resolve
from flexgen.errors import FlexGenError
from flexgen.hub.download import weight_headers
from flexgen.hub.resolve import resolve_model, resolve_tokenizer
for call in json.loads(sys.argv[1]):
    try:
        if "headers_of" in call:
            download._LIKELY_HEADER_BYTES = call["first_bytes"]
            found = weight_headers(call["headers_of"], Path(call["folder"]))
            print(json.dumps({name: [header.decode(), size] for name, (header, size) in found.items()}))
        elif "gguf" in call:
            resolve.gguf_model_files = lambda name, model, commit=None: (model, commit)  # config and tokenizer take transformers
            model, commit = resolve_model(call["gguf"], with_weights=call["with_weights"])
            print(json.dumps([[str(part.path) for part in model.parts], [tensor.name for _, tensor in model.tensors], commit]))
        elif "tokenizer" in call:
            print(json.dumps([str(resolve_tokenizer(call["tokenizer"]))]))
        else:
            files = resolve_model(**call)
            print(json.dumps([str(files.folder), files.commit, files.has_tokenizer]))
    except FlexGenError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""

    def run(*calls: Mapping[str, Any], **environment: str) -> list[Any]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", script, json.dumps(calls)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env | environment)
        assert done.returncode == 0, done.stderr
        assert "%|" not in done.stderr  # no progress bars
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.fixture
def repository(tmp_path: Path, hub: StandIn) -> dict[str, bytes]:
    """A repository with two shards, and with everything that is never to be fetched."""
    folder = write_model_folder(tmp_path / "source")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = files.pop("model.safetensors")
    files |= {
        "model.safetensors.index.json": index_of("model-1.safetensors", "model-2.safetensors").encode(),
        "model-1.safetensors": weights,
        "model-2.safetensors": weights + b" ",
        "chat_template.jinja": b"{{ messages }}",
    }
    rubbish = ("pytorch_model.bin", "evil.py", "consolidated.safetensors", "original/model.safetensors", "onnx/config.json", "README.md")
    hub.repositories["org/model"] = files | dict.fromkeys(rubbish, b"rubbish")
    return files


def test_a_repository_is_fetched_once_and_read_offline(
    hub: StandIn, repository: dict[str, bytes], resolve: Callable[..., list[Any]]
) -> None:
    (dummy,) = resolve({"model": "org/model", "with_weights": False})
    assert not [name for name in hub.fetched if name.startswith("model-")]
    (first,) = resolve({"model": "org/model"})
    assert sorted(hub.fetched) == sorted(repository)  # each exactly once, and nothing else
    assert first == dummy
    folder = Path(first[0])
    assert first[1:] == [COMMIT, True]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == repository

    hub.fetched.clear()
    assert resolve({"model": "org/model"}, {"model": "org/model", "revision": COMMIT}) == [first, first]
    assert hub.fetched == []
    assert resolve({"model": "org/model"}, {"tokenizer": "org/model"}, HF_HUB_OFFLINE="1") == [first, [first[0]]]
    assert resolve({"model": "org/model"}, HF_ENDPOINT="http://127.0.0.1:9") == [first]  # nobody listens there


def test_a_gguf_file_of_a_repository(hub: StandIn, tmp_path: Path, resolve: Callable[..., list[Any]]) -> None:
    """For a plan only headers are fetched, by their beginning; for a run all parts, once."""
    (tmp_path / "source").mkdir()
    big = {"a": random_blocks("Q8_0", (1500, 1024)), "b": random_blocks("Q8_0", (1500, 1024))}
    parts = write_split(tmp_path / "source", "m", {"general.architecture": "llama"}, big, 2)
    hub.repositories["org/parts"] = {"README.md": b"", **{f"Q8/{path.name}": path.read_bytes() for path in parts}}
    hub.repositories["org/gguf"] = {"model.Q4_K_M.gguf": b"GGUF"}
    model = f"org/parts/Q8/{parts[1].name}"
    (planned,) = resolve({"gguf": model, "with_weights": False})
    assert planned[1:] == [["a", "b"], COMMIT]
    assert hub.ranges == [(f"Q8/{path.name}", 1 << 20) for path in parts]
    assert not hub.fetched
    (found,) = resolve({"gguf": model, "with_weights": True})
    assert found[1:] == planned[1:]
    assert [Path(path).read_bytes() for path in found[0]] == [path.read_bytes() for path in parts]
    assert sorted(hub.fetched) == [f"Q8/{path.name}" for path in parts]
    assert resolve({"gguf": model, "with_weights": True}, HF_HUB_OFFLINE="1") == [found]
    errors = resolve({"model": "org/gguf/absent.gguf"}, {"model": "org/gguf/model.Q4_K_M.gguf"}, {"model": "org/gguf"})
    for error, said in zip(
        errors, ("no file absent.gguf; its GGUF files are model.Q4_K_M.gguf", "cut short", "give one of these files"), strict=True
    ):
        assert said in error[1]


def test_offline_without_a_copy(hub: StandIn, repository: dict[str, bytes], resolve: Callable[..., list[Any]]) -> None:
    ((kind, message),) = resolve({"model": "org/model"}, HF_HUB_OFFLINE="1")
    assert kind == "ModelError"
    assert "nor in the hub's cache" in message
    resolve({"model": "org/model", "with_weights": False})
    ((kind, message),) = resolve({"model": "org/model"}, HF_HUB_OFFLINE="1")
    assert kind == "ModelError"
    assert "lacks model-1.safetensors" in message
    assert hub.fetched.count("model-1.safetensors") == 0


def test_what_cannot_be_fetched(hub: StandIn, repository: dict[str, bytes], resolve: Callable[..., list[Any]]) -> None:
    hub.repositories["org/gated"] = repository
    hub.repositories["org/pickled"] = {"config.json": repository["config.json"], "pytorch_model.bin": b"pickle"}
    hub.repositories["org/torn"] = {name: content for name, content in repository.items() if name != "model-2.safetensors"}
    hub.repositories["org/strange"] = repository | {"config.json": b'{"model_type": "frobnicator", "auto_map": {}}'}
    hub.repositories["org/empty"] = {"README.md": b""}
    hub.repositories["org/gguf"] = {"README.md": b"", "model.Q4_K_M.gguf": b"GGUF"}
    hub.repositories["org/huge"] = repository | {"model-1.safetensors": b"other"}
    hub.pretended_sizes["model-1.safetensors"] = 10**18
    names = ("org/nobody", "org/gated", "org/pickled", "org/torn", "org/strange", "org/empty", "org/gguf", "org/huge")
    answers = resolve(*({"model": name} for name in names), {"model": "org/model", "revision": "v9"})
    wanted = [
        ("ModelError", "neither a folder here nor a hub repository"),
        ("ModelError", "gated"),
        ("ModelError", "pickled weights (pytorch_model.bin)"),
        ("CheckpointError", "lacks files that its model.safetensors.index.json names (model-2.safetensors)"),
        ("UnsupportedModelError", "'frobnicator' is unknown"),
        ("ModelError", "no config.json"),
        ("ModelError", "weights (model.Q4_K_M.gguf) are GGUF"),
        ("CapacityError", "909494.7 TiB more"),
        ("ModelError", "no revision v9"),
    ]
    for (kind, message), (wanted_kind, part) in zip(answers, wanted, strict=True):
        assert kind == wanted_kind, message
        assert part in message, message
    assert not [name for name in hub.fetched if name.endswith((".safetensors", ".bin"))]


def test_why_the_hub_does_not_help_is_said_in_our_words(hub: StandIn, resolve: Callable[..., list[Any]]) -> None:
    credentials = {"X-Error-Message": "Invalid credentials in Authorization header"}
    hub.failing = {"org/token": (401, credentials), "org/secret": (403, {}), "org/busy": (429, {}), "org/ill": (500, {})}
    words = {
        "org/token": "the hub does not accept the token: log in again",
        "org/secret": "the hub refuses access: ask for it on the model's page",
        "org/busy": "the hub answers no more requests for a while",
        "org/ill": "the hub answers with HTTP status 500: try again later",
    }
    answers = resolve(*({"model": name} for name in words))
    answers += resolve({"model": "org/model"}, HF_HUB_OFFLINE="1")
    answers += resolve({"model": "org/model"}, HF_ENDPOINT="http://127.0.0.1:9")  # nobody listens there
    for (kind, message), part in zip(
        answers, [*words.values(), "HF_HUB_OFFLINE is set", "the hub (http://127.0.0.1:9) cannot be reached"], strict=True
    ):
        assert kind == "ModelError"
        assert part in message
        assert "\n" not in message
        assert "snapshot folder" not in message


def file_of(header: bytes, num_payload_bytes: int) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(num_payload_bytes)


@pytest.mark.parametrize("first_bytes", [8, 1 << 17], ids=["two requests", "one request"])
@pytest.mark.parametrize("knows_ranges", [True, False])
def test_headers_are_read_without_weights(
    hub: StandIn, repository: dict[str, bytes], resolve: Callable[..., list[Any]], first_bytes: int, knows_ranges: bool
) -> None:
    headers = {"model-1.safetensors": b'{"a": "a header of thirty bytes or more"}', "model-2.safetensors": b"{}"}
    hub.repositories["org/model"] |= {name: file_of(header, 40_000_000) for name, header in headers.items()}
    hub.knows_ranges = knows_ranges
    ((folder, *_),) = resolve({"model": "org/model", "with_weights": False})
    hub.ranges.clear()
    (found,) = resolve({"headers_of": "org/model", "folder": folder, "first_bytes": first_bytes})
    assert found == {name: [header.decode(), 8 + len(header) + 40_000_000] for name, header in headers.items()}
    assert max((size for _, size in hub.ranges), default=0) <= 1 << 17
    assert {name for name, _ in hub.ranges} == (set(headers) if knows_ranges else set())
    assert not list(Path(folder).glob("*.safetensors"))


def test_headers_that_cannot_be_had(hub: StandIn, repository: dict[str, bytes], resolve: Callable[..., list[Any]]) -> None:
    ((folder, *_),) = resolve({"model": "org/model", "with_weights": False})
    call = {"headers_of": "org/model", "folder": folder, "first_bytes": 100}
    ((kind, message),) = resolve(call, HF_HUB_OFFLINE="1")
    assert (kind, "cannot be read from the hub" in message) == ("ModelError", True), message
    hub.repositories["org/model"]["model-1.safetensors"] = (1 << 60).to_bytes(8, "little")
    ((kind, message),) = resolve(call)
    assert (kind, "model-1.safetensors states a header of" in message) == ("CheckpointError", True), message
    del hub.repositories["org/model"]["model-2.safetensors"]
    ((kind, message),) = resolve(call)
    assert (kind, "lacks files that its" in message) == ("CheckpointError", True), message
