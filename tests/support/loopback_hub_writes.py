"""The loopback Hub, to push to as well: `python loopback_hub_writes.py --root DIR` prints its origins and tokens.

What is committed lies where the reading half (`loopback_hub.py`) looks for it, as plain files:

    DIR/models/<namespace>/<name>/...                     main; of a dataset, here and below, DIR/datasets/...
    DIR/branches/models/<namespace>/<name>/<branch>/...   another branch, its name quoted
    DIR/lfs/models/<namespace>/<name>/<sha256>            what was uploaded to LFS, whether or not a commit names it
    DIR/history/models/<namespace>/<name>/<commit>/...    every commit

There is one user, who writes to repositories of their own, over classic LFS: the client needs
HF_HUB_DISABLE_XET=1. Of a repository's .gitignore, patterns of file names and of whole paths are understood. A fault's
"status" comes instead of the work; a "drop" loses the answer to work that was done.
"""

import base64
import fnmatch
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import quote

import yaml
from loopback_hub import LFS_SUFFIXES, NAME, REVISION, CdnHandler, HubHandler, Reply, Repository, is_lfs, main, refusal

USER = "user"  # whose tokens are in `loopback_hub.ROLES`
REPOSITORY = rf"/api/(?P<kind>models|datasets)/{NAME}"
GIT = rf"/((?P<kind>datasets)/)?{NAME}\.git"


class WritableCdn(CdnHandler):
    def serve(self, path: Path) -> None:
        if self.command != "PUT":
            super().serve(path)
        sha256 = path.name
        size = int(self.path.partition("?size=")[2])
        if len(self.body) != size or hashlib.sha256(self.body).hexdigest() != sha256:
            raise refusal(400, f"These {len(self.body)} bytes are not the {size} bytes of {sha256}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.body)
        raise Reply(200)


class WritableHub(HubHandler):
    routes = HubHandler.routes | {
        "GET /api/whoami-v2": "whoami",
        "POST /api/validate-yaml": "validate_yaml",
        "POST /api/repos/create": "create",
        rf"POST {REPOSITORY}/branch/(?P<branch>[^/]+)": "create_branch",
        rf"DELETE {REPOSITORY}/branch/(?P<branch>[^/]+)": "delete_branch",
        rf"POST {REPOSITORY}/preupload/{REVISION}": "preupload",
        rf"POST {GIT}/info/lfs/objects/batch": "lfs_batch",
        rf"POST {GIT}/info/lfs/objects/verify": "lfs_verify",
        rf"POST {REPOSITORY}/commit/{REVISION}": "commit",
    }

    def require_write(self, name: str) -> None:
        if not self.role:
            raise refusal(401, "Invalid username or password.")
        if self.role != "write" or name.split("/")[0] != USER:
            raise refusal(403, f"You don't have the rights to write to {name}")

    def lfs_object(self, sha256: str) -> Path:
        return self.server.state.root / "lfs" / self.kind / self.name / sha256

    def whoami(self) -> None:
        if not self.role:
            raise refusal(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": self.role}}
        raise Reply(200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": auth})

    def validate_yaml(self) -> None:
        """Check that a card's metadata can be parsed; the Hub also checks the fields."""
        metadata = re.match(r"---\n(.*?)\n---(\n|$)", json.loads(self.body)["content"], re.DOTALL)
        if not metadata:
            raise Reply(200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            problem = "" if isinstance(yaml.safe_load(metadata[1]), dict) else "the metadata is not a mapping"
        except yaml.YAMLError as error:
            problem = str(error)
        if problem:
            raise Reply(400, {"errors": [{"message": problem}], "warnings": []})
        raise Reply(200, {"errors": [], "warnings": []})

    def create(self) -> None:
        form = json.loads(self.body)
        name = f"{form.get('organization') or USER}/{form['name']}"
        self.require_write(name)
        kind = form.get("type", "model") + "s"
        if kind not in ("models", "datasets"):
            raise refusal(400, "The loopback Hub creates repositories of models and datasets only")
        folder = self.server.state.root / kind / name
        prefix = "datasets/" if kind == "datasets" else ""
        about = {"url": f"{self.server.state.endpoint}/{prefix}{name}", "name": name}
        if folder.is_dir():
            raise Reply(409, about | {"error": "You already created this repo"})
        folder.mkdir(parents=True)
        attributes = [f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES)]
        (folder / ".gitattributes").write_text("".join(attributes))
        if form.get("visibility") == "private":
            marker = self.server.state.root / "private" / kind / name
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        raise Reply(200, about)

    def create_branch(self) -> None:
        self.require_write(self.name)
        branch = self.parts["branch"]
        if branch in self.branches():
            raise refusal(409, f"Reference refs/heads/{branch} already exists")
        start = self.find_repository(json.loads(self.body).get("startingPoint", "main"))
        folder = self.server.state.root / "branches" / self.kind / self.name / quote(branch, safe="")
        shutil.copytree(start.folder, folder)
        raise Reply(200, {})

    def delete_branch(self) -> None:
        self.require_write(self.name)
        branch = self.parts["branch"]
        if branch == "main" or branch not in self.branches():
            raise refusal(404 if branch != "main" else 403, f"Reference refs/heads/{branch} cannot be deleted")
        shutil.rmtree(self.branches()[branch])
        raise Reply(200, {})

    def preupload(self) -> None:
        """How each file is to be sent, and whether it is to be left out, which the Hub leaves to the client to do."""
        self.require_write(self.name)
        request = json.loads(self.body)
        hosted = self.repository.folder / ".gitignore"
        rules = request.get("gitIgnore", hosted.read_text() if hosted.exists() else "").split()
        files = []
        for file in request["files"]:
            names = (file["path"], Path(file["path"]).name)
            ignore = any(fnmatch.fnmatchcase(name, rule) for name in names for rule in rules)
            present = self.repository.entries.get(file["path"], {})
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            oid = present.get("lfs", present).get("oid")
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
        raise Reply(200, {"files": files})

    def lfs_batch(self) -> None:
        self.require_write(self.name)
        state = self.server.state
        objects = []
        for item in json.loads(self.body)["objects"]:
            objects.append({"oid": item["oid"], "size": item["size"]})
            if not self.lfs_object(item["oid"]).exists():
                address = f"/lfs/{self.name}/{item['oid']}?size={item['size']}"
                state.handed_out[f"PUT {address}"] = self.lfs_object(item["oid"])
                prefix = "datasets/" if self.kind == "datasets" else ""
                verify = f"{state.endpoint}/{prefix}{self.name}.git/info/lfs/objects/verify"
                objects[-1]["actions"] = {"upload": {"href": state.cdn + address}, "verify": {"href": verify}}
        raise Reply(200, {"transfer": "basic", "objects": objects})

    def lfs_verify(self) -> None:
        self.require_write(self.name)
        item = json.loads(self.body)
        stored = self.lfs_object(item["oid"])
        if not stored.exists() or stored.stat().st_size != item["size"]:
            raise refusal(404, f"LFS object {item['oid']} was not uploaded")
        raise Reply(200, {})

    def commit(self) -> None:
        """Apply all operations to a copy of the branch, which replaces it when the last one has succeeded."""
        self.require_write(self.name)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", self.repository.commit) != self.repository.commit:
            raise refusal(412, "A commit has happened since. Please refresh and try again.")
        if "create_pr" in self.query:
            raise refusal(400, "The loopback Hub has no pull requests")
        folder = self.repository.folder
        with tempfile.TemporaryDirectory(dir=self.server.state.root) as beside:
            changed = shutil.copytree(folder, Path(beside) / "changed")
            for operation in operations:
                self.apply(operation["key"], operation["value"], changed)
            folder.rename(Path(beside) / "before")
            changed.rename(folder)
        oid = Repository(folder).commit
        shutil.copytree(folder, self.history() / oid, dirs_exist_ok=True)
        raise Reply(200, {"commitOid": oid, "commitUrl": f"{self.server.state.endpoint}/{self.name}/commit/{oid}"})

    def apply(self, operation: str, value: dict, folder: Path) -> None:
        path = folder / value["path"]
        if not path.resolve().is_relative_to(folder.resolve()):
            raise refusal(400, f"Invalid path: {value['path']}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if operation == "file":
            path.write_bytes(base64.b64decode(value["content"]))
        elif operation == "lfsFile":
            stored = self.lfs_object(value["oid"])
            if not stored.exists():
                raise refusal(400, f"An LFS pointer pointed to a file that does not exist: {value['path']}")
            shutil.copyfile(stored, path)
        elif operation == "deletedFile":
            if not path.is_file():
                raise refusal(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            path.unlink()
        else:
            raise refusal(400, f"The loopback Hub does not know the operation {operation}")


if __name__ == "__main__":
    main(WritableHub, WritableCdn)
