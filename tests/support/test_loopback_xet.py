"""The Hub's client pushes to the loopback Hub over Xet, and reads what it pushed, as it would with the real one."""

import hashlib
import json
import random
import re
import subprocess
import sys
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import pytest
from patience import PATIENCE_SECONDS

pytest.importorskip("hf_xet")

NOISE = random.Random(0).randbytes(300_000)
NORMAL = np.random.default_rng(0).normal(size=200_001).astype("float32").tobytes()
FILES = {
    "random.bin": NOISE,  # which LZ4 does not make smaller
    "text.bin": b"the sea and the ship " * 30_000,
    "weights.safetensors": NORMAL[:-1],  # which LZ4 makes smaller by its groups of bytes
    "three.bin": b"abc",
    "config.json": b"{}",
}

PUSH = """
import sys
from huggingface_hub import HfApi

api = HfApi()
api.create_repo("user/chunks")
api.upload_folder(repo_id="user/chunks", folder_path=sys.argv[1])
longer = open(sys.argv[1] + "/weights.safetensors", "rb").read() + bytes(1000)
api.upload_file(repo_id="user/chunks", path_or_fileobj=longer, path_in_repo="longer.safetensors")
"""

READ = """
import sys
from huggingface_hub import HfFileSystem, snapshot_download

snapshot_download("user/chunks", local_dir=sys.argv[1])
HfFileSystem().get_file("user/chunks/text.bin", sys.argv[1] + "/got.bin")
"""


def run(hub, home, program, *words, **more) -> list[dict]:
    """Returns the requests."""
    seen = len(hub.log())
    environment = hub.environment(home) | {"HF_TOKEN": hub.token, **more}
    process = subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return hub.log()[seen:]


@pytest.fixture(scope="module")
def pushed(xet_hub, tmp_path_factory) -> list[dict]:
    """`FILES` are on the Hub, by these requests."""
    folder = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return run(xet_hub, tmp_path_factory.mktemp("home"), PUSH, folder)


def request(address, token="", body=None, **headers):
    """Status and body of a GET, or of a POST of these bytes, whatever the status."""
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        asked = Request(address, data=body, headers=headers)
        with build_opener(ProxyHandler({})).open(asked, timeout=PATIENCE_SECONDS) as reply:
            return reply.status, reply.read()
    except HTTPError as reply:
        return reply.code, reply.read()


def xet_token(hub, access, name="user/chunks", token="") -> tuple[int, dict]:
    status, body = request(f"{hub.endpoint}/api/models/{name}/xet-{access}-token/main", token)
    return status, json.loads(body)


def paths(log, origin):
    return [line["path"] for line in log if line["origin"] == origin]


def test_a_push_goes_to_the_cas_in_compressed_chunks_and_arrives_whole(pushed, xet_hub):
    repository = xet_hub.root / "models/user/chunks"
    assert {name: (repository / name).read_bytes() for name in FILES} == FILES
    assert paths(pushed, "cdn") == []
    sent = [xet_hub.root / "xorbs" / path[-64:] for path in paths(pushed, "cas") if path.startswith("/v1/xorbs")]
    stored = b"".join(xorb.read_bytes() for xorb in sent[:-1])
    compressions = set()
    while stored:
        compressions.add(stored[4])
        stored = stored[8 + int.from_bytes(stored[1:4], "little") :]
    assert compressions == {0, 1, 2}
    assert (repository / "longer.safetensors").read_bytes() == FILES["weights.safetensors"] + bytes(1000)
    assert sent[-1].stat().st_size < 140_000  # of 800,000: all chunks but the last were there


@pytest.mark.parametrize("xet", [True, False])
def test_what_was_pushed_is_read_over_either_protocol(pushed, xet_hub, tmp_path, xet):
    log = run(xet_hub, tmp_path / "home", READ, tmp_path, **({} if xet else {"HF_HUB_DISABLE_XET": "1"}))
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == FILES
    assert (tmp_path / "got.bin").read_bytes() == FILES["text.bin"]
    assert bool(paths(log, "cas")) is xet
    assert {path.split("/")[1] for path in paths(log, "cdn")} == {"xorbs" if xet else "lfs"}
    assert not any(line["auth"] for line in log if line["origin"] == "cdn")


def test_files_in_a_repositorys_folder_are_read_over_xet_too(xet_hub, tmp_path):
    folder = xet_hub.new_repository("models/user/own")
    content = NOISE + FILES["text.bin"]  # several chunks, the last one shorter
    (folder / "own.bin").write_bytes(content)
    program = "import sys, huggingface_hub as h; h.hf_hub_download('user/own', 'own.bin', local_dir=sys.argv[1])"
    log = run(xet_hub, tmp_path / "home", program, tmp_path)
    assert (tmp_path / "own.bin").read_bytes() == content
    assert f"/v1/reconstructions/{hashlib.sha256(content).hexdigest()}" in paths(log, "cas")


def test_a_range_of_a_file_needs_only_the_parts_that_hold_it(pushed, xet_hub):
    """Three parts of 3, 4 and 2 chunks of a xorb; a chunk has 8 bytes of header and 10 of content."""
    chunk = b"\0" + b"\x0a\0\0" + b"\0" + b"\x0a\0\0" + b"0123456789"
    xorb, file = "a" * 64, "b" * 64
    (xet_hub.root / "xorbs" / xorb).write_bytes(chunk * 9)
    recipe = [[xorb, 0, 3, 30], [xorb, 5, 9, 40], [xorb, 3, 5, 20]]
    (xet_hub.root / "recipes" / f"{file}.json").write_text(json.dumps(recipe))
    answer = xet_token(xet_hub, "read")[1]

    def parts(wanted):
        status, body = request(f"{answer['casUrl']}/v1/reconstructions/{file}", answer["accessToken"], Range=wanted)
        if status != 200:
            return status
        plan = json.loads(body)
        first = [term["range"]["start"] for term in plan["terms"]]
        places = [(place["url_range"]["start"], place["url_range"]["end"]) for place in plan["fetch_info"][xorb]]
        return plan["offset_into_first_range"], first, places

    assert parts("bytes=0-89") == (0, [0, 5, 3], [(0, 53), (90, 161), (54, 89)])
    assert parts("bytes=0-29") == (0, [0], [(0, 53)])
    assert parts("bytes=29-30") == (29, [0, 5], [(0, 53), (90, 161)])
    assert parts("bytes=31-69") == (1, [5], [(90, 161)])
    assert parts("bytes=70-1000") == (0, [3], [(54, 89)])
    assert parts("bytes=90-1000") == 416
    place = f"{xet_hub.cdn}/xorbs/{xorb}"
    assert request(place, Range="bytes=54-89") == (206, chunk * 2)
    assert request(place, "any")[0] == 400
    assert request(f"{xet_hub.cdn}/xorbs/{'c' * 64}")[0] == 403


def test_a_token_is_for_one_repository_and_for_reading_or_writing(pushed, xet_hub):
    assert xet_token(xet_hub, "read")[0] == 200
    assert xet_token(xet_hub, "write")[0] == 401
    assert xet_token(xet_hub, "write", token=xet_hub.read_only_token)[0] == 403
    assert xet_token(xet_hub, "read", name="user/nothing", token=xet_hub.token)[0] == 404
    cas = xet_token(xet_hub, "read")[1]["casUrl"]
    read, write = (xet_token(xet_hub, access, token=xet_hub.token)[1]["accessToken"] for access in ("read", "write"))
    assert [request(f"{cas}/v1/shards", token, b"x")[0] for token in ("", xet_hub.token, read)] == [401, 401, 403]
    assert request(f"{cas}/v1/reconstructions/{'0' * 64}", xet_hub.token)[0] == 401
    assert request(f"{cas}/v1/reconstructions/{'0' * 64}", read)[0] == 404
    assert xet_hub.token not in read + write


def test_what_is_damaged_is_refused(xet_hub, tmp_path):
    """A shard of one file, the bytes "abc", in one chunk of a xorb: written here by hand."""
    xet_hub.new_repository("models/user/damaged")
    answer = xet_token(xet_hub, "write", "user/damaged", xet_hub.token)[1]
    cas, token = answer["casUrl"], answer["accessToken"]

    def post(path, body):
        status, reply = request(cas + path, token, body)
        return status if status == 200 else (status, json.loads(reply)["error"])

    def entry(hash_hex, *values):
        words = [bytes.fromhex(hash_hex)[start : start + 8][::-1] for start in range(0, 32, 8)]
        return (b"".join(words) + b"".join(value.to_bytes(4, "little") for value in values)).ljust(48, b"\0")

    def shard(name, size, sha256):
        file = entry("1" * 64, 0b11 << 30, 1) + entry(name, 0, size, 0, 1) + entry("2" * 64) + entry(sha256)
        return b"HFRepoMetaData\0".ljust(48, b"\0") + file + b"\xff" * 32 + b"\0" * 16

    name = "0123456789abcdef" * 4
    sha256 = hashlib.sha256(b"abc").hexdigest()
    chunk = b"\0\3\0\0\0\3\0\0abc"
    assert post("/v1/shards", shard(name, 3, sha256)) == (400, f"The xorb {name} was not uploaded")
    assert post(f"/v1/xorbs/default/{name}", chunk[:-1]) == (400, "The last chunk of the xorb is cut off")
    assert post(f"/v1/xorbs/default/{name}", chunk) == 200
    assert re.search("hold 3 bytes, not 4", post("/v1/shards", shard(name, 4, sha256))[1])
    wrong = hashlib.sha256(b"abd").hexdigest()
    assert post("/v1/shards", shard(name, 3, wrong)) == (400, f"These 3 bytes are not those of {wrong}")
    assert not (xet_hub.root / "lfs/models/user/damaged" / wrong).exists()
    assert post("/v1/shards", shard(name, 3, sha256)[1:]) == (400, "This is not a shard")
    assert post("/v1/shards", shard(name, 3, sha256)) == 200
    assert (xet_hub.root / "lfs/models/user/damaged" / sha256).read_bytes() == b"abc"
