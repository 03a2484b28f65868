"""The package as `pip install .` puts it somewhere: what a wheel holds, and its commands outside of any checkout."""

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
from environments import new_environment
from patience import PATIENCE_SECONDS
from toy_runs import CPU_FP32, ROOT, make_shards, toy_flags

from modeling_gpt2repro.pretrain.launch_configs import FOLDER, copy_configs
from modeling_gpt2repro.pretrain.launch_configs import main as copy_configs_command
from modeling_gpt2repro.runs.config import current_commit
from modeling_gpt2repro.runtime.command_line import CONSOLE_SCRIPTS, as_typed
from modeling_gpt2repro.runtime.signals import resume_command

PACKAGE = "modeling_gpt2repro"
CONFIGS = {path.name: path.read_bytes() for path in (ROOT / FOLDER).iterdir()}
NOT_INSTALLED = ("tests", "benchmarks", "examples", "docs")


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_each_console_script_is_a_function_and_has_its_module(project):
    scripts = project["project"]["scripts"]
    assert scripts.keys() == CONSOLE_SCRIPTS.keys()
    for name, entry in scripts.items():
        module, function = entry.split(":")
        main = getattr(importlib.import_module(module), function)
        assert main is importlib.import_module(CONSOLE_SCRIPTS[name]).main
        assert main.__defaults__ == (None,)  # pip's script calls it without arguments
        top = module.partition(".")[0]
        assert top in (PACKAGE, *project["tool"]["setuptools"]["py-modules"])


def test_the_wheel_gets_every_script_every_folder_and_every_file(project):
    setuptools = project["tool"]["setuptools"]
    assert sorted(setuptools["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))
    mapped = {f"{PACKAGE}.{FOLDER}": FOLDER}
    assert setuptools["package-dir"] == mapped
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / PACKAGE).rglob("__init__.py")]
    assert sorted(setuptools["packages"]) == sorted([*mapped, *(".".join(folder.parts) for folder in folders)])
    for folder in (*folders, FOLDER):
        name = next((name for name, place in mapped.items() if place == folder), ".".join(Path(folder).parts))
        for path in (ROOT / folder).iterdir():
            covered = any(fnmatch(path.name, pattern) for pattern in setuptools["package-data"].get(name, []))
            assert covered or path.suffix == ".py" or path.is_dir(), f"{path} would not be installed"


@pytest.mark.parametrize("name", CONSOLE_SCRIPTS)
def test_help_shows_commands_that_work_outside_of_a_checkout(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"/somewhere/bin/{name}"])
    with pytest.raises(SystemExit):
        importlib.import_module(CONSOLE_SCRIPTS[name]).main(["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {name} ")
    assert f"    {name} " in printed  # an example
    assert "    python " not in printed
    assert not [module for module in CONSOLE_SCRIPTS.values() if f"{module}.py" in printed]


def test_commands_in_messages_are_rewritten_for_a_console_script_only(monkeypatch):
    launch = "accelerate launch --config_file accelerate_configs/8xa100.yaml train_accelerate.py ..."
    monkeypatch.setattr(sys, "argv", ["train_accelerate.py"])
    assert as_typed(launch) == launch
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/gpt2repro-train"])
    ours = launch.replace("train_accelerate.py", "-m train_accelerate")
    assert as_typed(launch) == f"{ours} (gpt2repro-configs copies accelerate_configs/ here.)"
    assert as_typed("it with prepare_data.py and give") == "it with gpt2repro-prepare and give"
    assert as_typed("python -m modeling_gpt2repro.hub.push M") == "gpt2repro-push M"
    monkeypatch.setattr(sys, "orig_argv", ["/somewhere/bin/python3", "/somewhere/bin/gpt2repro-train", "--seed", "1"])
    assert resume_command() == "gpt2repro-train --seed 1 --resume_from_checkpoint latest"


def test_configs_are_copied_and_edited_ones_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copy_configs_command([])
    assert {path.name: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()} == CONFIGS
    assert "--config_file accelerate_configs/single_gpu.yaml -m train_accelerate" in capsys.readouterr().out
    (tmp_path / FOLDER / "8xa100.yaml").write_text("num_processes: 4")
    (tmp_path / FOLDER / "cpu.yaml").unlink()
    assert [path.name for path in copy_configs(Path(FOLDER))] == sorted(CONFIGS)
    assert (tmp_path / FOLDER / "8xa100.yaml").read_text() == "num_processes: 4"
    assert (tmp_path / FOLDER / "cpu.yaml").read_bytes() == CONFIGS["cpu.yaml"]


def test_a_place_that_cannot_be_written_is_refused_in_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        copy_configs_command([str(tmp_path / "file" / "configs")])
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'file' / 'configs'} cannot be written" in line
    assert line.endswith("give another folder.")


def test_an_installed_copy_does_not_take_the_commit_of_the_checkout_around_it(tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "somebody's project"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    installed = tmp_path / ".venv" / "config.py"
    installed.parent.mkdir()
    installed.write_text("")
    assert current_commit(installed) is None
    subprocess.run(["git", "add", "-f", installed], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert current_commit(installed) == head.stdout.strip()


# A real wheel in an environment of its own


class Installed:
    """An environment with the package, and an empty folder in which its commands are run."""

    def __init__(self, folder: Path, wheel: Path):
        self.wheel = wheel
        self.python = new_environment(folder / "env", "--no-deps", "--no-index", str(wheel))
        self.folder = folder / "empty"
        self.folder.mkdir()

    def run(self, *words, input: str = "", code: int = 0, **environment: str) -> str:
        """Run a command of the environment; returns its stdout."""
        words = [self.python.with_name(words[0]), *words[1:]]
        # Without PYTHONPATH, or the checkout would be there after all.
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        result = subprocess.run(
            list(map(str, words)),
            env={**inherited, "HF_HUB_OFFLINE": "1", **CPU_FP32, **environment},
            cwd=self.folder,
            input=input,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert result.returncode == code, result.stderr
        return result.stdout + result.stderr


def copy_sources(folder: Path) -> Path:
    """What a checkout has, without what earlier builds and runs have left there."""
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))]:
        shutil.copy(path, folder)
    for name in (PACKAGE, FOLDER, *NOT_INSTALLED):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def build(folder: Path) -> list[str]:
    """pip's flags: with the setuptools that is here, if it is new enough, or else in isolation, with a download."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        if int(metadata.version("setuptools").split(".")[0]) >= 77:
            return ["--no-deps", "--no-build-isolation", str(folder)]
    return ["--no-deps", str(folder)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel that pip builds from the source distribution, installed; its data and a short run."""
    folder = tmp_path_factory.mktemp("installed")
    source = copy_sources(folder / "source")
    flags = build(source)
    if "--no-build-isolation" in flags:
        program = "from setuptools import build_meta; build_meta.build_sdist('..')"
        subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True)
        [flags[-1]] = map(str, folder.glob("*.tar.gz"))
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "-w", folder, *flags], check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    env = Installed(folder, wheel)
    make_shards(env.folder)
    shutil.rmtree(env.folder / "tokens")
    flags = ("--train_files", "prose.jsonl", "--tokenizer", "train", "--vocab_size", "300", "--validation_share", "0.3")
    flags = (*flags, "--workers", "2")
    env.run("gpt2repro-prepare", "--output_dir", "tokens", *flags)
    env.run("gpt2repro-train", *toy_flags(Path("run"), Path("tokens")))
    return env


@pytest.mark.slow
def test_the_wheel_holds_the_package_the_scripts_and_the_configs_and_nothing_else(installed):
    names = zipfile.ZipFile(installed.wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {PACKAGE, *(path.name for path in ROOT.glob("*.py")), "gpt2repro-0.1.0.dist-info"}
    assert "gpt2repro-0.1.0.dist-info/licenses/LICENSE" in names
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*") if path.is_file()}
    expected = {name for name in expected if "__pycache__" not in name}
    expected |= {f"{PACKAGE}/{FOLDER}/{name}" for name in CONFIGS}
    assert {name for name in names if name.startswith(PACKAGE)} == expected


@pytest.mark.slow
def test_training_from_the_wheel_writes_a_model_with_its_code(installed):
    run = installed.folder / "run"
    assert json.loads((run / "run.json").read_text())["commit"] is None
    for name in ("modeling_gpt2repro.py", "configuration_gpt2repro.py"):
        assert (run / "model" / name).read_bytes() == (ROOT / PACKAGE / name).read_bytes()


@pytest.mark.slow
def test_the_other_commands_use_that_model(installed, hub):
    scored = installed.run("gpt2repro-eval", "--model", "run/model", "--data", "hellaswag.jsonl", "--device", "cpu")
    assert "acc_norm" in scored
    said = installed.run("gpt2repro-talk", "run", "--max_new_tokens", "4", "--seed", "0", input="the cat\n")
    assert "the cat" in said
    home = installed.folder / "home"
    online = {name: value for name, value in hub.environment(home).items() if name.startswith("HF_")}
    online |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    push = ("gpt2repro-push", "run/model", "--hub_model_id", "user/installed", "--hub_wait_seconds", "5")
    assert "pushed to" in installed.run(*push, **online, HF_TOKEN=hub.token)
    assert (hub.root / "models/user/installed/model.safetensors").exists()
    assert "token" in installed.run(*push, code=2, **online, HF_TOKEN="hf_reader")


@pytest.mark.slow
def test_a_launcher_starts_several_processes_with_a_copied_config(installed):
    installed.run("gpt2repro-configs")
    config = ("--config_file", f"{FOLDER}/8xa100.yaml", "--num_processes", "2", "--mixed_precision", "no")
    launch = ("python", "-m", "accelerate.commands.launch", *config, "-m", "train_accelerate")
    installed.run(*launch, *toy_flags(Path("pair"), Path("tokens"), train_tokens=1024))
    hardware = json.loads((installed.folder / "pair" / "run.json").read_text())["hardware"]
    assert hardware["processes"] == 2


@pytest.mark.slow
def test_an_editable_install_has_the_commands_too(installed, tmp_path):
    source = copy_sources(tmp_path / "source")
    installed.run("python", "-m", "pip", "uninstall", "-q", "-y", "gpt2repro")
    install = ("python", "-m", "pip", "install", "-q", *build(source)[:-1], "-e", str(source))
    installed.run(*install, PYTHONPATH=sysconfig.get_path("purelib"))  # for its setuptools
    installed.run("gpt2repro-prepare", "--verify", "tokens")
    (source / FOLDER / "mine.yaml").write_text("num_processes: 3")
    assert "edited/mine.yaml" in installed.run("gpt2repro-configs", "edited")
    program = "import train_accelerate; print(train_accelerate.__file__)"
    assert installed.run("python", "-c", program).strip() == str(source / "train_accelerate.py")
