"""The loopback Hub with Xet, the client's default protocol: `python loopback_xet.py --root DIR` prints its origins.

Files of the kind that LFS stores go in chunks to a third origin, the content-addressed storage (CAS):

    DIR/xorbs/<xorb hash>          chunks, one after the other, as the client sent them
    DIR/recipes/<SHA-256>.json     which chunks a file consists of: a list of [xorb hash, first chunk, end, bytes]

A shard describes files. The CAS puts each one together; if it has the SHA-256 that the client says, it becomes an LFS
object of the repository, which a commit can name. To read a file, the client asks the CAS for its recipe and the CDN
for the chunks. A file that a test has put into a repository becomes a xorb of its own when a client first sees it.

The formats are described in https://huggingface.co/docs/xet. What differs here: the Xet hash of a file is its SHA-256,
hashes of chunks and xorbs are not checked (BLAKE3 is not in the standard library), and no chunk is known from earlier
uploads to other repositories. A "status" of a fault comes instead of the work; a "drop" loses the answer.
"""

import hashlib
import json
import re
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow
from loopback_hub import API, REVISION, Handler, Reply, main, refusal
from loopback_hub_writes import WritableCdn, WritableHub

HASH = "(?P<hash>[0-9a-f]{64})"
YEAR_2100 = 4_102_444_800  # when the tokens expire, in seconds since 1970
CHUNK_BYTES = 64 * 1024  # of files that were not uploaded over Xet; the client makes chunks of 8 to 128 KiB

# A chunk: version (1 byte), stored size (3), compression (1), size (3), content. Integers are little-endian.
CHUNK_HEADER_BYTES = 8
LZ4, GROUPED_LZ4 = 1, 2  # grouped: all bytes at positions 0, 4, 8, ... come first, then those at 1, 5, 9, ...

# A shard: a header, the files, the xorbs. All of it in entries of 48 bytes: a hash, then numbers of 4 bytes.
SHARD_TAG = b"HFRepoMetaData\0"
ENTRY_BYTES = 48
END_OF_SECTION = b"\xff" * 32
WITH_VERIFICATION = 1 << 31  # flags of a file: a further entry for each of its xorbs,
WITH_SHA256 = 1 << 30  # and a last entry with its SHA-256


def hash_text(entry: bytes) -> str:
    """The hash at the start of an entry, as Xet writes it: four numbers of 8 bytes, each in hexadecimal."""
    return "".join(f"{int.from_bytes(entry[start : start + 8], 'little'):016x}" for start in range(0, 32, 8))


def numbers(entry: bytes) -> list[int]:
    return [int.from_bytes(entry[start : start + 4], "little") for start in range(32, ENTRY_BYTES, 4)]


def read_shard(shard: bytes) -> dict[str, list]:
    """SHA-256 -> recipe of each file."""
    if not shard.startswith(SHARD_TAG) or len(shard) % ENTRY_BYTES:
        raise refusal(400, "This is not a shard")
    entries = [shard[start : start + ENTRY_BYTES] for start in range(0, len(shard), ENTRY_BYTES)]
    remaining = iter(entries[1:])
    recipes = {}
    while not (file := next(remaining)).startswith(END_OF_SECTION):
        flags, count = numbers(file)[:2]
        if not flags & WITH_SHA256:
            raise refusal(400, f"The file {hash_text(file)} has no SHA-256")
        recipe = []
        for _ in range(count):
            part = next(remaining)
            _, size, first, end = numbers(part)
            recipe.append([hash_text(part), first, end, size])
        for _ in range(count if flags & WITH_VERIFICATION else 0):
            next(remaining)
        recipes[hash_text(next(remaining))] = recipe
    return recipes


def chunk_offsets(xorb: bytes) -> list[int]:
    """Where each chunk begins, and where the last one ends."""
    offsets = [0]
    while offsets[-1] < len(xorb):
        header = xorb[offsets[-1] :][:CHUNK_HEADER_BYTES]
        offsets.append(offsets[-1] + CHUNK_HEADER_BYTES + int.from_bytes(header[1:4], "little"))
    if offsets[-1] != len(xorb):
        raise refusal(400, "The last chunk of the xorb is cut off")
    return offsets


def unpack_chunk(chunk: bytes) -> bytes:
    compression, size = chunk[4], int.from_bytes(chunk[5:8], "little")
    content = chunk[CHUNK_HEADER_BYTES:]
    if compression in (LZ4, GROUPED_LZ4):
        content = pyarrow.decompress(content, decompressed_size=size, codec="lz4", asbytes=True)
    if compression != GROUPED_LZ4:
        return content
    ungrouped = bytearray(size)
    for position in range(4):
        count = len(ungrouped[position::4])
        ungrouped[position::4], content = content[:count], content[count:]
    return bytes(ungrouped)


def pack_xorb(content: bytes) -> bytes:
    """The content in chunks of CHUNK_BYTES, not compressed."""
    chunks = [content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES)]
    sizes = [len(chunk).to_bytes(3, "little") for chunk in chunks]
    return b"".join(b"\0" + size + b"\0" + size + chunk for size, chunk in zip(sizes, chunks, strict=True))


class Storage:
    """The xorbs and recipes below a server's root."""

    def __init__(self, root: Path):
        self.xorbs = root / "xorbs"
        self.recipes = root / "recipes"
        self.xorbs.mkdir(exist_ok=True)
        self.recipes.mkdir(exist_ok=True)

    def recipe_file(self, sha256: str) -> Path:
        return self.recipes / f"{sha256}.json"

    def add_file(self, path: Path, sha256: str) -> None:
        if not self.recipe_file(sha256).exists():
            xorb = pack_xorb(path.read_bytes())
            (self.xorbs / sha256).write_bytes(xorb)
            count = len(chunk_offsets(xorb)) - 1
            self.recipe_file(sha256).write_text(json.dumps([[sha256, 0, count, path.stat().st_size]]))

    def add_recipe(self, sha256: str, recipe: list) -> bytes:
        """Returns the content of the file."""
        content = b""
        for name, first, end, size in recipe:
            if not (self.xorbs / name).exists():
                raise refusal(400, f"The xorb {name} was not uploaded")
            xorb = (self.xorbs / name).read_bytes()
            part = b"".join(unpack_chunk(xorb[i:j]) for i, j in list(pairwise(chunk_offsets(xorb)))[first:end])
            if len(part) != size:
                raise refusal(400, f"The chunks {first} to {end} of {name} hold {len(part)} bytes, not {size}")
            content += part
        if hashlib.sha256(content).hexdigest() != sha256:
            raise refusal(400, f"These {len(content)} bytes are not those of {sha256}")
        self.recipe_file(sha256).write_text(json.dumps(recipe))
        return content


class CasHandler(Handler):
    """The storage, which takes the tokens that the Hub gives out for a repository, and no user's."""

    origin = "cas"
    # To requests of newer versions it answers 404, as the client expects of a server that does not know them.
    routes = {
        f"POST /v1/xorbs/default/{HASH}": "add_xorb",
        "POST /v1/shards": "add_shard",
        f"GET /v1/reconstructions/{HASH}": "reconstruction",
    }

    def answer(self) -> None:
        token = self.headers.get("Authorization", "")
        scope = re.fullmatch("Bearer xet-(?P<access>read|write):(?P<repository>.+)", token)
        if not scope:
            raise refusal(401, "This is no token of the Hub's")
        if self.command == "POST" and scope["access"] != "write":
            raise refusal(403, "This token may only read")
        root = self.server.state.root
        self.storage = Storage(root)
        self.lfs_objects = root / "lfs" / scope["repository"]
        for pattern, action in self.routes.items():
            if found := re.fullmatch(pattern, f"{self.command} {self.path}"):
                getattr(self, action)(**found.groupdict())
        raise refusal(404, "Not found")

    def add_xorb(self, hash: str) -> None:
        chunk_offsets(self.body)
        (self.storage.xorbs / hash).write_bytes(self.body)
        raise Reply(200, {"was_inserted": True})

    def add_shard(self) -> None:
        self.lfs_objects.mkdir(parents=True, exist_ok=True)
        for sha256, recipe in read_shard(self.body).items():
            (self.lfs_objects / sha256).write_bytes(self.storage.add_recipe(sha256, recipe))
        raise Reply(200, {"result": 1})

    def reconstruction(self, hash: str) -> None:
        """Which chunks hold a range of the file, and where they are."""
        file = self.storage.recipe_file(hash)
        if not file.exists():
            raise refusal(404, f"There is no file {hash}")
        recipe = json.loads(file.read_text())
        ends = list(accumulate(size for *_, size in recipe))
        start, last = map(int, re.findall(r"\d+", self.headers.get("Range", f"bytes=0-{ends[-1]}")))
        if start >= ends[-1]:
            raise refusal(416, f"The file has {ends[-1]} bytes")
        begins = [0, *ends]
        needed = [index for index, end in enumerate(ends) if start < end and begins[index] <= last]
        terms, places = [], {}
        for name, first, end, size in [recipe[index] for index in needed]:
            chunks = {"start": first, "end": end}
            terms.append({"hash": name, "unpacked_length": size, "range": chunks})
            xorb = self.storage.xorbs / name
            offsets = chunk_offsets(xorb.read_bytes())
            stored = {"start": offsets[first], "end": offsets[end] - 1}
            address = f"/xorbs/{name}"
            self.server.state.handed_out[f"GET {address}"] = xorb
            place = {"range": chunks, "url": self.server.state.cdn + address, "url_range": stored}
            places.setdefault(name, []).append(place)
        skipped = start - begins[needed[0]]
        raise Reply(200, {"offset_into_first_range": skipped, "terms": terms, "fetch_info": places})


class XetHub(WritableHub):
    routes = WritableHub.routes | {rf"GET {API}/xet-(?P<access>read|write)-token/{REVISION}": "xet_token"}

    def xet_token(self) -> None:
        if self.parts["access"] == "write":
            self.require_write(self.name)
        cas = self.server.state.cas
        token = f"xet-{self.parts['access']}:{self.kind}/{self.name}"
        headers = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(YEAR_2100)}
        raise Reply(200, {"casUrl": cas, "accessToken": token, "exp": YEAR_2100}, headers)

    def xet_hash(self, entry: dict) -> str:
        sha256 = entry["lfs"]["oid"]
        Storage(self.server.state.root).add_file(self.repository.folder / entry["path"], sha256)
        return sha256

    def send_entries(self, entries: list[dict], options: dict[str, list[str]]) -> None:
        hashes = [{"xetHash": self.xet_hash(entry)} if "lfs" in entry else {} for entry in entries]
        super().send_entries([entry | more for entry, more in zip(entries, hashes, strict=True)], options)

    def resolve(self) -> None:
        try:
            super().resolve()
        except Reply as reply:
            if reply.status == 302:
                token = f"/api/{self.kind}/{self.name}/xet-read-token/{self.repository.commit}"
                reply.headers["X-Xet-Hash"] = self.xet_hash(self.repository.entries[self.path_in_repository])
                reply.headers["Link"] = f'<{self.server.state.endpoint}{token}>; rel="xet-auth"'
            raise


if __name__ == "__main__":
    main(XetHub, WritableCdn, CasHandler)
