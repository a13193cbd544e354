"""Reading machine code: basic blocks of opcodes, from nvdisasm (the wheel nvidia-cuda-nvdisasm, or a CUDA toolkit on PATH); and PTX."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)")
_LABEL = re.compile(r"^\s*\.L_\w+:")
_LEAVES = {"BRA", "BRX", "JMP", "JMX", "EXIT", "CALL", "RET", "BSYNC", "BREAK"}


_REGISTER = re.compile(r"%[a-z]+\d+")
# Of a statement, after scopes' braces and a label: guard, opcode, destination, sources. A destination may be several in braces or
# parentheses; in brackets it is an address, so a source.
_STATEMENT = re.compile(
    r"[\s{})]*(?:\S+:)?[\s{]*(?P<guard>@!?\S+\s+)?[a-z][\w.:]*\s+(?P<to>\{[^}]*\}|\([^)]*\)|[^\[,]*)(?P<rest>.*)", re.DOTALL
)


def unwritten_registers(ptx: str) -> set[str]:
    """Virtual registers that PTX reads and nowhere writes. PTX says nothing of their value, and ptxas may give one machine register to one
    of them and to what is copied from it on other ways: wrong code wherever two such copies are alive together.
    """
    read, written = set(), set()
    for statement in re.sub(r"//[^\n]*|^\s*\.[^\n]*", "", ptx, flags=re.MULTILINE).split(";"):
        if match := _STATEMENT.match(statement.strip()):
            written.update(_REGISTER.findall(match["to"]))
            read.update(_REGISTER.findall((match["guard"] or "") + match["rest"]))
    return read - written


def nvdisasm() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        for tool in sorted(Path(root).glob("cu*/bin/nvdisasm")):
            return str(tool)
    return shutil.which("nvdisasm")


def basic_blocks(cubin: Path, tool: str) -> list[list[str]]:
    """The opcodes of each straight run of instructions."""
    text = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True, timeout=120).stdout
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if _LABEL.match(line):
            blocks.append([])
        elif match := _INSTRUCTION.match(line):
            blocks[-1].append(match[1])
            if match[1].partition(".")[0] in _LEAVES:
                blocks.append([])
    return [block for block in blocks if block]
