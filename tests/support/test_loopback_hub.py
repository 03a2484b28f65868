"""The Hub's own clients read from the loopback Hub and push to it as they would to the real one.

They run once, the reading ones in one subprocess, `CLIENTS`, and the pushing one in another, `PUSHES`.
"""

import http.client
import json
import subprocess
import sys
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from patience import PATIENCE_SECONDS

ROW_GROUPS = 3
ROWS_PER_GROUP = 50
DEFAULT_FILE = "data/CC-MAIN-2024-10/train-0.parquet"
SAMPLE_FILES = ["sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet"]

CLIENTS = r"""
import json

import datasets
import huggingface_hub
import pyarrow.parquet
from transformers import AutoTokenizer


def failure(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__


api = huggingface_hub.HfApi()
files = huggingface_hub.HfFileSystem()
answers = {}

stream = datasets.load_dataset("ns/text", "sample-10BT", split="train", streaming=True)
rows = list(stream)
answers["streamed"] = [len(rows), sorted(rows[0]), rows[0]["text"][:8], stream.n_shards]

config = datasets.load_dataset_builder("ns/text", "sample-10BT").config
answers["data_files"] = {str(split): list(paths) for split, paths in config.data_files.items()}
answers["origin"] = config.data_files["train"].origin_metadata
answers["default_files"] = datasets.load_dataset_builder("ns/text").config.data_files["train"]
answers["configs"] = datasets.get_dataset_config_names("ns/text")

with files.open(config.data_files["train"][1]) as file:
    parquet = pyarrow.parquet.ParquetFile(file)
    batches = parquet.iter_batches(row_groups=[1], columns=["text"])
    answers["group"] = [text for batch in batches for text in batch.column("text").to_pylist()]

info = api.dataset_info("ns/text", files_metadata=True)
answers["sha"] = info.sha
answers["siblings"] = [[file.rfilename, file.size, file.lfs and file.lfs.sha256] for file in info.siblings]
answers["tree"] = [entry.path for entry in api.list_repo_tree("ns/text", repo_type="dataset")]
answers["subtree"] = [entry.path for entry in api.list_repo_tree("ns/text", "sample/10BT", repo_type="dataset")]
answers["expanded"] = [
    entry.last_commit.oid for entry in api.list_repo_tree("ns/text", recursive=True, expand=True, repo_type="dataset")
]
answers["paths"] = [entry.path for entry in api.get_paths_info("ns/text", ["README.md", "no"], repo_type="dataset")]
answers["branches"] = [branch.target_commit for branch in api.list_repo_refs("ns/text", repo_type="dataset").branches]
answers["commits"] = [commit.commit_id for commit in api.list_repo_commits("ns/text", repo_type="dataset")]
answers["at_commit"] = api.dataset_info("ns/text", revision=info.sha).sha
snapshot = api.snapshot_download("ns/text", repo_type="dataset", allow_patterns="data/*/*", token="hf_reader")
answers["rows_in_snapshot"] = pyarrow.parquet.read_metadata(f"{snapshot}/data/CC-MAIN-2024-10/train-0.parquet").num_rows

hellaswag = datasets.load_dataset("Rowan/hellaswag", split="validation")
answers["hellaswag"] = [len(hellaswag), hellaswag[0]]

tokenizer = AutoTokenizer.from_pretrained("ns/tok")
answers["tokens"] = tokenizer("ab")["input_ids"]

answers["missing"] = {
    "dataset": failure(lambda: datasets.load_dataset("ns/nothing", streaming=True)),
    "config": failure(lambda: datasets.load_dataset_builder("ns/text", "sample-1T")),
    "repository": failure(lambda: api.dataset_info("ns/nothing")),
    "revision": failure(lambda: api.dataset_info("ns/text", revision="refs/convert/parquet")),
    "file": failure(lambda: api.hf_hub_download("ns/text", "no.txt", repo_type="dataset")),
    "folder": failure(lambda: list(api.list_repo_tree("ns/text", "no", repo_type="dataset"))),
}
print(json.dumps(answers))
"""

PUSHES = r"""
import json
import sys
from pathlib import Path

import huggingface_hub

folder = Path(sys.argv[1])
downloads = Path(sys.argv[2])
read_only_token = sys.argv[3]
api = huggingface_hub.HfApi()
answers = {}


def failure(call):
    try:
        call()
    except Exception as error:
        response = getattr(error, "response", None)
        return [type(error).__name__, response is not None and response.status_code]


def push(name="user/pushed", **options):
    return api.upload_folder(repo_id=name, folder_path=folder, **options).oid


answers["user"] = api.whoami()["name"], api.whoami()["auth"]["accessToken"]["role"]
answers["created"] = api.create_repo("pushed").repo_id, api.create_repo("user/pushed", exist_ok=True).repo_id
answers["again"] = failure(lambda: api.create_repo("pushed"))
answers["empty"] = api.list_repo_files("user/pushed")

answers["commits"] = [push(), push()]
api.snapshot_download("user/pushed", local_dir=downloads / "first")
api.create_branch("user/pushed", branch="runs/1")
(folder / "README.md").write_text("# Second\n")
answers["commits"] += [push(), push(revision="runs/1", delete_patterns="sub/*", ignore_patterns="sub/*")]
api.snapshot_download("user/pushed", local_dir=downloads / "second")
api.snapshot_download("user/pushed", revision="runs/1", local_dir=downloads / "branch")
answers["branches"] = {branch.name: branch.target_commit for branch in api.list_repo_refs("user/pushed").branches}

(folder / "config.json").write_text("never committed")
(folder / "model.safetensors").write_bytes(b"never committed")
answers["refused"] = {
    "no token": failure(lambda: push(token=False)),
    "unknown token": failure(lambda: push(token="hf_wrong")),
    "token that only reads": failure(lambda: push(token=read_only_token)),
    "another's repository": failure(lambda: push("ns/others")),
    "no repository": failure(lambda: push("user/nothing")),
    "no branch": failure(lambda: push(revision="runs/2")),
    "stale parent": failure(lambda: push(parent_commit=answers["commits"][0])),
    "create without token": failure(lambda: api.create_repo("user/other", token=False)),
    "read with unknown token": failure(lambda: api.model_info("user/pushed", token="hf_wrong")),
    "whoami with unknown token": failure(lambda: api.whoami("hf_wrong")),
}
api.create_repo("user/lost")
answers["refused"]["upload that was lost"] = failure(lambda: push("user/lost"))
answers["nothing"] = api.list_repo_files("user/lost")
(folder / "README.md").write_text("---\ntags: [\n---\n")
answers["refused"]["card that is no YAML"] = failure(push)
answers["sha"] = api.model_info("user/pushed").sha
print(json.dumps(answers))
"""

FINEWEB = {  # a row of FineWeb-Edu
    "text": "",
    "id": "",
    "dump": "CC-MAIN-2024-10",
    "url": "https://example.org",
    "file_path": "s3://commoncrawl/crawl-data/CC-MAIN-2024-10/1.warc.gz",
    "language": "en",
    "language_score": 0.98,
    "token_count": 300,
    "score": 3.1,
    "int_score": 3,
}
HELLASWAG_ROWS = {"train": 3, "validation": 2, "test": 1}
HELLASWAG = {  # a row of Rowan/hellaswag
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": ["is using wrap.", "is ripping level tiles off.", "is holding a cube.", "starts pulling up roofing."],
    "source_id": "activitynet~v_-JhWjGDPHMY",
    "split": "val",
    "split_type": "indomain",
    "label": "3",
}

PUSHED_FILES = {
    "README.md": b"---\nlicense: mit\n---\n# First\n",
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
    "sub/rng.pth": b"random",
    "sub/copy.pth": b"random",  # the same object twice
    "empty.bin": b"",
}


def write_fineweb(folder):
    """FineWeb-Edu's schema and its card: the default config reads data/, sample-10BT reads sample/10BT/."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in (DEFAULT_FILE, *SAMPLE_FILES):
        rows = [
            FINEWEB | {"text": f"Text {row} of {name}. " + "Water boils at 100 degrees. " * 40, "id": str(row)}
            for row in range(ROW_GROUPS * ROWS_PER_GROUP)
        ]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=ROWS_PER_GROUP, compression="none")
    (folder / "README.md").write_text(
        "---\nlicense: odc-by\nconfigs:\n"
        "- config_name: default\n  data_files:\n  - split: train\n    path: data/*/*\n"
        "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n"
        "---\n# Text\n"
    )


def write_hellaswag(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir()
    for split, rows in HELLASWAG_ROWS.items():
        pq.write_table(pa.Table.from_pylist([HELLASWAG] * rows), folder / f"data/{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nlanguage: en\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in HELLASWAG_ROWS)
        + "---\n# HellaSwag\n"
    )


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def answers(hub, warm_python):
    """What `CLIENTS` got, and the requests it made as "log"."""
    write_fineweb(hub.new_repository("datasets/ns/text"))
    write_hellaswag(hub.new_repository("datasets/Rowan/hellaswag"))
    write_tokenizer(hub.new_repository("models/ns/tok"))
    seen = len(hub.log())
    output = warm_python.run("-c", CLIENTS).stdout
    return json.loads(output.splitlines()[-1]) | {"log": hub.log()[seen:]}


def requests_of(answers, origin, text):
    return [line for line in answers["log"] if line["origin"] == origin and text in line["path"]]


def read(address, put=None, **headers):
    """Status, headers and body of a GET, or a PUT of these bytes, whatever the status."""
    request = Request(address, data=put, headers=headers, method="GET" if put is None else "PUT")
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=PATIENCE_SECONDS) as reply:
            return reply.status, reply.headers, reply.read()
    except HTTPError as reply:
        return reply.code, reply.headers, reply.read()


def test_a_config_streams_every_row_of_its_files(answers):
    assert answers["streamed"] == [2 * ROW_GROUPS * ROWS_PER_GROUP, sorted(FINEWEB), "Text 0 o", len(SAMPLE_FILES)]


def test_the_card_lists_the_files_of_a_config_and_the_address_names_the_commit(answers):
    at = f"hf://datasets/ns/text@{answers['sha']}/"
    assert answers["configs"] == ["default", "sample-10BT"]
    assert answers["default_files"] == [at + DEFAULT_FILE]
    assert answers["data_files"] == {"train": [at + name for name in SAMPLE_FILES]}
    assert answers["origin"] == [["ns/text", answers["sha"]]] * 2


def test_a_row_group_is_read_by_range_without_the_ones_before_it(answers, hub):
    assert [text.split(".")[0] for text in answers["group"]] == [
        f"Text {row} of sample/10BT/001_00000" for row in range(50, 100)
    ]
    size = (hub.root / "datasets/ns/text" / SAMPLE_FILES[1]).stat().st_size
    reads = [line for line in requests_of(answers, "cdn", SAMPLE_FILES[1]) if line["status"] == 206]
    assert len(reads) == len(requests_of(answers, "cdn", SAMPLE_FILES[1])) > 0
    first_byte = int(reads[-1]["range"].removeprefix("bytes=").split("-")[0])
    assert size // ROW_GROUPS * 0.9 < first_byte < size // ROW_GROUPS * 1.1


def test_the_listings_agree(answers, hub):
    folder = hub.root / "datasets/ns/text"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert [name for name, _, _ in answers["siblings"]] == files
    assert [size for _, size, _ in answers["siblings"]] == [(folder / name).stat().st_size for name in files]
    assert [bool(sha256) for _, _, sha256 in answers["siblings"]] == [name.endswith(".parquet") for name in files]
    assert answers["tree"] == ["README.md", "data", "sample"]
    assert answers["subtree"] == SAMPLE_FILES
    assert answers["paths"] == ["README.md"]
    folders = ["data", "data/CC-MAIN-2024-10", "sample", "sample/10BT"]
    assert answers["expanded"] == [answers["sha"]] * (len(files) + len(folders))
    assert answers["branches"] == answers["commits"] == [answers["sha"]]
    assert answers["at_commit"] == answers["sha"]


def test_a_snapshot_downloads_and_does_not_send_its_token_to_the_cdn(answers):
    assert answers["rows_in_snapshot"] == ROW_GROUPS * ROWS_PER_GROUP
    assert any(line["auth"] for line in requests_of(answers, "hub", DEFAULT_FILE))
    assert [line["status"] for line in requests_of(answers, "cdn", DEFAULT_FILE) if line["range"] is None] == [200]
    assert not any(line["auth"] for line in requests_of(answers, "cdn", ""))


def test_hellaswag_loads_with_its_label_as_a_string(answers):
    assert answers["hellaswag"] == [HELLASWAG_ROWS["validation"], HELLASWAG]


def test_a_tokenizer_loads(answers):
    assert answers["tokens"] == [2]


def test_missing_things_raise_the_clients_own_errors(answers):
    assert answers["missing"] == {
        "dataset": "DatasetNotFoundError",
        "config": "ValueError",
        "repository": "RepositoryNotFoundError",
        "revision": "RevisionNotFoundError",
        "file": "RemoteEntryNotFoundError",
        "folder": "RemoteEntryNotFoundError",
    }


def test_no_request_caused_a_bug_or_had_an_unknown_address(answers):
    assert {line["status"] for line in answers["log"]} == {200, 206, 302, 401, 404}
    absent = [line["path"] for line in answers["log"] if line["status"] == 404 and "/api/" in line["path"]]
    assert [path.split("/", 5)[5] for path in absent] == [
        "tree/main/additional_chat_templates?recursive=false&expand=false",
        "revision/refs%2Fconvert%2Fparquet",
        "tree/main/no?recursive=false&expand=false",
    ]


@pytest.fixture
def notes(hub):
    """The address of a repository with the file ten.txt ("0123456789") and the same as ten.bin, which is in LFS."""
    folder = hub.new_repository("models/ns/notes")
    for name in ("ten.txt", "ten.bin"):
        (folder / name).write_text("0123456789")
    return f"{hub.endpoint}/ns/notes/resolve/main/"


@pytest.mark.parametrize("name", ["ten.txt", "ten.bin"])
def test_ranges_are_inclusive_and_may_be_open(notes, name):
    status, headers, body = read(notes + name, Range="bytes=2-4")
    assert (status, headers["Content-Range"], body) == (206, "bytes 2-4/10", b"234")
    assert read(notes + name, Range="bytes=7-")[2] == b"789"
    status, headers, _ = read(notes + name, Range="bytes=10-")
    assert (status, headers["Content-Range"]) == (416, "bytes */10")


def test_the_cdn_refuses_a_token_and_an_address_that_was_not_handed_out(notes, hub):
    assert read(notes + "ten.bin")[0] == 200
    address = hub.cdn + hub.log()[-1]["path"]
    assert read(address)[0] == 200
    assert read(address, Authorization="Bearer hf_reader")[0] == 400
    assert read(f"{hub.cdn}/lfs/0/ten.bin")[0] == 403


def test_a_missing_file_names_its_commit_and_a_change_makes_a_new_one(notes, hub):
    status, headers, _ = read(notes + "no.txt")
    before = headers["X-Repo-Commit"]
    assert (status, headers["X-Error-Code"], len(before)) == (404, "EntryNotFound", 40)
    (hub.root / "models/ns/notes/ten.txt").write_text("eleven")
    assert read(notes + "ten.txt")[2] == b"eleven"
    assert read(notes + "ten.txt")[1]["X-Repo-Commit"] != before
    status, headers, _ = read(notes.replace("main", before) + "ten.txt")
    assert (status, headers["X-Error-Code"]) == (404, "RevisionNotFound")


def test_an_unknown_address_is_404_and_json(hub):
    for path in ("/", "/api/agent-harnesses", "/api/models/one", "/api/models/ns/../etc"):
        status, headers, body = read(hub.endpoint + path)
        assert (status, headers["Content-Type"], list(json.loads(body))) == (404, "application/json", ["error"])
    status, headers, _ = read(f"{hub.endpoint}/api/models/ns/none")
    assert (status, headers["X-Error-Code"]) == (401, "RepoNotFound")
    assert read(f"{hub.endpoint}/api/models/ns/none", Authorization="Bearer hf_reader")[0] == 404


def test_faults_are_applied_as_often_as_asked(notes, hub):
    busy = {"match": "GET .*ten.txt", "status": 429, "headers": {"Retry-After": "1"}, "times": 2}
    with hub.faults(busy, {"match": "GET /lfs/", "drop": 0, "times": 1}, {"match": "GET /lfs/", "drop": 4}):
        assert [read(notes + "ten.txt")[0] for _ in range(3)] == [429, 429, 200]
        with pytest.raises(http.client.RemoteDisconnected):
            read(notes + "ten.bin")
        assert hub.log()[-1]["status"] is None
        with pytest.raises(http.client.IncompleteRead) as broken:
            read(notes + "ten.bin")
        assert broken.value.partial == b"0123"
    assert read(notes + "ten.bin")[2] == b"0123456789"


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """What `PUSHES` got, its downloads "first", "second" and "branch" as {path: content}, its requests as "log"."""
    folder = tmp_path_factory.mktemp("pushed")
    downloads = tmp_path_factory.mktemp("downloads")
    for name, content in PUSHED_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    hub.new_repository("models/ns/others")
    seen = len(hub.log())
    environment = hub.environment(tmp_path_factory.mktemp("home")) | {"HF_TOKEN": hub.token}
    command = [sys.executable, "-c", PUSHES, folder, downloads, hub.read_only_token]
    uploads = "PUT /lfs/user/lost/|POST /user/lost.git/info/lfs/objects/verify"
    with hub.faults({"match": uploads, "status": 200}):  # the client takes them for successful
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    downloaded = {name: files_below(downloads / name) for name in ("first", "second", "branch")}
    return json.loads(run.stdout.splitlines()[-1]) | downloaded | {"log": hub.log()[seen:]}


def files_below(folder):
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    hidden = (".gitattributes", ".cache/")
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(hidden)}


def test_pushed_files_are_downloaded_and_are_below_root(pushed, hub):
    second = PUSHED_FILES | {"README.md": b"# Second\n"}
    assert pushed["first"] == PUSHED_FILES
    assert pushed["second"] == second == files_below(hub.root / "models/user/pushed")
    assert pushed["branch"] == {name: content for name, content in second.items() if not name.startswith("sub/")}


def test_a_repository_is_created_once_with_the_lfs_rules(pushed):
    assert pushed["user"] == ["user", "write"]
    assert pushed["created"] == ["user/pushed", "user/pushed"]
    assert pushed["again"] == ["HfHubHTTPError", 409]
    assert pushed["empty"] == [".gitattributes"]


def test_an_unchanged_push_makes_no_commit_and_a_changed_one_uploads_what_changed(pushed):
    first, unchanged, second, branch = pushed["commits"]
    assert first == unchanged
    assert len({first, second, branch}) == 3
    assert pushed["branches"] == {"main": second, "runs/1": branch}
    commits = [line for line in requests_of(pushed, "hub", "/user/pushed/commit/") if line["status"] == 200]
    assert len(commits) == 3
    assert [line["method"] for line in requests_of(pushed, "cdn", "size=10240")] == ["PUT"]
    assert not any(line["auth"] for line in requests_of(pushed, "cdn", ""))


def test_a_refused_push_changes_nothing(pushed):
    assert pushed["refused"] == {
        "no token": ["HfHubHTTPError", 401],
        "unknown token": ["HfHubHTTPError", 401],
        "token that only reads": ["HfHubHTTPError", 403],
        "another's repository": ["HfHubHTTPError", 403],
        "no repository": ["RepositoryNotFoundError", 404],
        "no branch": ["RevisionNotFoundError", 404],
        "stale parent": ["HfHubHTTPError", 412],
        "create without token": ["HfHubHTTPError", 401],
        "read with unknown token": ["HfHubHTTPError", 401],
        "whoami with unknown token": ["HfHubHTTPError", 401],
        "upload that was lost": ["BadRequestError", 400],
        "card that is no YAML": ["ValueError", False],
    }
    assert pushed["sha"] == pushed["commits"][2]
    assert pushed["nothing"] == [".gitattributes"]


def test_an_upload_is_verified_and_refuses_a_token(pushed, hub):
    address = hub.cdn + requests_of(pushed, "cdn", "size=10240")[0]["path"]
    content = PUSHED_FILES["model.safetensors"]
    assert read(address, put=content)[0] == 200
    assert read(address, put=content[::-1])[0] == read(address, put=content[1:])[0] == 400
    assert read(address, put=content, Authorization=f"Bearer {hub.token}")[0] == 400
    assert read(address.replace("10240", "10239"), put=content[1:])[0] == read(address)[0] == 403
    assert read(f"{hub.endpoint}/user/pushed/resolve/main/model.safetensors")[2] == content
