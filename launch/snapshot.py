"""The code of a run, copied: a job that waits in a queue, or starts again, runs what was there when it was submitted."""

import json
import shutil
import subprocess
from pathlib import Path

import ltrain
from ltrain.tracking import git_revision

# Under these, files that git does not know yet are part of the code; elsewhere they may be data or runs.
SOURCES = ("ltrain", "kernels", "parallel", "configs", "launch")


def take(target: Path) -> str:
    """Copy the code in use to `target`, a new folder to go into PYTHONPATH, and say in one line what was copied.

    In a git checkout: what git tracks, as it is now, and new files of the source folders that it does not ignore. Else the installed package.
    `revision.json` keeps the commit for MLflow.
    """
    package = Path(ltrain.__file__).resolve().parent
    root = package.parent
    names = _tracked(root) if (root / ".git").exists() else None
    if names is None:
        shutil.copytree(package, target / "ltrain", ignore=shutil.ignore_patterns("__pycache__"))
        copied = f"the installed package {package}"
    else:
        present = [name for name in names if (root / name).is_symlink() or (root / name).is_file()]  # not what is deleted and not committed
        for name in present:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name, follow_symlinks=False)
        copied = f"{len(present)} files of {root}"
    revision = git_revision(package)
    (target / "revision.json").write_text(json.dumps(revision) + "\n")
    if commit := revision.get("mlflow.source.git.commit"):
        copied += f" at {commit[:12]}" + (", with uncommitted changes" if revision["git.dirty"] == "true" else "")
    return copied


def _tracked(root: Path) -> list[str] | None:
    """Relative paths, None where git cannot be asked."""

    def git(*words: str) -> list[str]:
        listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z", *words], capture_output=True, text=True, check=True)
        return [name for name in listed.stdout.split("\0") if name]

    try:
        return sorted({*git(), *git("--others", "--exclude-standard", "--", *SOURCES)})
    except (OSError, subprocess.CalledProcessError):
        return None
