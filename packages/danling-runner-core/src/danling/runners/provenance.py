"""What a run was made from: the revision of its code, the packages and machine it ran on.

Provenance only: nothing here enters a path or decides whether a run can be resumed.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .atomic import write_bytes, write_yaml

MAX_DIFF = 1 << 20
LAUNCHER_VARIABLES = (
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID "
    "TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS OMP_NUM_THREADS CUDA_VISIBLE_DEVICES CUBLAS_WORKSPACE_CONFIG "
    "NCCL_DEBUG NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME SLURM_JOB_ID SLURM_JOB_NAME SLURM_NODELIST SLURM_NTASKS "
    "SLURM_PROCID SLURM_RESTART_COUNT LSB_JOBID PBS_JOBID KUBERNETES_SERVICE_HOST HOSTNAME PYTHONHASHSEED"
).split()


@dataclass(frozen=True)
class GitState:
    """The state of a git working tree.

    Attributes:
        revision: the full hash of the commit checked out.
        branch: None when detached.
        diff: what tracked files hold beyond that commit.
    """

    revision: str
    branch: str | None
    diff: bytes

    @property
    def dirty(self) -> bool:
        """Whether tracked files differ from the commit."""
        return bool(self.diff)

    @property
    def diff_hash(self) -> str:
        """SHA-256 of the diff, in hex."""
        return hashlib.sha256(self.diff).hexdigest()

    @property
    def code_id(self) -> str:
        """First 8 digits of the revision; when dirty, `-d` and 8 digits of the diff's hash.

        Examples:
            >>> GitState("0123456789abcdef", "main", b"").code_id
            '01234567'
            >>> GitState("0123456789abcdef", "main", b"+x").code_id
            '01234567-d04a6fb16'
        """
        return self.revision[:8] + (f"-d{self.diff_hash[:8]}" if self.dirty else "")


def git_state(directory: str | os.PathLike[str]) -> GitState | None:
    """Read the state of the repository that holds a directory; None without git, repository or commit."""
    revision = _git(directory, "rev-parse", "HEAD")
    if revision is None:
        return None
    branch = _git(directory, "symbolic-ref", "--short", "-q", "HEAD")
    diff = _git(directory, "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--no-textconv")
    return GitState(revision.decode().strip(), branch.decode().strip() if branch else None, diff or b"")


def source_directory(cls: type) -> Path:
    """The directory of the file that defines a class; the working directory where there is no file."""
    try:
        return Path(inspect.getfile(cls)).resolve().parent
    except (TypeError, OSError):
        return Path.cwd()


def _git(directory: str | os.PathLike[str], *args: str) -> bytes | None:
    try:
        done = subprocess.run(
            ["git", "-C", os.fspath(directory), *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def environment(extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Describe this process: Python, platform, packages, command line, launcher variables.

    Args:
        extra: what only the engine knows: devices, hosts, world size.
    """
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "pid": os.getpid(),
        "cwd": os.getcwd(),
        "argv": list(sys.argv),
        "variables": {name: os.environ[name] for name in LAUNCHER_VARIABLES if name in os.environ},
        **(extra or {}),
        "packages": packages(),
    }


def packages() -> dict[str, str]:
    """Names and versions of the distributions that can be imported.

    They are read off the names of the `.dist-info` directories, which is a hundred times faster than their metadata.
    """
    found: dict[str, str] = {}
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        for entry in names:
            if entry.endswith(".dist-info"):
                name, _, version = entry.removesuffix(".dist-info").partition("-")
                found.setdefault(name.replace("_", "-"), version)
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def write_metadata(
    directory: str | os.PathLike[str],
    *,
    git: GitState | None,
    config: Mapping[str, Any],
    identity: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> list[tuple[str, Exception]]:
    """Write the metadata of an attempt: `git.yaml`, `git.diff`, `environment.yaml`, `config.yaml`, `identity.yaml`.

    Args:
        directory: `metadata/{timestamp}` of the run.
        git: state of the code; None writes no git files.
        config: the full configuration.
        identity: the identity view.
        extra: see `environment`.

    Returns:
        The files that could not be written, each with the error; never raises for one of them.
    """
    directory = Path(directory)
    failures: list[tuple[str, Exception]] = []

    def attempt(name: str, write: Callable[[Path], None]) -> None:
        try:
            write(directory / name)
        except Exception as error:  # whatever it is, the run goes on without this file
            failures.append((name, error))

    attempt("", lambda path: directory.mkdir(parents=True, exist_ok=True))
    if git is not None:
        attempt("git.yaml", lambda path: write_yaml(path, _git_facts(git), durable=False))
        if git.dirty and len(git.diff) <= MAX_DIFF:
            attempt("git.diff", lambda path: write_bytes(path, git.diff, durable=False))
    attempt("environment.yaml", lambda path: write_yaml(path, environment(extra), durable=False))
    attempt("config.yaml", lambda path: write_yaml(path, config, durable=False))
    attempt("identity.yaml", lambda path: write_yaml(path, identity, durable=False))
    return failures


def _git_facts(git: GitState) -> dict[str, Any]:
    facts: dict[str, Any] = {"revision": git.revision, "branch": git.branch, "dirty": git.dirty, "code_id": git.code_id}
    if git.dirty:
        facts["diff_sha256"] = git.diff_hash
        facts["diff_bytes"] = len(git.diff)
        if len(git.diff) > MAX_DIFF:
            facts["note"] = f"the diff is larger than {MAX_DIFF} bytes and is not kept"
    return facts
