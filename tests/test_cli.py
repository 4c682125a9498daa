"""The command line as a person meets it: speed, refusals, exit codes."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ltrain import cli
from ltrain.config import ConfigError

QUICKSTART = "configs/quickstart.yaml"
STRAY = ["config", "schema", "train.steps=3"]


def ltrain(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ltrain", *words], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = """
import sys
from ltrain.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
heavy = {"torch", "numpy", "omegaconf", "mlflow", "yaml", "megatron", "tqdm"} & set(sys.modules)
assert not heavy, heavy
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and "generate" in done.stdout
    # processor time: the wall clock of a busy machine says nothing
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("words", [["train", QUICKSTART], ["config", "show", QUICKSTART], ["bench", "step", QUICKSTART]])
def test_a_refused_config_is_one_sentence_and_exit_code_2(words: list[str]) -> None:
    done = ltrain(*words, "train.stps=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ltrain: unknown key train.stps on the command line, did you mean train.steps?\n"


def test_ranks_are_checked_before_torch_is_imported_and_one_rank_speaks() -> None:
    done = ltrain("train", QUICKSTART, "parallel.tensor=2", WORLD_SIZE="3")
    assert done.returncode == 2 and "3 ranks" in done.stderr and len(done.stderr.splitlines()) == 1
    assert ltrain("train", QUICKSTART, "parallel.tensor=2", WORLD_SIZE="3", LOCAL_RANK="1").stderr == ""


def test_debug_shows_the_traceback() -> None:
    done = ltrain("config", "show", "nowhere.yaml", LTRAIN_DEBUG="1")
    assert "Traceback" in done.stderr and "nowhere.yaml" in done.stderr


def test_show_prints_every_key_as_yaml_that_loads(tmp_path: Path) -> None:
    done = ltrain("config", "show", QUICKSTART, "train.steps=9")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "shown.yaml"
    path.write_text(done.stdout)
    again = ltrain("config", "show", str(path))
    assert again.stdout == done.stdout and "steps: 9" in done.stdout and "beta" in done.stdout


def test_schema_lists_keys_with_type_default_and_comment(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["config", "schema"])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("train.clip "))
    assert row.split() == "train.clip number 1.0 global gradient norm; 0: no clipping".split()
    assert any(line.startswith("model.layers.KIND.rope.scaling ") for line in lines)
    gated = lines[lines.index("# Options of a layer kind under model.layers with `mixer: gated_delta_net`") :]
    assert not any(".decay " in line for line in gated)


def _raises(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("no."), 2), (ValueError("no."), 2), (type("DiskFull", (RuntimeError,), {"__module__": "ltrain.checkpoint"})("no."), 1)],
)
def test_errors_for_people_have_no_traceback(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exec_globals = {"__name__": "ltrain.somewhere"}
    exec("def verb(error):\n    raise error", exec_globals)
    monkeypatch.setattr(cli, "config_schema", lambda args: exec_globals["verb"](error))  # type: ignore[operator]
    with pytest.raises(SystemExit) as end:
        cli.main(["config", "schema"])
    assert end.value.code == code and capsys.readouterr().err == "ltrain: no.\n"


def test_another_librarys_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "config_schema", lambda args: _raises(ValueError("a defect")))
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["config", "schema"])


@pytest.mark.parametrize("words", [[], ["fly"], ["generate", "runs/x"], ["generate", "runs/x", "--prompt", "a", "--tokens", "0"], ["train"], STRAY])
def test_wrong_usage_exits_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2


def test_ctrl_c_is_quiet() -> None:
    verb = "cli.config_schema = lambda args: (print('up', flush=True), time.sleep(60))"
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background job is started deaf to it
    code = f"import signal, time; from ltrain import cli; {verb}; {heard}; cli.main(['config', 'schema'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "")


def test_a_closed_pipe_is_quiet() -> None:
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m ltrain config schema | true; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.strip() in ("0", "141")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["extend", "runs/x", "--to", "128k", "--budget-tokens", "1e6"],
            "--to: 128k is not a whole number of at least 1: write it out, for example 131072",
        ),
        (["eval", "runs/x", "--lengths", "4096,8k"], "--lengths: 8k is not a whole number of at least 1"),
        (["launch", "local", QUICKSTART, "--ranks", "2", "--max-restarts", "-1"], "--max-restarts: -1 is not a whole number of at least 0"),
        (["launch", "slurm", QUICKSTART, "--nodes", "1", "--gpus-per-node", "all"], "--gpus-per-node: all is not a whole number of at least 0"),
        (["generate", "runs/x", "--prompt", "a", "--temperature", "hot"], "--temperature: hot is not a number of at least 0"),
    ],
)
def test_a_number_that_is_none_is_told_with_what_to_write(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(words)
    assert f"error: argument {message}" in capsys.readouterr().err
