"""A Hub on 127.0.0.1, to read from: `python loopback_hub.py --root DIR` prints its origins and tokens as JSON.

    DIR/models/<namespace>/<name>/...     a model repository: a plain folder, looked at anew for every request
    DIR/datasets/<namespace>/<name>/...   a dataset repository
    DIR/log.jsonl                         written here: one line a request
    DIR/faults.json                       read from here: a list of rules, of which the first that matches is applied

A rule is {"match": regular expression on "METHOD path?query"} with "times" (default: always) and one of "status" (with
"headers" and "body"), sent instead of the answer; "drop": the connection closes before the answer (0) or after so many
bytes of its body; "hang": true: nothing is done, and no answer ever comes; "until": the answer is late, and comes when
DIR has a file of that name. Replace the file as a whole, not in place; a new file counts from zero.

The commit of main, or of another branch, is a hash of what it holds now; of earlier ones, only those that were pushed
can still be read. A repository is private if DIR/private/models/<namespace>/<name> exists. Files that the Hub keeps in
LFS come from a second origin, as they do in reality: it refuses a client that brings its token along. The server ends
when its standard input does, so it cannot outlive the test run. `loopback_hub_writes.py` takes pushes too.
"""

import argparse
import functools
import hashlib
import json
import re
import sys
import threading
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from patience import wait_until

WRITE_TOKEN = "hf_writer"
READ_TOKEN = "hf_reader"
ROLES = {WRITE_TOKEN: "write", READ_TOKEN: "read"}  # any other token is refused, as in reality
# From the .gitattributes of a new repository.
LFS_SUFFIXES = {".parquet", ".arrow", ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".npy"}
LFS_BYTES = 10 * 1024**2  # the Hub takes nothing larger as a regular file
DATE = "2024-06-01T00:00:00.000Z"  # of the one commit

NAME = r"(?P<name>\w[\w.-]*/\w[\w.-]*)"
API = rf"/api/(?P<kind>models|datasets)/{NAME}"
REVISION = "(?P<revision>[^/]+)"  # one segment of the path as it was sent: refs%2Fpr%2F1
ROUTES = {
    rf"GET {API}(/revision/{REVISION})?": "info",
    rf"GET {API}/tree/{REVISION}(/(?P<path>.+))?": "tree",
    rf"POST {API}/paths-info/{REVISION}": "paths_info",
    rf"GET {API}/refs": "refs",
    rf"GET {API}/commits/{REVISION}": "commits",
    rf"(GET|HEAD) /((?P<kind>datasets)/)?{NAME}/resolve/{REVISION}/(?P<path>.+)": "resolve",
}


@dataclass
class Reply(Exception):
    """A response to the client; raised from wherever it is known."""

    status: int
    body: bytes | str | list | dict = b""
    headers: dict[str, str] = field(default_factory=dict)


def refusal(status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> Reply:
    named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Reply(status, {"error": message}, named | (headers or {}))


def is_lfs(path: str, size: int) -> bool:
    return size > LFS_BYTES or (size > 0 and Path(path).suffix in LFS_SUFFIXES)


@functools.cache
def file_entry(path: Path, name: str, modified_ns: int, size: int) -> dict:
    """A file as tree and paths-info show it, hashed again only when it has changed."""
    content = path.read_bytes()
    entry = {"type": "file", "path": name, "size": size}
    if is_lfs(name, size):
        sha256 = hashlib.sha256(content).hexdigest()
        content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": len(content)}
    return entry | {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}


class Repository:
    """A folder at one moment: its `commit`, and its files and folders by path in `entries`."""

    def __init__(self, folder: Path):
        self.folder = folder
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
        stats = {name: path.stat() for name, path in paths.items() if path.is_file()}
        files = {name: file_entry(paths[name], name, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}
        self.commit = hashlib.sha1(json.dumps(files).encode()).hexdigest()
        folders = {name: {"type": "directory", "path": name, "size": 0, "oid": self.commit} for name in paths}
        self.entries = folders | files


class Handler(BaseHTTPRequestHandler):
    """What both origins share: faults, the log, one way out. `answer` raises the `Reply`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the client to acknowledge the headers

    def handle_request(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.state.next_fault(f"{self.command} {self.path}")
        if "until" in fault:
            self.server.state.log(self, "late")
            wait_until((self.server.state.root / fault["until"]).exists)
        try:
            if "hang" in fault:
                self.rfile.read(1)  # returns when the client gives up
                self.close_connection = True
                return
            if "status" in fault:
                raise Reply(fault["status"], fault.get("body", {"error": "injected fault"}), fault.get("headers", {}))
            with self.server.state.lock:  # one at a time: no request sees half of what another does
                self.answer()
        except Reply as reply:
            self.send(reply, drop=fault.get("drop"))
        except ConnectionError:
            self.close_connection = True
        except Exception:
            self.send(Reply(500, {"error": traceback.format_exc()}))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def send(self, reply: Reply, drop: int | None = None) -> None:
        self.server.state.log(self, None if drop == 0 else reply.status)
        self.close_connection = self.close_connection or drop is not None
        if drop == 0:
            return
        body = reply.body.encode() if isinstance(reply.body, str) else reply.body  # a fault's, such as HTML
        is_bytes = isinstance(body, bytes)
        body = body if is_bytes else json.dumps(body).encode()
        headers = {"Content-Type": "application/octet-stream" if is_bytes else "application/json"}
        self.send_response(reply.status)
        for name, value in (headers | {"Content-Length": str(len(body))} | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:drop])

    def send_file(self, path: Path, headers: dict[str, str]) -> None:
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            raise Reply(200, content, headers | {"Accept-Ranges": "bytes"})
        start = int(asked[1])
        end = min(int(asked[2] or len(content)) + 1, len(content))
        if start >= end:
            raise refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
        raise Reply(206, content[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})

    def log_message(self, *_) -> None:
        pass


class CdnHandler(Handler):
    origin = "cdn"

    def answer(self) -> None:
        if "Authorization" in self.headers:
            raise refusal(400, "The address is signed: Authorization must not be sent here")
        path = self.server.state.handed_out.get(f"{self.command} {self.path}")
        if path is None:
            raise refusal(403, "The Hub has not handed out this address")
        self.serve(path)

    def serve(self, path: Path) -> None:
        self.send_file(path, {})


class HubHandler(Handler):
    origin = "hub"
    routes = ROUTES

    def answer(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in ROLES:
            raise refusal(401, "Invalid credentials in Authorization header")
        self.role = ROLES.get(token)
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        for pattern, action in self.routes.items():
            if found := re.fullmatch(pattern, f"{self.command} {address.path}"):
                self.parts = {name: unquote(value) for name, value in found.groupdict().items() if value}
                self.path_in_repository = self.parts.get("path", "").rstrip("/")
                if "name" in self.parts:
                    self.kind = self.parts.get("kind", "models")
                    self.name = self.parts["name"]
                    self.repository = self.find_repository(self.parts.get("revision", "main"))
                getattr(self, action)()
        raise refusal(404, "Sorry, we can't find the page you are looking for.")

    def branches(self) -> dict[str, Path]:
        root = self.server.state.root
        others = sorted((root / "branches" / self.kind / self.name).glob("*"))
        return {"main": root / self.kind / self.name} | {unquote(folder.name): folder for folder in others}

    def is_private(self) -> bool:
        return (self.server.state.root / "private" / self.kind / self.name).exists()

    def history(self) -> Path:
        return self.server.state.root / "history" / self.kind / self.name

    def find_repository(self, revision: str) -> Repository:
        branches = self.branches()
        if not branches["main"].is_dir() or (self.is_private() and not self.role):
            raise refusal(404 if self.role else 401, "Repository not found", "RepoNotFound")
        for branch, folder in branches.items():
            repository = Repository(folder)
            if revision in (branch, repository.commit):
                return repository
        if (self.history() / revision).is_dir():
            return Repository(self.history() / revision)
        raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def entry_not_found(self) -> Reply:
        headers = {"X-Repo-Commit": self.repository.commit}  # the clients remember what is missing at a commit
        return refusal(404, f"{self.path_in_repository} does not exist", "EntryNotFound", headers)

    def info(self) -> None:
        about = {"id": self.name, "sha": self.repository.commit, "lastModified": DATE, "tags": []}
        about["private"] = self.is_private()
        siblings = []
        for entry in self.repository.entries.values():
            if entry["type"] == "file":
                siblings.append({"rfilename": entry["path"]})
                if "blobs" in self.query:
                    siblings[-1] |= {"size": entry["size"], "blobId": entry["oid"]}
                    if lfs := entry.get("lfs"):
                        siblings[-1]["lfs"] = {"sha256": lfs["oid"], **lfs}
        raise Reply(200, about | {"siblings": siblings})

    def tree(self) -> None:
        top = self.path_in_repository
        if top and top not in self.repository.entries:
            raise self.entry_not_found()
        prefix = f"{top}/" if top else ""
        below = [entry for name, entry in self.repository.entries.items() if name.startswith(prefix)]
        if self.query.get("recursive") != ["true"]:
            below = [entry for entry in below if "/" not in entry["path"].removeprefix(prefix)]
        self.send_entries(below, self.query)

    def paths_info(self) -> None:
        form = parse_qs(self.body.decode())
        entries = self.repository.entries
        self.send_entries([entries[path] for path in form.get("paths", []) if path in entries], form)

    def send_entries(self, entries: list[dict], options: dict[str, list[str]]) -> None:
        last = {"lastCommit": {"id": self.repository.commit, "title": "Upload", "date": DATE}}
        raise Reply(200, [entry | last if options.get("expand") == ["true"] else entry for entry in entries])

    def refs(self) -> None:
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": Repository(folder).commit}
            for branch, folder in self.branches().items()
        ]
        raise Reply(200, {"branches": branches, "tags": [], "converts": [], "pullRequests": []})

    def commits(self) -> None:
        commit = {"id": self.repository.commit, "title": "Upload", "message": "", "date": DATE, "authors": []}
        raise Reply(200, [commit])

    def resolve(self) -> None:
        entry = self.repository.entries.get(self.path_in_repository)
        if entry is None or entry["type"] != "file":
            raise self.entry_not_found()
        path = self.repository.folder / entry["path"]
        headers = {"X-Repo-Commit": self.repository.commit}
        if "lfs" not in entry:
            self.send_file(path, headers | {"ETag": f'"{entry["oid"]}"'})
        address = f"/lfs/{entry['lfs']['oid']}/{quote(entry['path'])}"
        self.server.state.handed_out[f"GET {address}"] = path
        headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
        raise Reply(302, b"", headers | {"Location": self.server.state.cdn + address})


class State:
    """What the two origins share."""

    def __init__(self, root: Path):
        self.root = root
        self.endpoint = ""
        self.cdn = ""
        self.cas = ""  # where Xet stores chunks (loopback_xet.py)
        self.handed_out: dict[str, Path] = {}  # in place of a signature: "METHOD address", and what file it is about
        self.faults = []
        self.faults_version = (0, 0)
        self.lock = threading.Lock()

    def next_fault(self, request: str) -> dict:
        file = self.root / "faults.json"
        with self.lock:
            version = (file.stat().st_mtime_ns, file.stat().st_ino) if file.exists() else (0, 0)
            if version != self.faults_version:
                self.faults = json.loads(file.read_text()) if any(version) else []
                self.faults_version = version
            for fault in self.faults:
                if fault.get("times", 1) > 0 and re.search(fault["match"], request):
                    if "times" in fault:
                        fault["times"] -= 1
                    return fault
        return {}

    def log(self, handler: Handler, status: int | str | None) -> None:
        line = {"origin": handler.origin, "method": handler.command, "path": handler.path, "status": status}
        line |= {"range": handler.headers.get("Range"), "auth": "Authorization" in handler.headers}
        others = "\n".join(value for name, value in handler.headers.items() if name.lower() != "authorization")
        sent = f"{handler.path}\n{others}\n".encode() + handler.body
        line["token_elsewhere"] = any(token.encode() in sent for token in ROLES)  # than in the header that is for it
        line |= {"bytes": len(handler.body)}
        with self.lock, (self.root / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")


def start_server(handler: type[Handler], state: State) -> str:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.state = state
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def main(
    hub: type[HubHandler] = HubHandler, cdn: type[CdnHandler] = CdnHandler, cas: type[Handler] | None = None
) -> None:
    parser = argparse.ArgumentParser(description="A Hub on 127.0.0.1.")
    parser.add_argument("--root", type=Path, required=True)
    state = State(parser.parse_args().root)
    # The CDN has a host name of its own, as in reality: huggingface_hub 1.33 takes a redirect to another port of the
    # same host for one that stays on the Hub, and brings its token along.
    state.cdn = start_server(cdn, state).replace("127.0.0.1", "localhost")
    if cas:
        state.cas = start_server(cas, state)
    state.endpoint = start_server(hub, state)
    tokens = {"token": WRITE_TOKEN, "read_only_token": READ_TOKEN}
    print(json.dumps({"endpoint": state.endpoint, "cdn": state.cdn} | tokens), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
