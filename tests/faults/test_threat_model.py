"""What docs/threat-model.md says of sockets, shared memory and code from files, looked up in a running group and in the package."""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path

import pytest

import imex_persist
from imex_persist import LLM
from tests.runtime.groups import pids

from .test_simulated import SETTINGS, folder  # noqa: F401

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}


def targets(pid: int) -> list[str]:
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(link))
        except FileNotFoundError:
            pass
    return links


def test_nothing_of_a_group_has_a_name(folder):  # noqa: F811
    """No port, no path of a socket, no file of shared memory: there is nothing to guess."""
    shm = sorted(os.listdir("/dev/shm"))
    with LLM(folder, **SETTINGS) as llm:
        processes = [os.getpid(), *pids(llm.group)]
        links = [link for pid in processes for link in targets(pid)]
        inodes = {match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
        assert inodes
        for protocol in ("tcp", "tcp6", "udp", "udp6"):
            for line in Path(f"/proc/net/{protocol}").read_text().splitlines()[1:]:
                assert line.split()[9] not in inodes, f"a {protocol} socket: {line}"
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
            fields = line.split()
            assert fields[6] not in inodes or len(fields) == 7, f"a socket with a path: {line}"
        shared = [link for link in links if "imex" in link and ".so" not in link and ".log" not in link]
        assert shared and all(re.fullmatch(r"/memfd:imex(-symmetric)? \(deleted\)", link) for link in shared), shared
        assert sorted(os.listdir("/dev/shm")) == shm


def test_the_package_runs_no_code_from_data():
    for path in Path(imex_persist.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not UNSAFE_MODULES & {name.split(".")[0] for name in names}, f"{path} imports {names}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in UNSAFE_CALLS, f"{path}:{node.lineno} calls {node.func.id}"
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code", "shell"):
                assert isinstance(node.value, ast.Constant) and not node.value.value, f"{path}: {node.arg}"


@pytest.mark.parametrize(
    "source", ["{{ messages.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ messages.append(1) }}"]
)
def test_a_template_is_in_a_sandbox(source):
    from imex_persist.model.chat import ChatTemplate

    with pytest.raises(ValueError, match="cannot render"):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])
